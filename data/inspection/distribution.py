"""Distribution summaries: minimum, median, maximum and a histogram of image sizes, caption lengths and the like."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

BINS = 24


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Minimum, median and maximum of some numbers, and their histogram.

    edges: bounds of the bins, one more than there are counts; bins of whole numbers exclude their upper bound.
    is_log: the bins grow by a constant factor and the numbers need not be whole.
    """

    least: float
    median: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    is_log: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether all numbers are equal."""
        return self.least == self.most

    def bin_bounds(self, number: int) -> tuple[float, float]:
        """The first and the last number of a bin.

        >>> distribution_of_counts({10: 1, 57: 2}).bin_bounds(1)
        (12, 13)
        """
        first, end = self.edges[number], self.edges[number + 1]
        return first, end if self.is_log else end - 1


def distribution_of_counts(counts: Mapping[int, int], *, bins: int = BINS) -> Distribution:
    """The distribution of whole numbers, given how often each occurs, in bins of whole width.

    >>> distribution_of_counts({1: 2, 2: 1, 4: 1}).median
    1.5
    """
    values = np.array(sorted(counts), dtype=np.int64)
    weights = np.array([counts[value] for value in values.tolist()], dtype=np.int64)
    least, most = int(values[0]), int(values[-1])
    # rounded up: whole numbers need bins of whole width, or some bins would hold one number more than others
    width = -(-(most - least + 1) // bins)
    edges = np.arange(least, most + width + 1, width)
    histogram, _ = np.histogram(values, bins=edges, weights=weights)

    # of an even number of values the median is the mean of the two in the middle
    cumulative = np.cumsum(weights)
    total = cumulative[-1]
    middle = values[np.searchsorted(cumulative, [(total + 1) // 2, total // 2 + 1])]
    return Distribution(
        least=least,
        median=float(middle.mean()),
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(histogram.astype(np.int64).tolist()),
    )


def log_distribution(values: np.ndarray, *, bins: int = BINS) -> Distribution:
    """The distribution of numbers above 0, in bins that grow by a constant factor.

    >>> log_distribution(np.array([1.0, 2.0, 4.0, 8.0]), bins=3).counts
    (1, 1, 2)
    """
    least, most = float(values.min()), float(values.max())
    if least == most:
        edges, histogram = np.array([least, most]), np.array([len(values)])
    else:
        edges = np.geomspace(least, most, bins + 1)
        # geomspace rounds; a value at either end must not fall outside
        edges[0], edges[-1] = least, most
        histogram, _ = np.histogram(values, bins=edges)
    return Distribution(
        least=least,
        median=float(np.median(values)),
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(histogram.tolist()),
        is_log=True,
    )
