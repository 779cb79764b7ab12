"""What evaluators give: named values with intervals, and the outcome of each sample they were computed from.

An evaluator is a frozen dataclass with a name and `run(model, data)`; it is used alone, during training, and by suites.

Values that are no means over samples (medians, means of classes, calibration errors, precisions) are functions of how
often every row of a table of samples counts: two models' differences in them are resampled with these. All take the
rows of the table that they are of, so that several may share one table; where a resampled set holds none of these rows
the figure is NaN.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from vlm.evaluation.bootstrap import STATISTIC_RESAMPLES, Statistic, weighted_median
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel
from vlm.results import Result, json_values
from vlm.tensor_types import Array, Bool, Float, Int, Int64


@dataclass(frozen=True, kw_only=True)
class SampleStatistic:
    """A value as a function of how often each row of the samples counts.

    resamples: as many as its cost allows. is_biased: sums of absolute values, which resampling raises; its draws are
        moved so that their mean is the value itself.
    """

    of_counts: Statistic
    resamples: int = STATISTIC_RESAMPLES
    is_biased: bool = False


def median_of(values: Float[Array, " M"], rows: Int64[Array, " M"], *, resamples: int) -> SampleStatistic:
    """The median of values that stand in these rows."""

    def median(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        drawn = counts[:, rows]
        # a resample may hold none of these rows
        return np.where(drawn.any(axis=1), weighted_median(values, drawn), np.nan)

    return SampleStatistic(of_counts=median, resamples=resamples)


def mean_of_groups(
    outcomes: Float[Array, " M"] | Bool[Array, " M"], groups: Int[Array, " M"], rows: Int64[Array, " M"]
) -> SampleStatistic:
    """The mean over groups (classes, categories) of their mean outcome; groups that a set lacks are left out of it."""
    # sorted, so that each group is one run and all groups of all resamples are summed in one call
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order][0] - 1))
    ordered = np.asarray(outcomes, np.float64)[order]

    def mean(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        drawn = counts[:, rows[order]]
        totals = np.add.reduceat(drawn, starts, axis=1)
        sums = np.add.reduceat(drawn * ordered, starts, axis=1)
        means = sums / np.maximum(totals, 1)
        return _quotient(means.sum(axis=1), np.count_nonzero(totals, axis=1))

    return SampleStatistic(of_counts=mean)


def sum_of_gaps(gaps: Float[Array, " M"], bins: Int[Array, " M"], rows: Int64[Array, " M"]) -> SampleStatistic:
    """The expected calibration error: the sum over bins of the absolute sum of their gaps, as a share of all rows.

    gaps: probability less outcome.
    """
    order = np.argsort(bins, kind="stable")
    starts = np.flatnonzero(np.diff(bins[order], prepend=-1))

    def error(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        drawn = counts[:, rows[order]]
        sums = np.add.reduceat(drawn * gaps[order], starts, axis=1)
        return _quotient(np.abs(sums).sum(axis=1), drawn.sum(axis=1))

    # absolute sums grow with noise, and resampling adds some
    return SampleStatistic(of_counts=error, is_biased=True)


def ratio_of(numerators: Float[Array, " N"], denominators: Float[Array, " N"]) -> SampleStatistic:
    """The sum of one column over that of another, NaN where that is not above 0."""

    def ratio(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        return _quotient(counts @ numerators, counts @ denominators)

    return SampleStatistic(of_counts=ratio)


def figure_of_two_groups(
    figure: Callable[[Float[Array, " A"], Float[Array, " M"]], float],
    scores: Float[Array, " N"],
    is_first: Bool[Array, " N"],
    is_second: Bool[Array, " N"],
    *,
    resamples: int,
) -> SampleStatistic:
    """A figure of the scores of two groups of rows (AUROC), each as often as its row counts."""

    def of_counts(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        figures = np.full(len(counts), np.nan)
        for number, drawn in enumerate(counts):
            first = np.repeat(scores[is_first], drawn[is_first])
            second = np.repeat(scores[is_second], drawn[is_second])
            if len(first) and len(second):
                figures[number] = figure(first, second)
        return figures

    return SampleStatistic(of_counts=of_counts, resamples=resamples)


def _quotient(numerators: Float[Array, " B"], denominators: Array) -> Float[Array, " B"]:
    quotients = np.full(len(numerators), np.nan)
    return np.divide(numerators, denominators, out=quotients, where=denominators > 0)


@dataclass(frozen=True, kw_only=True)
class Value:
    """A figure with its 95% interval and what chance gives; None where there is no such thing."""

    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement(Result):
    """What an evaluator says of a model on a set.

    evaluator, data: their names. data_digest: identity of the images.
    values: by name; the first is the one that stands for all where there is room for one.
    samples: rows with a `key`, the unit of resampling: rows of the same key are drawn together. A value that has the
        name of a column is the mean of that column over the rows in which it is not null; all other columns say more
        of a row (a prediction, its score) and have names of their own.
    statistics: of values that are no such means, how they follow from the rows; for differences between models.
    details: the evaluator's own result, a dataclass. warnings: what the reader should know before he trusts the values.
    """

    evaluator: str
    data: str
    data_digest: str
    num_images: int
    values: dict[str, Value]
    samples: pa.Table | None = None
    statistics: dict[str, SampleStatistic] = field(default_factory=dict, repr=False, compare=False)
    details: Any = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All but the samples, which are kept in tables (Parquet)."""
        is_record = is_dataclass(self.details) and not isinstance(self.details, type)
        return json_values(
            {
                "evaluator": self.evaluator,
                "data": self.data,
                "data_digest": self.data_digest,
                "num_images": self.num_images,
                "values": {name: asdict(value) for name, value in self.values.items()},
                "warnings": self.warnings,
                "details": asdict(self.details) if is_record else None,  # pyright: ignore[reportArgumentType]
            }
        )


@runtime_checkable
class Evaluator(Protocol):
    """One kind of measurement, with its settings.

    name: what its values are filed under, unlike those of the other evaluators of a suite on the same data.
    """

    @property
    def name(self) -> str:
        """As it stands in reports."""
        ...

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model.

        Raises:
            UsageError: the set lacks what it needs: labels, captions.
        """
        ...
