"""Confidence intervals: over seeds, over queries, and of a ratio of means."""

from collections.abc import Hashable, Sequence
from math import exp, log, sqrt
from statistics import mean, stdev

import numpy as np

# quantile 0.975 of Student's t by degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_DRAWS = 2000


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% t-interval of the mean, t·s/√n; None for a single value.

    >>> round(half_width([1.0, 2.0, 3.0]), 3)
    2.484
    """
    if len(values) < 2:
        return None
    return quantile(len(values) - 1) * stdev(values) / sqrt(len(values))


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the ratio of the means of independent runs; None if a side has a single run or none above 0.

    A t-interval of the difference of the logarithms of the means (delta method), with the degrees of freedom of the
    side with fewer runs, which are never more than Welch's.
    """
    if min(len(ours), len(theirs)) < 2 or not mean(ours) > 0 < mean(theirs):
        return None
    variance = sum(stdev(side) ** 2 / len(side) / mean(side) ** 2 for side in (ours, theirs))
    middle = log(mean(ours) / mean(theirs))
    reach = quantile(min(len(ours), len(theirs)) - 1) * sqrt(variance)
    return exp(middle - reach), exp(middle + reach)


def quantile(degrees: int) -> float:
    """Quantile 0.975 of Student's t; beyond the table that of its last entry, which is slightly too wide."""
    return _T[min(degrees, len(_T)) - 1]


def bootstrap_interval(
    hits: np.ndarray, groups: Sequence[Hashable], generator: np.random.Generator
) -> tuple[float, float]:
    """95% percentile interval of the mean of hits [Q] over resamples of whole groups of correlated queries."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    places = np.array([numbers[group] for group in groups])
    sums, counts = np.bincount(places, weights=hits), np.bincount(places)
    drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=_DRAWS)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), (0.025, 0.975))
    return float(low), float(high)
