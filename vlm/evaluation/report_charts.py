"""What the page of an evaluation draws, from the tables of samples: recall curves, reliability, classes, conditions."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm.evaluation.bootstrap import mean_interval
from vlm.evaluation.comparison import sample_outcomes
from vlm.evaluation.measurement import Measurement, Value
from vlm.evaluation.mistakes import answers_of, classified
from vlm.tensor_types import Array, Float64

_LARGEST_K = 100
_RELIABILITY_BINS = 10
_CLASS_RESAMPLES = 2_000
_MAX_CLASSES = 1_000
_MAX_PAIRS = 12
_SHOTS = re.compile(r"(?P<amount>\d+)-shot")
_SHARE = re.compile(r"(?P<amount>\d+(\.\d+)?)%")
# the column of a kind of edit at one of its levels
_LEVEL = re.compile(r".+/(?P<level>\d+(\.\d+)?)")
CLEAN = "clean"
# values of robustness that are no kind of edit
_SUMMARIES = frozenset({CLEAN, "edited", "drop", "attack_success"})
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
            first = line.points[0]
            last = line.points[-1]
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
    """A kind of edit (a corruption): the value of each model over its levels, and how much less it is than clean."""

    name: str
    values: tuple[Value | None, ...]
    drops: tuple[float | None, ...]


Models = Sequence[tuple[str, Measurement | None]]
"""Names of the models, with what an evaluator measured of each on one set."""


def line_charts(models: Models) -> list[LineChart]:
    """All curves that the samples and values of an evaluator give."""
    charts: list[LineChart] = []
    charts += _recall_charts(models)
    charts += _reliability_chart(models)
    charts += _amount_chart(models, _SHOTS, "Few-shot accuracy", "labelled images per class")
    charts += _amount_chart(models, _SHARE, "Accuracy", "share of the labelled images, %")
    charts += _level_chart(models)
    return charts


def class_rows(models: Models, *, rng: np.random.Generator) -> list[ClassRow]:
    """Accuracy of each class, the hardest for the first model first; empty for what is no classification."""
    by_model: list[dict[str, tuple[Value, int]] | None] = []
    for _, measurement in models:
        by_model.append(None if measurement is None else _accuracy_by_class(measurement, rng))
    known = [classes for classes in by_model if classes]
    # a table of more rows would make the page too heavy to open
    if not known or len(known[0]) > _MAX_CLASSES:
        return []
    # models may have decoded different images, so a class counts as many as the first of them has
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
    table = classified(measurement)
    if table is None:
        return []
    totals = dict(zip(*_columns(table.group_by("truth").aggregate([([], "count_all")])), strict=True))
    counted = table.filter(~pc.field("is_right"))
    counted = counted.group_by(["truth", "prediction"]).aggregate([([], "count_all")])
    order = [("count_all", "descending"), ("truth", "ascending"), ("prediction", "ascending")]
    rows: list[ConfusionRow] = []
    for entry in counted.sort_by(order).slice(0, _MAX_PAIRS).to_pylist():
        number = entry["count_all"]
        share = number / totals[entry["truth"]]
        rows.append(ConfusionRow(truth=entry["truth"], prediction=entry["prediction"], num_images=number, share=share))
    return rows


def condition_rows(models: Models) -> list[ConditionRow]:
    """What is left of the clean value under each kind of edit, the largest drop of the first model first."""
    kinds: dict[str, None] = {}
    for _, measurement in models:
        if measurement and CLEAN in measurement.values:
            kinds |= dict.fromkeys(name for name in measurement.values if is_drawn(name, measurement))
    rows: list[ConditionRow] = []
    for kind in kinds:
        values: list[Value | None] = []
        drops: list[float | None] = []
        for _, measurement in models:
            value = measurement.values.get(kind) if measurement else None
            values.append(value)
            drops.append(measurement.values[CLEAN].value - value.value if measurement and value else None)
        rows.append(ConditionRow(name=kind.replace("_", " "), values=tuple(values), drops=tuple(drops)))
    return sorted(rows, key=lambda row: (-(row.drops[0] or 0.0), row.name))


def is_drawn(value: str, measurement: Measurement) -> bool:
    """Whether a value stands in a curve (4-shot, 10%) or among the kinds of edits."""
    if _SHOTS.fullmatch(value) or _SHARE.fullmatch(value):
        return True
    table = measurement.samples
    return (
        CLEAN in measurement.values
        and table is not None
        and any(column == value or column.startswith(f"{value}/") for column in table.column_names)
        and value not in _SUMMARIES
    )


def _recall_charts(models: Models) -> list[LineChart]:
    # one chart for each direction or language, with a line for each model
    by_title: dict[str, list[tuple[int, str, Float64[Array, " M"]]]] = {}
    for number, (name, measurement) in enumerate(models):
        for answers in answers_of(measurement) if measurement else ():
            if len(answers.ranks):
                by_title.setdefault(answers.title, []).append((number, name, answers.ranks))
    return [_recall_chart(title, ranks) for title, ranks in by_title.items() if _largest_cutoff(ranks) >= 3]


def _largest_cutoff(ranks: Sequence[tuple[int, str, Float64[Array, " M"]]]) -> int:
    return min(_LARGEST_K, math.ceil(max(float(of_model.max()) for _, _, of_model in ranks)))


def _recall_chart(title: str, ranks: Sequence[tuple[int, str, Float64[Array, " M"]]]) -> LineChart:
    end = _largest_cutoff(ranks)
    # evenly spaced on a logarithmic axis, where a recall curve is nearly straight
    cutoffs = np.unique(np.geomspace(1, end, 40).round()).astype(int)
    lines: list[Line] = []
    for number, name, of_model in ranks:
        points: list[Point] = []
        for cutoff in cutoffs.tolist():
            points.append(Point(x=math.log(cutoff) / math.log(end), y=float(np.mean(of_model <= cutoff))))
        lines.append(Line(name=name, series=number, points=tuple(points)))
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick <= end]
    return LineChart(
        title=title or "Recall",
        note="right answer within the first K",
        lines=tuple(lines),
        x_ticks=tuple((math.log(tick) / math.log(end), str(tick)) for tick in ticks),
    )


def _reliability_chart(models: Models) -> list[LineChart]:
    lines: list[Line] = []
    for number, (name, measurement) in enumerate(models):
        table = classified(measurement) if measurement else None
        if table is None or "probability" not in table.column_names:
            continue
        probability = table["probability"].cast(pa.float64()).to_numpy()
        is_right = table["is_right"].cast(pa.float64()).to_numpy()
        # a probability of 1 belongs to the last bin, not to one behind it
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


def _amount_chart(models: Models, pattern: re.Pattern[str], title: str, note: str) -> list[LineChart]:
    """Values by the amount of labelled images they were measured with."""
    by_model: dict[int, dict[float, Value]] = {}
    for number, (_, measurement) in enumerate(models):
        for name, value in measurement.values.items() if measurement else ():
            match = pattern.fullmatch(name)
            if match:
                by_model.setdefault(number, {})[float(match["amount"])] = value
    return _spaced_chart(models, by_model, title, note)


def _level_chart(models: Models) -> list[LineChart]:
    """What is left at each level of the edits, mean over the kinds that have it; 0 is the clean image."""
    by_model: dict[int, dict[float, Value]] = {}
    for number, (_, measurement) in enumerate(models):
        table = measurement.samples if measurement else None
        if measurement is None or table is None or CLEAN not in measurement.values:
            continue
        of_level: dict[float, list[float]] = {}
        for name in table.column_names:
            match = _LEVEL.fullmatch(name)
            if match:
                of_level.setdefault(float(match["level"]), []).append(float(np.mean(table[name].to_numpy())))
        if of_level:
            means = {level: Value(value=float(np.mean(figures))) for level, figures in of_level.items()}
            by_model[number] = {0.0: measurement.values[CLEAN]} | means
    return _spaced_chart(models, by_model, "Altered images", "by severity, 0 is unaltered")


def _spaced_chart(
    models: Models, by_model: Mapping[int, Mapping[float, Value]], title: str, note: str
) -> list[LineChart]:
    amounts = sorted(set[float]().union(*by_model.values()))
    if len(amounts) < 2:
        return []
    # evenly spaced, whatever the amounts: they double, or grow tenfold
    position_of = {amount: place / (len(amounts) - 1) for place, amount in enumerate(amounts)}
    lines: list[Line] = []
    for number, values in by_model.items():
        points: list[Point] = []
        for amount in sorted(values):
            value = values[amount]
            points.append(Point(x=position_of[amount], y=value.value, low=value.low, high=value.high))
        lines.append(Line(name=models[number][0], series=number, points=tuple(points)))
    ticks = tuple((position, f"{amount:g}") for amount, position in position_of.items())
    return [LineChart(title=title, note=note, lines=tuple(lines), x_ticks=ticks, is_marked=True)]


def _accuracy_by_class(measurement: Measurement, rng: np.random.Generator) -> dict[str, tuple[Value, int]]:
    table = classified(measurement)
    if table is None:
        return {}
    truths = table["truth"].to_numpy()
    # the first value's outcomes share ties; where it is a mean over classes, right is what the prediction is
    outcomes = sample_outcomes(measurement, next(iter(measurement.values), ""))
    is_of_rows = outcomes is not None and len(outcomes[1]) == table.num_rows
    right = outcomes[1] if outcomes is not None and is_of_rows else table["is_right"].cast(pa.float64()).to_numpy()
    classes: dict[str, tuple[Value, int]] = {}
    for name in np.unique(truths):
        of_class = right[truths == name]
        interval = mean_interval(of_class, rng=rng, share=True, resamples=_CLASS_RESAMPLES)
        value = Value(value=interval.value, low=interval.low, high=interval.high)
        classes[str(name)] = (value, len(of_class))
    return classes


def _columns(table: pa.Table) -> list[list[Any]]:
    return [column.to_pylist() for column in table.columns]


def _first_value(accuracies: Sequence[Value | None]) -> float:
    return next((value.value for value in accuracies if value is not None), 0.0)
