"""Intervals of measured figures, and whether one model is better than another: percentile bootstrap, paired tests.

The unit that is drawn is the image. Where an image gives several values, such as one for each of its captions,
`clusters` names the image of every value and they are drawn together; as if they were independent, the interval of
Flickr8k's five captions an image would be too narrow by up to √5.

Randomness comes in as a numpy generator: `np.random.default_rng(seed)`. Memory stays below some 100 MB beyond the
arguments whatever the number of samples.

Sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 (percentile interval) and 15
(permutation); Holm 1979, A simple sequentially rejective multiple test procedure.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlm.errors import UsageError
from vlm.tensor_types import Array, Bool, Float, Float64, Int, Int64, Num

CONFIDENCE = 0.95
# ends of an interval of 10,000 draws move by about a fiftieth of its width from seed to seed
RESAMPLES = 10_000
# a draw of a statistic that is no mean costs as much as the statistic
STATISTIC_RESAMPLES = 2_000
# 32 MB of int64 counts
_NUMBERS_AT_ONCE = 4_000_000
# a kind of a multinomial draw takes about as long as 12 counted numbers, and each call that counts as long as 3,000
_COST_OF_A_KIND = 12
_COST_OF_A_CALL = 3000
# all signs of 13 samples are fewer than RESAMPLES
_EXACT_SAMPLES = 13

Clusters = Sequence[str] | Sequence[int] | Array
"""The image of each value, by key or number."""

Statistic = Callable[[Int64[Array, "B N"]], Float[Array, " B"]]
"""A figure of resampled sets: given how often each of N samples was drawn in each of B sets, B figures; NaN where a
set has none (no positive of a class). All counts 1 are the set itself."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with the ends of its interval; the ends are None where there is no spread to measure: one image."""

    value: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width, for 41.2% ±1.5; the interval itself need not be symmetric."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The second model's figure less the first's on the same samples.

    p: two-sided probability of a difference as large if both models were equally good.
    test: how p was computed. "exact": over all ways to exchange the two models' values of an image; "permutation":
        over random ones; "bootstrap": twice the share of resampled sets in which the difference has the other sign.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    test: Literal["exact", "permutation", "bootstrap"]


