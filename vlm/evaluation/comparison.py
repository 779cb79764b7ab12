"""Models side by side: intervals of all that has samples, and by how much models differ on the same samples."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from vlm.errors import UsageError
from vlm.evaluation.bootstrap import holm, mean_interval, paired_difference, paired_statistic_difference
from vlm.evaluation.measurement import Measurement, Value
from vlm.results import Result, json_values
from vlm.tensor_types import Array, Float64, Int64

KEY = "key"
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class ModelMeasurements(Result):
    """All that was measured of one model. fingerprint: identity of its weights, empty where unknown."""

    model: str
    fingerprint: str = ""
    measurements: tuple[Measurement, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The measurements without their samples."""
        measurements = [measurement.to_json() for measurement in self.measurements]
        return {"model": self.model, "fingerprint": self.fingerprint, "measurements": measurements}

    def find(self, evaluator: str, data: str) -> Measurement | None:
        """Its measurement by this evaluator on this set, None if there is none."""
        for measurement in self.measurements:
            if (measurement.evaluator, measurement.data) == (evaluator, data):
                return measurement
        return None


@dataclass(frozen=True, kw_only=True)
class ValueDifference(Result):
    """A value of the second model less that of the first, on the same samples.

    low, high: the 95% interval of the difference; None where the models' samples are not the same.
    p, test: of the paired permutation test of a mean (`paired_difference`), exact or over random exchanges; of a value
        that is no mean, from paired resamples (`paired_statistic_difference`).
    adjusted_p: p by Holm's method among the main values (the first of each evaluator on each set) of all models
        compared; None for other values, which say more of the same.
    """

    evaluator: str
    data: str
    value: str
    first: str
    second: str
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    test: Literal["exact", "permutation", "bootstrap"] | None = None
    adjusted_p: float | None = None

    @property
    def is_significant(self) -> bool:
        """The adjusted p is below 0.05."""
        return self.adjusted_p is not None and self.adjusted_p < SIGNIFICANCE_LEVEL


