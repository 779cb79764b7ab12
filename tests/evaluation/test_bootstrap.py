import itertools
import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from vlm.errors import UsageError
from vlm.evaluation.bootstrap import (
    holm,
    mean_interval,
    paired_difference,
    paired_statistic_difference,
    statistic_interval,
    weighted_median,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def all_resampled_means(sums, sizes):
    """Means of every set of as many units drawn with replacement, all equally likely."""
    numbers = range(len(sums))
    return np.array(
        [
            sum(sums[i] for i in drawn) / sum(sizes[i] for i in drawn)
            for drawn in itertools.product(numbers, repeat=len(sums))
        ]
    )


@pytest.mark.parametrize("outcomes", [[1, 0, 0, 1, 1, 0, 1, 1] * 25, list(np.linspace(0, 3, 120) ** 3)])
def test_intervals_of_means_agree_with_scipy(outcomes):
    values = np.array(outcomes, np.float64)
    ours = mean_interval(values, rng=rng(), resamples=40_000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=40_000, method="percentile", rng=rng(1), batch=1000)
    # quantiles of a stepped distribution may lie one step apart
    tolerance = max(0.03 * (ours.high - ours.low), (np.diff(np.unique(values)).max() + 1e-9) / len(values))
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)


def test_intervals_of_other_statistics_agree_with_scipy():
    values = rng(3).lognormal(size=151)
    ours = statistic_interval(lambda counts: weighted_median(values, counts), 151, rng=rng(), resamples=20_000)
    theirs = stats.bootstrap((values,), np.median, n_resamples=20_000, method="percentile", rng=rng(1), batch=1000)
    assert ours.value == np.median(values)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.02)


@pytest.mark.parametrize(
    ("values", "clusters"),
    [
        ([0.0, 1.0, 5.0, 2.0, 2.5], None),
        ([0.0, 1.0, 1.0, 0.0, 3.0, 2.0, 2.0], [0, 0, 0, 1, 2, 2, 3]),
        ([1, 0, 1, 1, 0, 1], ["dog", "cat", "dog", "dog", "cat", "cow"]),
    ],
)
@pytest.mark.parametrize("confidence", [0.5, 0.8])
def test_small_sets_give_the_quantiles_of_all_their_resampled_sets(values, clusters, confidence):
    units = {}
    for value, cluster in zip(values, clusters or range(len(values)), strict=True):
        units.setdefault(cluster, []).append(value)
    every = all_resampled_means([sum(unit) for unit in units.values()], [len(unit) for unit in units.values()])
    interval = mean_interval(np.array(values), rng=rng(), clusters=clusters, confidence=confidence, resamples=20_000)
    # a quantile of a stepped distribution lies between those of slightly other levels
    for end, level in ((interval.low, (1 - confidence) / 2), (interval.high, (1 + confidence) / 2)):
        assert np.quantile(every, level - 0.015, method="lower") - 1e-9 <= end
        assert end <= np.quantile(every, level + 0.015, method="higher") + 1e-9


def test_kinds_of_equal_images_are_drawn_as_single_images_are():
    """400 images of few kinds take the short way; a tiny difference of each makes them take the long one."""
    clusters = np.repeat(np.arange(400), 5)
    values = (rng(5).random(2000) < np.repeat(rng(6).random(400), 5)).astype(np.float64)
    short = mean_interval(values, rng=rng(), clusters=clusters, resamples=40_000)
    long = mean_interval(values + 1e-7 * rng(7).random(2000), rng=rng(1), clusters=clusters, resamples=40_000)
    assert (short.low, short.high) == pytest.approx((long.low, long.high), abs=0.001)


def test_intervals_cover_the_truth_as_often_as_they_say():
    covered = 0
    for seed in range(400):
        generator = rng(seed)
        rates = generator.beta(1, 1, size=150)
        values = generator.random((150, 5)) < rates[:, None]
        interval = mean_interval(values.ravel(), rng=generator, clusters=np.repeat(np.arange(150), 5), resamples=1000)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.92 <= covered / 400 <= 0.975


