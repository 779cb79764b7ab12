"""Values as functions of how often each row counts, against the same values of the repeated rows themselves."""

import numpy as np
import pyarrow as pa
import pytest

from vlm.evaluation.class_metrics import calibration_bins, measure_calibration
from vlm.evaluation.comparison import ModelMeasurements, compare
from vlm.evaluation.measurement import (
    Measurement,
    Value,
    figure_of_two_groups,
    mean_of_groups,
    median_of,
    ratio_of,
    sum_of_gaps,
)
from vlm.evaluation.rejection import measure_separation

NUM_ROWS = 60
RNG = np.random.default_rng(0)
COUNTS = RNG.integers(0, 3, (7, NUM_ROWS))
# the values stand in every other row of the table
ROWS = np.arange(0, NUM_ROWS, 2)
SCORES = RNG.random(len(ROWS))
HITS = (RNG.random(len(ROWS)) < SCORES).astype(float)
CLASSES = RNG.integers(0, 4, len(ROWS))


def repeated(counts, *columns):
    return [np.repeat(column, counts[ROWS]) for column in columns]


def test_a_median_counts_each_value_as_often_as_its_row():
    ranks = np.round(20 * SCORES)
    statistic = median_of(ranks, ROWS, resamples=100)
    assert statistic.of_counts(COUNTS).tolist() == [np.median(*repeated(counts, ranks)) for counts in COUNTS]
    assert statistic.resamples == 100


def test_a_mean_of_classes_leaves_out_classes_without_rows():
    counts = COUNTS.copy()
    counts[0, ROWS[CLASSES == 2]] = 0
    expected = []
    for row in counts:
        hits, classes = repeated(row, HITS, CLASSES)
        expected.append(np.mean([hits[classes == number].mean() for number in np.unique(classes)]))
    assert mean_of_groups(HITS, CLASSES, ROWS).of_counts(counts) == pytest.approx(np.array(expected))


def test_a_sum_of_gaps_is_the_calibration_error():
    statistic = sum_of_gaps(SCORES - HITS, calibration_bins(SCORES), ROWS)
    expected = [measure_calibration(*repeated(counts, SCORES, HITS)).error for counts in COUNTS]
    assert statistic.of_counts(COUNTS) == pytest.approx(np.array(expected))


def test_a_figure_of_two_groups_takes_the_rows_of_each():
    scores = RNG.random(NUM_ROWS)
    is_inside = np.arange(NUM_ROWS) < 40
    statistic = figure_of_two_groups(
        lambda inside, outside: measure_separation(inside, outside).auroc, scores, is_inside, ~is_inside, resamples=9
    )
    for counts, figure in zip(COUNTS, statistic.of_counts(COUNTS), strict=True):
        inside, outside = np.repeat(scores[:40], counts[:40]), np.repeat(scores[40:], counts[40:])
        assert figure == pytest.approx(measure_separation(inside, outside).auroc)


def test_without_their_rows_figures_are_not_numbers():
    nothing = np.zeros((1, NUM_ROWS), int)
    for statistic in (
        median_of(SCORES, ROWS, resamples=1),
        mean_of_groups(HITS, CLASSES, ROWS),
        sum_of_gaps(SCORES - HITS, calibration_bins(SCORES), ROWS),
        ratio_of(np.ones(NUM_ROWS), np.ones(NUM_ROWS)),
    ):
        assert np.isnan(statistic.of_counts(nothing)).all()


def model_with(name, ranks):
    samples = pa.table({"key": [str(row) for row in range(NUM_ROWS)]})
    measurement = Measurement(
        evaluator="retrieval",
        data="pets",
        data_digest="d",
        num_images=NUM_ROWS,
        values={"median_rank": Value(value=float(np.median(ranks)))},
        samples=samples,
        statistics={"median_rank": median_of(ranks, np.arange(NUM_ROWS), resamples=400)},
    )
    return ModelMeasurements(model=name, measurements=(measurement,))


def test_two_models_medians_differ_on_the_same_resampled_images():
    ranks = RNG.integers(1, 100, NUM_ROWS).astype(float)
    worse = compare([model_with("a", ranks), model_with("b", ranks + 7)], rng=np.random.default_rng(0)).differences[0]
    # whichever images are drawn: were each model's drawn by itself, the interval would be some 30 ranks wide
    assert (worse.difference, worse.low, worse.high) == (7, 7, 7)
    assert worse.test == "bootstrap"
    assert worse.is_significant
    other = RNG.permutation(ranks)
    alike = compare([model_with("a", ranks), model_with("b", other)], rng=np.random.default_rng(0)).differences[0]
    assert alike.low < 0 < alike.high
    assert not alike.is_significant
