"""What the page of an evaluation draws, from the tables of samples: recall curves, reliability, classes, conditions."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm.evaluation.bootstrap import mean_interval
from vlm.evaluation.comparison import sample_outcomes
from vlm.evaluation.measurement import Measurement, Value
from vlm.tensor_types import Array, Bool, Float64

_LARGEST_K = 100
_RELIABILITY_BINS = 10
_CLASS_RESAMPLES = 2_000
_MAX_CLASSES = 1_000
_MAX_PAIRS = 12
_SHOTS = re.compile(r"(?P<metric>.+)@(?P<amount>\d+)-shot")
_SHARE = re.compile(r"(?P<metric>.+)@(?P<amount>\d+(\.\d+)?)%")
_CONDITION = re.compile(r"(?P<metric>.+)@(?P<condition>[^/]+)(/(?P<severity>\d+))?")
_CUTOFF = re.compile(r"\d+")
_SHARE_TICKS = tuple((tick / 4, f"{25 * tick}%") for tick in range(5))

Tick = tuple[float, str]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a curve in [0, 1]², from the lower left corner, with the ends of its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """The curve of one model. series: the model's number, which decides the colour."""

    name: str
    series: int
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Curves over the same axes. is_marked: each point is shown, not only the line through them."""

    title: str
    note: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...] = _SHARE_TICKS
    has_diagonal: bool = False
    is_marked: bool = False

    @property
    def description(self) -> str:
        """The ends of each curve in words, for those who do not see it."""
        parts: list[str] = []
        for line in self.lines:
            first, last = line.points[0], line.points[-1]
            parts.append(f"{line.name} from {first.y:.1%} to {last.y:.1%}")
        return f"{self.title}, {self.note}: {'; '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """One class: its images, and the accuracy of each model on them; None of a model that was not measured."""

    name: str
    num_images: int
    accuracies: tuple[Value | None, ...]


@dataclass(frozen=True, kw_only=True)
class ConfusionRow:
    """Images of one class that were taken for another, and their share among those of the class."""

    truth: str
    prediction: str
    num_images: int
    share: float


@dataclass(frozen=True, kw_only=True)
class ConditionRow:
    """A condition (a corruption): the mean value of each model over its severities, and how much less than clean."""

    name: str
    values: tuple[float | None, ...]
    drops: tuple[float | None, ...]


Models = Sequence[tuple[str, Measurement | None]]
"""Names of the models, with what an evaluator measured of each on one set."""


def line_charts(models: Models) -> list[LineChart]:
    """All curves that the samples and values of an evaluator give."""
    charts: list[LineChart] = []
    for direction in _directions(models):
        charts += _recall_chart(models, direction)
    charts += _reliability_chart(models)
    charts += _amount_chart(models, _SHOTS, "Labelled images per class")
    charts += _amount_chart(models, _SHARE, "Share of the labelled images, %")
    return charts


def class_rows(models: Models, *, rng: np.random.Generator) -> list[ClassRow]:
    """Accuracy of each class, the hardest for the first model first; empty for what is no classification."""
    by_model: list[dict[str, tuple[Value, int]] | None] = []
    for _, measurement in models:
        by_model.append(None if measurement is None else _accuracy_by_class(measurement, rng))
    known = [classes for classes in by_model if classes]
    if not known or len(known[0]) > _MAX_CLASSES:
        return []
    sizes: dict[str, int] = {}
    for classes in known:
        for name, (_, num_images) in classes.items():
            sizes.setdefault(name, num_images)
    rows: list[ClassRow] = []
    for name, num_images in sizes.items():
        accuracies = tuple(classes[name][0] if classes and name in classes else None for classes in by_model)
        rows.append(ClassRow(name=name, num_images=num_images, accuracies=accuracies))
    # of classes with equal accuracy first those with more images, where it is less of an accident
    return sorted(rows, key=lambda row: (_first_value(row.accuracies), -row.num_images, row.name))


def confusion_rows(measurement: Measurement) -> list[ConfusionRow]:
    """The classes taken most often for another; empty for what is no classification."""
    table = _classified(measurement)
    if table is None:
        return []
    totals = dict(zip(*_columns(table.group_by("truth").aggregate([([], "count_all")])), strict=True))
    counted = table.filter(pc.field("truth") != pc.field("prediction"))
    counted = counted.group_by(["truth", "prediction"]).aggregate([([], "count_all")])
    order = [("count_all", "descending"), ("truth", "ascending"), ("prediction", "ascending")]
    rows: list[ConfusionRow] = []
    for entry in counted.sort_by(order).slice(0, _MAX_PAIRS).to_pylist():
        number = entry["count_all"]
        share = number / totals[entry["truth"]]
        rows.append(ConfusionRow(truth=entry["truth"], prediction=entry["prediction"], num_images=number, share=share))
    return rows


def condition_rows(models: Models) -> tuple[str, list[ConditionRow]]:
    """Name of the clean value, and what is left of it under each condition, the largest drop of the first model first.

    Values METRIC@CONDITION/SEVERITY or METRIC@CONDITION belong to the clean value METRIC.
    """
    means: dict[str, dict[int, float]] = {}
    clean_name = ""
    for number, (_, measurement) in enumerate(models):
        sums: dict[str, list[float]] = {}
        measured = measurement.values if measurement else {}
        for name, value in measured.items():
            match = _CONDITION.fullmatch(name)
            if match and match["metric"] in measured and not _is_amount(name, match["condition"]):
                clean_name = clean_name or match["metric"]
                if match["metric"] == clean_name:
                    sums.setdefault(match["condition"], []).append(value.value)
        for condition, figures in sums.items():
            means.setdefault(condition, {})[number] = float(np.mean(figures))
    rows: list[ConditionRow] = []
    for condition, by_model in means.items():
        values = tuple(by_model.get(number) for number in range(len(models)))
        drops: list[float | None] = []
        for (_, measurement), value in zip(models, values, strict=True):
            if measurement is None or value is None:
                drops.append(None)
            else:
                drops.append(measurement.values[clean_name].value - value)
        rows.append(ConditionRow(name=condition, values=values, drops=tuple(drops)))
    return clean_name, sorted(rows, key=lambda row: (-(row.drops[0] or 0.0), row.name))


def is_drawn(value: str) -> bool:
    """Whether a value, by its name, is a point of a curve or a condition: METRIC@4-shot, METRIC@10%, METRIC@fog/3.

    >>> is_drawn("top1@4-shot"), is_drawn("top1@fog/3"), is_drawn("recall@5")
    (True, True, False)
    """
    match = _CONDITION.fullmatch(value)
    return match is not None and _CUTOFF.fullmatch(match["condition"]) is None


def _directions(models: Models) -> list[str | None]:
    directions: dict[str, None] = {}
    for _, measurement in models:
        table = measurement.samples if measurement else None
        if table is not None and "direction" in table.column_names:
            directions |= dict.fromkeys(filter(None, table["direction"].unique().to_pylist()))
    return list(directions) or [None]


def _recall_chart(models: Models, direction: str | None) -> list[LineChart]:
    ranks_by_model: list[tuple[int, str, np.ndarray]] = []
    for number, (name, measurement) in enumerate(models):
        table = measurement.samples if measurement else None
        if table is not None and "rank" in table.column_names:
            if direction is not None:
                table = table.filter(pc.field("direction") == direction)
            ranks = table["rank"].drop_null().cast(pa.float64()).to_numpy()
            if len(ranks):
                ranks_by_model.append((number, name, ranks))
    largest = max((float(ranks.max()) for _, _, ranks in ranks_by_model), default=1.0)
    end = min(_LARGEST_K, math.ceil(largest))
    if end < 3:
        return []
    cutoffs = np.unique(np.geomspace(1, end, 40).round()).astype(int)
    lines: list[Line] = []
    for number, name, ranks in ranks_by_model:
        points: list[Point] = []
        for cutoff in cutoffs.tolist():
            points.append(Point(x=math.log(cutoff) / math.log(end), y=float(np.mean(ranks <= cutoff))))
        lines.append(Line(name=name, series=number, points=tuple(points)))
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= end]
    return [
        LineChart(
            title=f"Recall{f', {direction}' if direction else ''}",
            note="right answer within the first K",
            lines=tuple(lines),
            x_ticks=tuple((math.log(tick) / math.log(end), str(tick)) for tick in ticks),
        )
    ]


def _reliability_chart(models: Models) -> list[LineChart]:
    lines: list[Line] = []
    for number, (name, measurement) in enumerate(models):
        table = _classified(measurement) if measurement else None
        if table is None or "probability" not in table.column_names:
            continue
        probability = table["probability"].cast(pa.float64()).to_numpy()
        is_right = _is_right(table)
        bin_of = np.minimum((probability * _RELIABILITY_BINS).astype(int), _RELIABILITY_BINS - 1)
        points: list[Point] = []
        for bin_number in np.unique(bin_of):
            inside = bin_of == bin_number
            points.append(Point(x=float(probability[inside].mean()), y=float(is_right[inside].mean())))
        lines.append(Line(name=name, series=number, points=tuple(points)))
    if not lines:
        return []
    return [
        LineChart(
            title="Reliability",
            note="accuracy by probability",
            lines=tuple(lines),
            x_ticks=_SHARE_TICKS,
            has_diagonal=True,
            is_marked=True,
        )
    ]


def _amount_chart(models: Models, pattern: re.Pattern[str], note: str) -> list[LineChart]:
    """A chart for each metric that was measured with several amounts of labelled images."""
    figures: dict[str, dict[int, list[tuple[float, Value]]]] = {}
    for number, (_, measurement) in enumerate(models):
        for name, value in measurement.values.items() if measurement else ():
            match = pattern.fullmatch(name)
            if match:
                by_model = figures.setdefault(match["metric"], {})
                by_model.setdefault(number, []).append((float(match["amount"]), value))
    charts: list[LineChart] = []
    for metric, by_model in figures.items():
        amounts = sorted({amount for entries in by_model.values() for amount, _ in entries})
        if len(amounts) < 2:
            continue
        # evenly spaced, whatever the amounts: they double, or grow tenfold
        position_of = {amount: place / (len(amounts) - 1) for place, amount in enumerate(amounts)}
        lines: list[Line] = []
        for number, entries in by_model.items():
            points: list[Point] = []
            for amount, value in sorted(entries, key=lambda entry: entry[0]):
                points.append(Point(x=position_of[amount], y=value.value, low=value.low, high=value.high))
            lines.append(Line(name=models[number][0], series=number, points=tuple(points)))
        ticks = tuple((position, f"{amount:g}") for amount, position in position_of.items())
        charts.append(LineChart(title=metric, note=note, lines=tuple(lines), x_ticks=ticks, is_marked=True))
    return charts


def _is_amount(name: str, condition: str) -> bool:
    is_cutoff = _CUTOFF.fullmatch(condition) is not None
    return is_cutoff or _SHOTS.fullmatch(name) is not None or _SHARE.fullmatch(name) is not None


def _accuracy_by_class(measurement: Measurement, rng: np.random.Generator) -> dict[str, tuple[Value, int]]:
    table = _classified(measurement)
    if table is None:
        return {}
    truths = table["truth"].to_numpy()
    outcomes = _main_outcomes(measurement, table)
    classes: dict[str, tuple[Value, int]] = {}
    for name in np.unique(truths):
        of_class = outcomes[truths == name]
        interval = mean_interval(of_class, rng=rng, share=True, resamples=_CLASS_RESAMPLES)
        value = Value(value=interval.value, low=interval.low, high=interval.high)
        classes[str(name)] = (value, len(of_class))
    return classes


def _main_outcomes(measurement: Measurement, table: pa.Table) -> Float64[Array, " N"]:
    """The first value's outcomes, in which ties are shared, where the table has them; else right or wrong."""
    name = next(iter(measurement.values), "")
    outcomes = sample_outcomes(measurement, name)
    if outcomes is not None and len(outcomes[1]) == table.num_rows:
        return outcomes[1]
    return _is_right(table).astype(np.float64)


def _classified(measurement: Measurement) -> pa.Table | None:
    """The samples with a true class and a prediction; None where truths are captions, or there are none."""
    table = measurement.samples
    if table is None or not {"truth", "prediction"} <= set(table.column_names) or "query" in table.column_names:
        return None
    if "direction" in table.column_names:
        return None
    table = table.filter(pc.field("truth").is_valid() & pc.field("prediction").is_valid())
    num_truths = len(table["truth"].unique())
    # captions are mostly all different, and classes have several images
    return table if 0 < num_truths <= max(table.num_rows / 2, 2) else None


def _is_right(table: pa.Table) -> Bool[Array, " N"]:
    return np.asarray(table["truth"].to_numpy() == table["prediction"].to_numpy())


def _columns(table: pa.Table) -> list[list[Any]]:
    return [column.to_pylist() for column in table.columns]


def _first_value(accuracies: Sequence[Value | None]) -> float:
    return next((value.value for value in accuracies if value is not None), 0.0)