def test_captions_of_an_image_drawn_apart_would_promise_too_much():
    values = np.repeat(rng(1).random(200) < 0.5, 5)
    apart = mean_interval(values, rng=rng())
    together = mean_interval(values, rng=rng(), clusters=np.repeat(np.arange(200), 5))
    assert together.half_width / apart.half_width == pytest.approx(np.sqrt(5), rel=0.05)


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly():
    values = rng().random(300)
    assert mean_interval(values, rng=rng(4)) == mean_interval(values, rng=rng(4))
    assert mean_interval(values, rng=rng(4)) != mean_interval(values, rng=rng(5))
    assert mean_interval(values, rng=rng(4)).low == pytest.approx(mean_interval(values, rng=rng(5)).low, abs=0.002)


@pytest.mark.parametrize("right", [True, False])
def test_a_perfect_score_of_few_images_is_not_called_certain(right):
    interval = mean_interval(np.full(20, right), rng=rng())
    exact = stats.binomtest(20 * right, 20).proportion_ci(0.95, "exact")
    assert interval.value == float(right)
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high))
    assert mean_interval(np.full(20, float(right)), rng=rng(), share=True) == interval
    # mean ranks of 1 are no shares
    ranks = mean_interval(np.ones(20), rng=rng())
    assert (ranks.low, ranks.high) == (1, 1)


def test_one_image_has_no_interval():
    single = mean_interval(np.array([1.0, 0.0]), rng=rng(), clusters=["a", "a"])
    assert (single.value, single.low, single.high, single.half_width) == (0.5, None, None, None)
    median = statistic_interval(lambda counts: weighted_median(np.array([4.0]), counts), 1, rng=rng())
    assert (median.value, median.low, median.high) == (4.0, None, None)


def test_draws_without_a_figure_are_left_out():
    positive = np.array([True] + [False] * 9)

    def share_of_positives_found(counts):
        with np.errstate(invalid="ignore"):
            return (counts * positive).sum(axis=1) / (counts * positive).sum(axis=1)

    interval = statistic_interval(share_of_positives_found, 10, rng=rng())
    assert (interval.value, interval.low, interval.high) == (1, 1, 1)
    nowhere = statistic_interval(lambda counts: np.full(len(counts), np.nan), 10, rng=rng())
    assert (nowhere.low, nowhere.high) == (None, None)