@dataclass(frozen=True, kw_only=True)
class Comparison(Result):
    """Models with their measurements; the differences of each from the first one, the baseline."""

    models: tuple[ModelMeasurements, ...]
    differences: tuple[ValueDifference, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All but the samples."""
        models = [model.to_json() for model in self.models]
        differences = [json_values(asdict(difference)) for difference in self.differences]
        return {"models": models, "differences": differences}

    def find(self, evaluator: str, data: str, value: str, second: str) -> ValueDifference | None:
        """The difference of a model from the first one in a value, None if there is none."""
        for entry in self.differences:
            if (entry.evaluator, entry.data, entry.value, entry.second) == (evaluator, data, value, second):
                return entry
        return None

    def measured(self) -> list[tuple[str, str]]:
        """Evaluator and data set of each measurement of any model, in order."""
        pairs: dict[tuple[str, str], None] = {}
        for model in self.models:
            for measurement in model.measurements:
                pairs.setdefault((measurement.evaluator, measurement.data))
        return list(pairs)


def compare(models: Sequence[ModelMeasurements], *, rng: np.random.Generator) -> Comparison:
    """The models with intervals of their values, and the difference of each from the first, with Holm's correction.

    Raises:
        UsageError: two models have the same name, or measured the same set by name on different images.
    """
    names = [model.model for model in models]
    if len(set(names)) < len(names):
        raise UsageError(
            f"Models of the same name cannot be told apart: {', '.join(names)}; rename one of the folders."
        )
    # intervals first: a report shows them beside differences, and they draw from the same generator in a fixed order
    complete: list[ModelMeasurements] = []
    for model in models:
        measurements = tuple(with_intervals(measurement, rng=rng) for measurement in model.measurements)
        complete.append(replace(model, measurements=measurements))
    differences: list[ValueDifference] = []
    for model in complete[1:]:
        differences += _differences_of(complete[0], model, rng)
    return Comparison(models=tuple(complete), differences=tuple(_adjusted(differences, complete[0])))


def with_intervals(measurement: Measurement, *, rng: np.random.Generator) -> Measurement:
    """The measurement with the interval of each value that has a column of samples and none yet."""
    values: dict[str, Value] = {}
    for name, value in measurement.values.items():
        outcomes = sample_outcomes(measurement, name)
        # an evaluator's own interval stays: it may cover more, such as the choice of training images
        if outcomes is not None and value.low is None and value.high is None:
            keys, column = outcomes
            interval = mean_interval(column, rng=rng, clusters=_clusters(keys), share=is_share(name))
            value = replace(value, low=interval.low, high=interval.high)
        values[name] = value
    return replace(measurement, values=values)


def sample_outcomes(measurement: Measurement, value: str) -> tuple[pa.ChunkedArray, Float64[Array, " N"]] | None:
    """Keys and outcomes of the samples a value is the mean of; None if it is no such mean, or there is no sample."""
    samples = measurement.samples
    if samples is None or value not in samples.column_names:
        return None
    column = samples[value]
    present = column.is_valid()
    keys = samples[KEY].filter(present).cast(pa.string())
    return (keys, _floats(column.filter(present))) if len(keys) else None


def is_share(value: str) -> bool:
    """Whether a value, by its name, lies in [0, 1] and is shown in percent: all but ranks, CIDEr and CLIP scores.

    >>> is_share("recall@5"), is_share("de/text_to_image_median_rank"), is_share("mean_reciprocal_rank")
    (True, False, True)
    """
    name = value.rpartition("/")[2].lower().replace(" ", "_")
    is_rank = name.endswith("rank") and "reciprocal" not in name
    # CIDEr goes to 10, and the CLIP score is 2.5 times a cosine
    return not is_rank and "cider" not in name and "clip_score" not in name


def format_figure(name: str, figure: float | None) -> str:
    """A figure in the unit of the value of this name.

    >>> format_figure("top1", 0.4123), format_figure("median_rank", 2.0)
    ('41.2%', '2')
    """
    if figure is None or not np.isfinite(figure):
        return "–"
    return f"{figure:.1%}" if is_share(name) else f"{figure:,.4g}"


def format_value(name: str, value: Value) -> str:
    """A value with half of its interval's width, or the other end of an interval that ends at the value.

    >>> format_value("top1", Value(value=0.4123, low=0.398, high=0.428)), format_value("median_rank", Value(value=2.0))
    ('41.2% ±1.5', '2')
    >>> format_value("top1", Value(value=1.0, low=0.832, high=1.0))
    '100.0% ≥83.2'
    """
    return f"{format_figure(name, value.value)} {format_spread(name, value)}".strip()


def format_spread(name: str, value: Value) -> str:
    """The part of `format_value` after the figure; empty where there is no interval."""
    if value.low is None or value.high is None:
        return ""
    scale = 100 if is_share(name) else 1
    digits = ".1f" if is_share(name) else ",.2g"
    # half the width would place such an interval around a value that it ends at
    if is_share(name) and value.low < value.high == value.value:
        return f"≥{format(scale * value.low, digits)}"
    if is_share(name) and value.high > value.low == value.value:
        return f"≤{format(scale * value.high, digits)}"
    return f"±{format(scale * ((value.high - value.low) / 2), digits)}"


def format_range(name: str, low: float | None, high: float | None) -> str:
    """The ends of an interval; empty where there is none.

    >>> format_range("top1", 0.398, 0.427), format_range("top1", -0.01, 0.02)
    ('39.8 to 42.7', '−1.0 to 2.0')
    """
    if low is None or high is None:
        return ""
    ends = [f"{100 * end:.1f}" if is_share(name) else f"{end:,.4g}" for end in (low, high)]
    return " to ".join(ends).replace("-", "−")


def format_difference(name: str, difference: float) -> str:
    """A difference with its sign, in percentage points for shares.

    >>> format_difference("top1", -0.021), format_difference("median_rank", 1.5)
    ('−2.1', '+1.5')
    """
    shown = f"{100 * difference:+.1f}" if is_share(name) else f"{difference:+,.4g}"
    return shown.replace("-", "−")


def _differences_of(
    first: ModelMeasurements, second: ModelMeasurements, rng: np.random.Generator
) -> Iterator[ValueDifference]:
    for measurement in second.measurements:
        baseline = first.find(measurement.evaluator, measurement.data)
        if baseline is None:
            continue
        # a name is no proof: one folder may have grown between the two evaluations
        if baseline.data_digest != measurement.data_digest:
            raise UsageError(
                f"{first.model} and {second.model} were measured on different images of {measurement.data!r} "
                f"({baseline.data_digest} and {measurement.data_digest}): evaluate both on the same set."
            )
        for name, value in measurement.values.items():
            if name in baseline.values:
                entry = ValueDifference(
                    evaluator=measurement.evaluator,
                    data=measurement.data,
                    value=name,
                    first=first.model,
                    second=second.model,
                    difference=value.value - baseline.values[name].value,
                )
                yield _with_test(entry, baseline, measurement, rng)


def _with_test(
    entry: ValueDifference, first: Measurement, second: Measurement, rng: np.random.Generator
) -> ValueDifference:
    first_outcomes = sample_outcomes(first, entry.value)
    second_outcomes = sample_outcomes(second, entry.value)
    if first_outcomes is None or second_outcomes is None:
        return _with_resampled(entry, first, second, rng)
    first_keys, first_values = first_outcomes
    second_keys, second_values = second_outcomes
    first_rows, second_rows = _shared_rows(first_keys, second_keys)
    # a test on other samples than those of the two values would say something else than the difference does
    if len(first_rows) < max(len(first_keys), len(second_keys)):
        return entry
    keys = first_keys.take(pa.array(first_rows))
    tested = paired_difference(first_values[first_rows], second_values[second_rows], rng=rng, clusters=_clusters(keys))
    return replace(entry, low=tested.low, high=tested.high, p=tested.p, test=tested.test)


def _with_resampled(
    entry: ValueDifference, first: Measurement, second: Measurement, rng: np.random.Generator
) -> ValueDifference:
    """The difference of a value that is no mean, where both models' tables have the same rows."""
    of_first = first.statistics.get(entry.value)
    of_second = second.statistics.get(entry.value)
    if of_first is None or of_second is None or first.samples is None or second.samples is None:
        return entry
    keys = first.samples[KEY].cast(pa.string())
    # resamples are drawn by row number, so both tables must have the same rows in the same order
    if not len(keys) or not keys.equals(second.samples[KEY].cast(pa.string())):
        return entry
    tested = paired_statistic_difference(
        of_first.of_counts,
        of_second.of_counts,
        len(keys),
        rng=rng,
        clusters=_clusters(keys),
        resamples=min(of_first.resamples, of_second.resamples),
        is_biased=of_first.is_biased or of_second.is_biased,
    )
    return replace(entry, low=tested.low, high=tested.high, p=tested.p, test=tested.test)


def _adjusted(differences: Sequence[ValueDifference], baseline: ModelMeasurements) -> Iterator[ValueDifference]:
    """With Holm's p of the main values."""
    numbers: list[int] = []
    p_values: list[float] = []
    for number, entry in enumerate(differences):
        measurement = baseline.find(entry.evaluator, entry.data)
        # tests of every value would need a correction so strict that nothing is significant any more
        is_main = measurement is not None and next(iter(measurement.values)) == entry.value
        if is_main and entry.p is not None:
            numbers.append(number)
            p_values.append(entry.p)
    adjusted = dict(zip(numbers, holm(p_values), strict=True))
    for number, entry in enumerate(differences):
        yield replace(entry, adjusted_p=adjusted.get(number))


def _shared_rows(first: pa.ChunkedArray, second: pa.ChunkedArray) -> tuple[Int64[Array, " M"], Int64[Array, " M"]]:
    """Rows of both with the same key: of several rows of one key the first with the first, and so on."""
    if first.equals(second):
        rows = np.arange(len(first))
        return rows, rows
    # keys repeat where an image has several rows, so each is numbered within its key
    row_of = {name: row for row, name in enumerate(_numbered(first.to_pylist()))}
    first_rows: list[int] = []
    second_rows: list[int] = []
    for row, name in enumerate(_numbered(second.to_pylist())):
        if name in row_of:
            first_rows.append(row_of[name])
            second_rows.append(row)
    return np.array(first_rows, np.int64), np.array(second_rows, np.int64)


def _numbered(keys: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Each key with how often it came before."""
    times: dict[str, int] = {}
    for key in keys:
        yield key, times.get(key, 0)
        times[key] = times.get(key, 0) + 1


def _clusters(keys: pa.ChunkedArray) -> Int64[Array, " N"] | None:
    """A number for each row, the same for rows of the same image; None where each row is another image."""
    codes = keys.dictionary_encode().combine_chunks()
    return None if len(codes.dictionary) == len(keys) else codes.indices.to_numpy().astype(np.int64)


def _floats(column: pa.ChunkedArray) -> Float64[Array, " N"]:
    return column.cast(pa.float64()).to_numpy()
