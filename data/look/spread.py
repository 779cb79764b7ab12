"""How numbers are spread: least, median, most, and a histogram."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

BINS = 24


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How numbers are spread; `edges` are the bounds of the bins whose sizes `counts` gives.

    is_log: the bins grow by a constant factor and the numbers need not be whole.
    """

    least: float
    median: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    is_log: bool = False


def spread(values: np.ndarray, *, bins: int = BINS) -> Spread:
    """The spread of whole numbers, in bins of whole width.

    >>> spread(np.array([1, 1, 2, 4])).counts
    (2, 1, 0, 1)
    """
    distinct, times = np.unique(values, return_counts=True)
    return spread_counts(dict(zip(distinct.tolist(), times.tolist(), strict=True)), bins=bins)


def spread_counts(times: Mapping[int, int], *, bins: int = BINS) -> Spread:
    """The spread of whole numbers, given as how often each occurs.

    >>> spread_counts({1: 2, 2: 1, 4: 1}).median
    1.5
    """
    values = np.array(sorted(times), dtype=np.int64)
    weights = np.array([times[value] for value in values.tolist()], dtype=np.int64)
    least, most = int(values[0]), int(values[-1])
    width = -(-(most - least + 1) // bins)
    edges = np.arange(least, most + width + 1, width)
    counts, _ = np.histogram(values, bins=edges, weights=weights)
    upto = np.cumsum(weights)
    middles = values[np.searchsorted(upto, [(upto[-1] + 1) // 2, upto[-1] // 2 + 1])]
    return Spread(
        least=least,
        median=float(middles.mean()),
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.astype(np.int64).tolist()),
    )


def log_spread(values: np.ndarray, *, bins: int = BINS) -> Spread:
    """The spread of numbers above 0, in bins that grow by a constant factor.

    >>> log_spread(np.array([1.0, 2.0, 4.0, 8.0]), bins=3).counts
    (1, 1, 2)
    """
    least, most = float(values.min()), float(values.max())
    edges = np.geomspace(least, most, bins + 1) if most > least else np.array([least, least])
    edges[0], edges[-1] = least, most
    counts, _ = np.histogram(values, bins=edges) if most > least else ([len(values)], None)
    return Spread(
        least=least,
        median=float(np.median(values)),
        most=most,
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(count) for count in counts),
        is_log=True,
    )


class BoundedCounter:
    """How often values occur, for no more than `limit` different ones: past it the rarer half is forgotten.

    Frequent values keep their place; once something was forgotten, `is_exact` is False and the rarer counts are
    lower bounds.
    """

    def __init__(self, limit: int = 50_000) -> None:
        self._limit, self._times = limit, Counter[str]()
        self.is_exact = True

    def add(self, value: str) -> None:
        """Count one."""
        self._times[value] += 1
        if len(self._times) > self._limit:
            self._times = Counter(dict(self._times.most_common(self._limit // 2)))
            self.is_exact = False

    def __len__(self) -> int:
        return len(self._times)

    def most_common(self, number: int) -> dict[str, int]:
        """The most frequent values with their counts; equal ones in the order in which they were met."""
        return dict(self._times.most_common(number))