@pytest.mark.parametrize(
    ("difference", "clusters"),
    [
        ([1, -1, 1, 1, 1, 0, 0, 1], None),
        ([0.5, -0.2, 0.3, 0.1, 0.7, -0.1, 0.3], None),
        ([1, 1, -1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        ([0, 0, 0], None),
        ([1, -1], None),
    ],
)
def test_p_of_few_samples_is_that_of_all_exchanges(difference, clusters):
    clusters = clusters or list(range(len(difference)))
    sums = np.bincount(clusters, difference)
    totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    expected = np.mean(np.array(totals) >= abs(sums.sum()) - 1e-12)
    result = paired_difference(np.zeros(len(difference)), np.array(difference, float), rng=rng(), clusters=clusters)
    assert result.difference == pytest.approx(np.mean(difference))
    assert (result.p, result.test) == (pytest.approx(expected), "exact")


@pytest.mark.parametrize(("gains", "losses"), [(30, 12), (1500, 1400), (5000, 100), (7, 7), (1, 0)])
def test_outcomes_have_the_p_of_mcnemars_exact_test(gains, losses):
    first = np.array([False] * gains + [True] * losses + [True] * 50)
    second = np.array([True] * gains + [False] * losses + [True] * 50)
    result = paired_difference(first, second, rng=rng())
    assert result.p == pytest.approx(stats.binomtest(gains, gains + losses).pvalue, rel=1e-6)
    assert result.low <= result.difference <= result.high


@pytest.mark.parametrize("kinds", ["continuous", "few"])
def test_p_of_many_samples_agrees_with_scipy(kinds):
    difference = rng(8).normal(0.12, 1, size=300)
    if kinds == "few":
        difference = np.round(2 * difference) / 2
    ours = paired_difference(np.zeros(300), difference, rng=rng(), resamples=8_000)
    theirs = stats.permutation_test(
        (difference, np.zeros(300)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        n_resamples=8_000,
        rng=rng(1),
        vectorized=True,
    )
    assert ours.test == "permutation"
    assert 0.01 < theirs.pvalue < 0.3
    assert ours.p == pytest.approx(theirs.pvalue, abs=0.015)


def test_equal_models_are_called_different_as_often_as_the_level_says():
    p_values = []
    for seed in range(400):
        generator = rng(seed)
        shared = generator.random(120) < 0.5
        first = shared ^ (generator.random(120) < 0.2)
        second = shared ^ (generator.random(120) < 0.2)
        p_values.append(paired_difference(first, second, rng=generator, resamples=200).p)
    assert np.mean(np.array(p_values) < 0.05) < 0.06


def test_statistics_of_two_models_are_compared_on_the_same_draws():
    ranks = rng(2).integers(1, 40, size=300).astype(float)
    better = paired_statistic_difference(
        lambda counts: weighted_median(ranks, counts),
        lambda counts: weighted_median(ranks - 0.5, counts),
        300,
        rng=rng(),
    )
    assert (better.difference, better.test) == (-0.5, "bootstrap")
    assert (better.low, better.high) == (-0.5, -0.5)
    assert better.p == pytest.approx(2 / 2001)
    equal = paired_statistic_difference(
        lambda counts: weighted_median(ranks, counts), lambda counts: weighted_median(ranks, counts), 300, rng=rng()
    )
    assert (equal.difference, equal.p) == (0, 1)


def test_weighted_medians_are_those_of_repeated_values():
    generator = rng()
    values = generator.integers(0, 9, size=7)
    counts = generator.integers(0, 4, size=(200, 7))
    counts[:, 0] += 1
    expected = [np.median(np.repeat(values, row)) for row in counts]
    np.testing.assert_array_equal(weighted_median(values, counts), expected)


def test_holm_is_the_step_down_of_the_paper():
    # with the closed testing principle as the slow version: the largest Bonferroni p of all sets that hold the test
    p_values = list(rng().random(5) ** 3)
    for number, adjusted in enumerate(holm(p_values)):
        sets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size) if number in s]
        assert adjusted == pytest.approx(max(min(1, len(s) * min(p_values[i] for i in s)) for s in sets))
    assert holm([]) == []


def test_ten_thousand_draws_of_a_hundred_thousand_samples_take_little_memory_and_seconds():
    outcomes = rng().random(100_000) < 0.3
    began = time.process_time()
    mean_interval(outcomes, rng=rng())
    assert time.process_time() - began < 2
    tracemalloc.start()
    mean_interval(rng().random(100_000), rng=rng(), resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(np.array([]), rng=rng()), "no samples"),
        (lambda: mean_interval(np.array([1.0, np.nan]), rng=rng()), "1 of 2 values are not finite"),
        (lambda: mean_interval(np.ones(3), rng=rng(), clusters=[1, 2]), "2 clusters for 3 values"),
        (lambda: mean_interval(np.ones(3), rng=rng(), confidence=95), "confidence of 95 lies outside"),
        (lambda: mean_interval(np.ones(3), rng=rng(), resamples=0), "0 resamples are too few"),
        (lambda: paired_difference(np.ones(3), np.ones(2), rng=rng()), "3 and 2 values cannot be paired"),
    ],
)
def test_what_has_no_interval_is_said(call, message):
    with pytest.raises(UsageError, match=message):
        call()
