"""Figures of a suite that are a mean over several of its sets, such as BASIC's accuracy under five shifts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.config import from_values, suggest
from vlm.errors import UsageError
from vlm.evaluation.comparison import ModelMeasurements
from vlm.evaluation.measurement import Value


@dataclass(frozen=True, kw_only=True)
class SuiteAverage:
    """A mean over sets: of one value of one evaluator, by its name. value: empty takes each measurement's first."""

    name: str
    evaluator: str
    data: tuple[str, ...]
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class AverageFigure:
    """A mean of a model; None, with the sets that were not measured, where any is missing.

    value: with a 95% interval if each set has one; sets are independent of each other, so half its width is the root of
    the summed squares of theirs, divided by their number.
    """

    name: str
    model: str
    value: Value | None
    missing: tuple[str, ...] = ()


def read_averages(listed: Any, data: Sequence[str], evaluators: Sequence[str], where: str) -> tuple[SuiteAverage, ...]:
    """The tables [[average]] of a suite.

    Raises:
        UsageError: a key does not fit, a set or an evaluator is not the suite's, or there is one set only.
    """
    averages: list[SuiteAverage] = []
    for number, table in enumerate(listed if isinstance(listed, list) else [listed], 1):
        place = f"{where}, average {number}"
        if not isinstance(table, dict):
            raise UsageError(f"{place} is {table!r}; write a table [[average]] with name, evaluator and data.")
        average = from_values(SuiteAverage, table, where=place)
        for name in average.data:
            if name not in data:
                raise UsageError(f"{place}: there is no data {name!r}; {suggest(name, list(data))}")
        if average.evaluator not in evaluators:
            raise UsageError(
                f"{place}: no entry evaluates by {average.evaluator!r}; {suggest(average.evaluator, list(evaluators))}"
            )
        if len(set(average.data)) < max(2, len(average.data)):
            raise UsageError(f"{place}: data = {list(average.data)} is no list of at least two different sets.")
        averages.append(average)
    return tuple(averages)


def average_figures(averages: Sequence[SuiteAverage], models: Sequence[ModelMeasurements]) -> tuple[AverageFigure, ...]:
    """Each mean of each model.

    Raises:
        UsageError: a measurement has no value of the name that a mean is of.
    """
    figures: list[AverageFigure] = []
    for average in averages:
        for model in models:
            values: dict[str, Value] = {}
            for name in average.data:
                measurement = model.find(average.evaluator, name)
                if measurement is not None:
                    values[name] = _value_of(measurement.values, average)
            missing = tuple(name for name in average.data if name not in values)
            mean = None if missing else _mean(list(values.values()))
            figures.append(AverageFigure(name=average.name, model=model.model, value=mean, missing=missing))
    return tuple(figures)


def _value_of(values: Mapping[str, Value], average: SuiteAverage) -> Value:
    name = average.value or next(iter(values))
    if name not in values:
        raise UsageError(
            f"average {average.name!r}: {average.evaluator} has no value {name!r}; {suggest(name, list(values))}"
        )
    return values[name]


def _mean(values: Sequence[Value]) -> Value:
    mean = math.fsum(value.value for value in values) / len(values)
    squares: list[float] = []
    for value in values:
        if value.low is None or value.high is None:
            return Value(value=mean)
        squares.append(((value.high - value.low) / 2) ** 2)
    half_width = math.sqrt(math.fsum(squares)) / len(values)
    return Value(value=mean, low=mean - half_width, high=mean + half_width)