def mean_interval(
    values: Num[Array, " N"] | Bool[Array, " N"],
    *,
    rng: np.random.Generator,
    clusters: Clusters | None = None,
    share: bool = False,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean of per-sample values with its percentile bootstrap interval.

    values: for each sample its outcome: right or wrong, hit probability, reciprocal rank, probability of truth.
    clusters: image of each value where an image has several; None draws each value by itself.
    share: values are probabilities or outcomes. Where all are 1, or all 0, no draw differs, and a bootstrap would call
        20 of 20 certain; the interval is then the binomial one (Clopper and Pearson 1934) of as many images. True for
        booleans in any case.

    Raises:
        UsageError: no value, one that is not finite, clusters of another length, or an impossible confidence.

    >>> interval = mean_interval(np.array([True, True, False, True] * 25), rng=np.random.default_rng(0))
    >>> interval.value, round(interval.low, 2), round(interval.high, 2)
    (0.75, 0.66, 0.83)
    """
    _check_options(confidence, resamples)
    units = _units(values, clusters)
    mean = float(units.sums.sum() / units.sizes.sum())
    if len(units.sums) < 2:
        return Interval(value=mean, low=None, high=None)
    if (share or values.dtype == np.bool_) and mean in (0.0, 1.0):
        # the proportion with which so many right answers in a row are as rare as one tail
        bound = ((1 - confidence) / 2) ** (1 / len(units.sums))
        return Interval(value=mean, low=bound if mean else 0.0, high=1.0 if mean else 1 - bound)
    low, high = _ends(_mean_draws(units, rng, resamples), confidence)
    return Interval(value=mean, low=low, high=high)


def statistic_interval(
    statistic: Statistic,
    num_samples: int,
    *,
    rng: np.random.Generator,
    clusters: Clusters | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = STATISTIC_RESAMPLES,
) -> Interval:
    """A figure that is no mean (median rank, mAP, calibration error) with its percentile bootstrap interval.

    statistic: see `Statistic`; `weighted_median` is ready for medians.
    Draws for which the figure is NaN are left out; where all are, the ends are None.

    Raises:
        UsageError: no sample, clusters of another length, or an impossible confidence.

    >>> ranks = np.array([1.0, 1, 2, 3, 50])
    >>> statistic_interval(lambda counts: weighted_median(ranks, counts), 5, rng=np.random.default_rng(0))
    Interval(value=2.0, low=1.0, high=50.0)
    """
    _check_options(confidence, resamples)
    numbers = _cluster_numbers(num_samples, clusters)
    value = float(statistic(np.ones((1, num_samples), np.int64))[0])
    # of a single image every resample is the same
    if numbers.max() == 0:
        return Interval(value=value, low=None, high=None)
    low, high = _ends(_statistic_draws(statistic, numbers, rng, resamples), confidence)
    return Interval(value=value, low=low, high=high)


def paired_difference(
    first: Num[Array, " N"] | Bool[Array, " N"],
    second: Num[Array, " M"] | Bool[Array, " M"],
    *,
    rng: np.random.Generator,
    clusters: Clusters | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Difference:
    """Mean of the second less mean of the first, of two models' values on the same samples.

    The interval is the percentile bootstrap's of the mean difference. p is the paired permutation test's: were the
    models equally good, the two values of each image could as well be exchanged. It is exact for outcomes (where it is
    McNemar's exact test) and for up to 13 images that differ, else over `resamples` random exchanges.

    Raises:
        UsageError: as `mean_interval`, or values of different length.

    >>> round(paired_difference(np.zeros(6), np.ones(6), rng=np.random.default_rng(0)).p, 5)
    0.03125
    """
    _check_options(confidence, resamples)
    if len(first) != len(second):
        raise UsageError(
            f"{len(first):,} and {len(second):,} values cannot be paired: give both models' of each sample."
        )
    units = _units(np.asarray(second, np.float64) - np.asarray(first, np.float64), clusters)
    difference = float(units.sums.sum() / units.sizes.sum())
    p, test = _exchange_p(units.sums, rng, resamples)
    if len(units.sums) < 2:
        return Difference(difference=difference, low=None, high=None, p=p, test=test)
    low, high = _ends(_mean_draws(units, rng, resamples), confidence)
    return Difference(difference=difference, low=low, high=high, p=p, test=test)


def paired_statistic_difference(
    first: Statistic,
    second: Statistic,
    num_samples: int,
    *,
    rng: np.random.Generator,
    clusters: Clusters | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = STATISTIC_RESAMPLES,
    is_biased: bool = False,
) -> Difference:
    """The second figure less the first of two models on the same samples, for figures that are no means.

    Both are computed on the same resampled sets. is_biased: resampling raises the figures, as sums of absolute values;
    the draws are moved so that their mean is the difference itself. p is the bootstrap's, at least 2 / (resamples + 1);
    where no draw has a figure, 1.

    Raises:
        UsageError: as `statistic_interval`.
    """

    def difference(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        return second(counts) - first(counts)

    _check_options(confidence, resamples)
    numbers = _cluster_numbers(num_samples, clusters)
    value = float(difference(np.ones((1, num_samples), np.int64))[0])
    if numbers.max() == 0:
        return Difference(difference=value, low=None, high=None, p=1.0, test="bootstrap")
    draws = _statistic_draws(difference, numbers, rng, resamples)
    defined = draws[~np.isnan(draws)]
    if is_biased and len(defined):
        defined = defined - defined.mean() + value
    # draws of exactly 0 count in both tails, which only makes p larger
    smaller_tail = min((defined <= 0).sum(), (defined >= 0).sum())
    p = min(1.0, 2 * float(smaller_tail + 1) / (len(defined) + 1))
    low, high = _ends(defined, confidence)
    return Difference(difference=value, low=low, high=high, p=p, test="bootstrap")


def weighted_median(values: Num[Array, " N"], counts: Int64[Array, "B N"]) -> Float64[Array, " B"]:
    """Median of the values each taken as often as its count says: the mean of the two in the middle if they are even.

    >>> weighted_median(np.array([3, 1, 2]), np.array([[1, 1, 1], [2, 0, 2]]))
    array([2. , 2.5])
    """
    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values, np.float64)[order]
    # counts in place of repeated values: a thousand resamples share one sort
    reached = np.cumsum(counts[:, order], axis=1)
    total = reached[:, -1:]
    # the first value of which so many are not larger
    lower = np.argmax(reached >= (total + 1) // 2, axis=1)
    upper = np.argmax(reached >= total // 2 + 1, axis=1)
    return (ordered[lower] + ordered[upper]) / 2


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of a table of comparisons, adjusted so that below 0.05 in all the table nothing is by chance at 95%.

    Holm's step-down: the smallest of m times m, the next times m - 1, none below one before, none above 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for position, number in enumerate(order):
        # never below one before: the order of the adjusted values is that of the p values
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[number]))
        adjusted[number] = largest
    return adjusted


@dataclass(frozen=True, kw_only=True)
class _Units:
    """What is drawn, the images: the sum of each one's values and their number."""

    sums: Float64[Array, " U"]
    sizes: Float64[Array, " U"]


def _units(values: Num[Array, " N"] | Bool[Array, " N"], clusters: Clusters | None) -> _Units:
    numbers = _cluster_numbers(len(values), clusters)
    values = np.asarray(values, np.float64)
    not_finite = np.count_nonzero(~np.isfinite(values))
    if not_finite:
        raise UsageError(f"{not_finite:,} of {len(values):,} values are not finite: leave out samples without a value.")
    if clusters is None:
        return _Units(sums=values, sizes=np.ones(len(values)))
    return _Units(sums=np.bincount(numbers, values), sizes=np.bincount(numbers).astype(np.float64))


def _cluster_numbers(num_samples: int, clusters: Clusters | None) -> Int[Array, " N"]:
    """The images of the samples, numbered from 0."""
    if not num_samples:
        raise UsageError("An interval of no samples: evaluate on at least one.")
    if clusters is None:
        return np.arange(num_samples)
    if len(clusters) != num_samples:
        raise UsageError(f"{len(clusters):,} clusters for {num_samples:,} values: give the image of each value.")
    return np.unique(np.asarray(clusters), return_inverse=True)[1]


def _check_options(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise UsageError(f"A confidence of {confidence:g} lies outside 0 to 1: 0.95 is usual.")
    if resamples < 1:
        raise UsageError(f"{resamples} resamples are too few: {RESAMPLES:,} are usual.")


def _ends(draws: Float64[Array, " R"], confidence: float) -> tuple[float, float] | tuple[None, None]:
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return None, None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _mean_draws(units: _Units, rng: np.random.Generator, resamples: int) -> Float64[Array, " R"]:
    """Means of resampled sets.

    Of outcomes, 0 or 1, there are only as many different units as ways to be right. How often each kind is drawn is
    one multinomial draw, exactly as if all units were drawn, in a thousandth of the time.
    """
    num_units = len(units.sums)
    kinds, multiplicity = np.unique(np.stack([units.sums, units.sizes]), axis=1, return_counts=True)
    if _is_multinomial_faster(len(multiplicity), num_units):
        draw_blocks = _kind_counts(multiplicity, rng, resamples)
        sums, sizes = kinds
    else:
        draw_blocks = _unit_counts(num_units, rng, resamples)
        sums = units.sums
        sizes = units.sizes
    # a product with floats is BLAS's, with integers a slow loop
    return np.concatenate([(block @ sums) / (block @ sizes) for block in map(np.float64, draw_blocks)])


def _statistic_draws(
    statistic: Statistic, numbers: Int[Array, " N"], rng: np.random.Generator, resamples: int
) -> Float64[Array, " R"]:
    num_units = int(numbers.max()) + 1
    draws: list[Float[Array, " B"]] = []
    for counts in _unit_counts(num_units, rng, resamples, row_length=max(num_units, len(numbers))):
        draws.append(statistic(counts[:, numbers]))
    return np.concatenate(draws).astype(np.float64)


def _unit_counts(
    num_units: int, rng: np.random.Generator, resamples: int, *, row_length: int = 0
) -> Iterator[Int64[Array, "B U"]]:
    """Blocks of resampled sets: how often each unit is in each. row_length: numbers that a set takes, for memory."""
    if _is_multinomial_faster(num_units, num_units):
        yield from _kind_counts(np.ones(num_units, np.int64), rng, resamples, row_length=row_length)
        return
    for size in _block_sizes(max(num_units, row_length), resamples):
        counts = np.empty((size, num_units), np.int64)
        for row in counts:
            row[:] = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)
        yield counts


def _kind_counts(
    multiplicity: Int64[Array, " G"], rng: np.random.Generator, resamples: int, *, row_length: int = 0
) -> Iterator[Int64[Array, "B G"]]:
    """Blocks of resampled sets: how many units of each kind are in each, of which there are so many."""
    num_units = int(multiplicity.sum())
    for size in _block_sizes(max(len(multiplicity), row_length), resamples):
        yield rng.multinomial(num_units, multiplicity / num_units, size=size)


def _is_multinomial_faster(num_kinds: int, num_units: int) -> bool:
    return num_kinds * _COST_OF_A_KIND < num_units + _COST_OF_A_CALL


def _block_sizes(row_length: int, resamples: int) -> Iterator[int]:
    at_once = max(1, _NUMBERS_AT_ONCE // row_length)
    for first in range(0, resamples, at_once):
        yield min(at_once, resamples - first)


def _exchange_p(
    differences: Float64[Array, " U"], rng: np.random.Generator, resamples: int
) -> tuple[float, Literal["exact", "permutation"]]:
    """p of the sum of differences whose signs are as likely as not the other way round; differences of 0 have none."""
    sizes = np.abs(differences[differences != 0])
    # equal but for the rounding of sums in another order
    threshold = abs(differences.sum()) - 1e-9 * sizes.sum()
    if threshold <= 0:
        return 1.0, "exact"
    kinds, multiplicity = np.unique(sizes, return_counts=True)
    # all differences of one size: only their signs count, and a binomial gives p at once
    if len(kinds) == 1:
        return _sign_test_p(len(sizes), round(abs(float(differences.sum())) / float(kinds[0]))), "exact"
    # few enough to go through every assignment of signs, one a row of bits
    if len(sizes) <= _EXACT_SAMPLES:
        bits = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ sizes) >= threshold)), "exact"
    as_large = 0
    if _is_multinomial_faster(len(kinds), len(sizes)):
        for size in _block_sizes(len(kinds), resamples):
            # exchanges of equal differences are alike: only how many are positive matters
            positive = rng.binomial(multiplicity, 0.5, size=(size, len(kinds)))
            as_large += int(np.count_nonzero(np.abs((2.0 * positive - multiplicity) @ kinds) >= threshold))
    else:
        for size in _block_sizes(len(sizes), resamples):
            # a bit a sign, drawn as bytes, which is many times faster than a number a sign
            bits = np.frombuffer(rng.bytes(size * -(-len(sizes) // 8)), np.uint8).reshape(size, -1)
            signs = np.unpackbits(bits, axis=1, count=len(sizes)).astype(np.float64) * 2 - 1
            as_large += int(np.count_nonzero(np.abs(signs @ sizes) >= threshold))
    # the observed arrangement counts as one of them, so that no p is 0 (Phipson and Smyth 2010)
    return (as_large + 1) / (resamples + 1), "permutation"


def _sign_test_p(num_signs: int, excess: int) -> float:
    """Probability that of so many fair signs one kind exceeds the other by at least the excess, which is above 0."""
    # in logarithms, for 2 ** -1100 is 0: log C(n, k) = Σ log((n - i) / (i + 1))
    positions = np.arange(num_signs)
    logarithms = np.concatenate([[0.0], np.cumsum(np.log(num_signs - positions) - np.log(positions + 1))])
    tail = logarithms[(num_signs + excess + 1) // 2 :] - num_signs * np.log(2.0)
    return min(1.0, 2 * float(np.exp(tail).sum()))
