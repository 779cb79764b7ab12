"""Metrics of classification against slow obvious versions and against scikit-learn and torchmetrics."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_calibration_error, multilabel_average_precision

from vlm.errors import VlmError
from vlm.evaluation.class_metrics import (
    average_precisions,
    calibration_interval,
    chance_of_hit,
    class_means,
    confusion_pairs,
    measure_calibration,
    rank_classes,
    resampled_class_means,
)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def random_case(seed, num_images=60, num_classes=7, size=5):
    rng = np.random.default_rng(seed)
    images = unit(rng.normal(size=(num_images, size)))
    classifier = unit(rng.normal(size=(num_classes, size)))
    return images, classifier, rng.integers(num_classes, size=num_images)


def softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_are_those_of_scikit_learn(seed):
    images, classifier, truth = random_case(seed)
    ranking = rank_classes(images, classifier, [[number] for number in truth.tolist()])
    scores = images @ classifier.T
    classes = np.arange(len(classifier))
    for k in (1, 3, 5):
        assert ranking.ranks.recall(k) == pytest.approx(top_k_accuracy_score(truth, scores, k=k, labels=classes))
    per_class, totals = class_means(ranking.ranks.hits(1), [[number] for number in truth.tolist()], len(classifier))
    assert np.nanmean(per_class) == pytest.approx(balanced_accuracy_score(truth, scores.argmax(axis=1)))
    assert totals.sum() == len(truth)
    assert ranking.prediction.tolist() == scores.argmax(axis=1).tolist()
    assert ranking.lowest.tolist() == scores.argmin(axis=1).tolist()
    assert ranking.similarity == pytest.approx(scores.max(axis=1))


def test_probabilities_are_softmax_at_the_temperature():
    images, classifier, truth = random_case(0)
    ranking = rank_classes(images, classifier, [[number] for number in truth.tolist()], logit_scale=20.0)
    assert ranking.probability == pytest.approx(softmax(20.0 * images @ classifier.T).max(axis=1), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_of_a_set_of_right_classes_the_best_counts(seed):
    """ReaL's account: right if any class of the set is predicted; images without any do not count."""
    images, classifier, _ = random_case(seed)
    rng = np.random.default_rng(seed)
    sets = [sorted(rng.choice(7, size=rng.integers(0, 4), replace=False).tolist()) for _ in images]
    ranking = rank_classes(images, classifier, sets)
    order = np.argsort(-(images @ classifier.T), axis=1)
    for k in (1, 2):
        expected = [
            bool(set(row[:k].tolist()) & set(classes)) for row, classes in zip(order, sets, strict=True) if classes
        ]
        assert ranking.hits(k).mean() == pytest.approx(np.mean(expected))
    assert (~ranking.has_truth).sum() == sum(not classes for classes in sets)


def test_ties_count_in_expectation_over_all_orders():
    """Scores 1 1 1 0 with right classes 0 and 3: every order of the three equals, enumerated."""
    classifier = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    image = np.array([[1, 0]], np.float32)
    ranking = rank_classes(image, classifier, [[0, 3]])
    orders = [[*order, 3] for order in permutations(range(3))]
    for k in (1, 2, 3):
        expected = np.mean([bool({0, 3} & set(order[:k])) for order in orders])
        assert ranking.ranks.hits(k)[0] == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [3, 10, 37])
def test_a_constant_model_is_exactly_at_chance(num_classes):
    """Equal columns of a product of matrices may be rounded unlike each other; they have to stay equal."""
    rng = np.random.default_rng(0)
    same = unit(rng.normal(size=(1, 513)))
    truths = [[int(number)] for number in rng.integers(num_classes, size=50)]
    ranking = rank_classes(
        np.repeat(same, 50, axis=0), np.repeat(unit(rng.normal(size=(1, 513))), num_classes, axis=0), truths
    )
    for k in (1, 5):
        chance = chance_of_hit(truths, num_classes, k)
        assert ranking.ranks.recall(k) == pytest.approx(chance, abs=1e-15)
        assert chance == pytest.approx(min(k / num_classes, 1.0))
    assert ranking.probability == pytest.approx(1 / num_classes)


def test_chance_with_sets_is_that_of_drawing_classes():
    sets = [[0, 1], [], [4]]
    expected = []
    for classes in filter(None, sets):
        draws = list(combinations(range(6), 3))
        expected.append(np.mean([bool(set(draw) & set(classes)) for draw in draws]))
    assert chance_of_hit(sets, 6, 3) == pytest.approx(np.mean(expected))


def test_embeddings_that_are_not_finite_are_refused():
    with pytest.raises(VlmError, match="diverged"):
        rank_classes(np.full((2, 3), np.nan, np.float32), np.eye(3, dtype=np.float32), [[0], [1]])


@pytest.mark.parametrize("decimals", [1, 6])
def test_average_precision_is_that_of_scikit_learn_and_torchmetrics(decimals):
    """Rounded to one decimal many scores are equal, where definitions of average precision differ."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(80, 6)).round(decimals).astype(np.float32)
    is_right = rng.random((80, 6)) < 0.3
    is_right[:, 5] = False
    sets = [np.flatnonzero(row).tolist() for row in is_right]
    measured = average_precisions(scores, np.eye(6, dtype=np.float32), sets)[0]
    expected = [average_precision_score(is_right[:, number], scores[:, number]) for number in range(5)]
    assert measured[:5] == pytest.approx(expected)
    assert math.isnan(measured[5])
    by_torch = multilabel_average_precision(
        # it takes scores outside 0 to 1 for logits
        torch.from_numpy(scores[:, :5]).sigmoid(),
        torch.from_numpy(is_right[:, :5]).long(),
        num_labels=5,
        average=None,
    )
    assert measured[:5] == pytest.approx(by_torch.numpy(), abs=1e-6)


def test_average_precision_of_equal_scores_is_the_share_of_the_positives_and_of_perfect_ones_1():
    sets = [[0], [1], [], [0]]
    constant = average_precisions(np.ones((4, 1), np.float32), np.ones((2, 1), np.float32), sets)[0]
    assert constant == pytest.approx([0.5, 0.25])
    perfect = np.array([[1, 0], [0, 1], [0, 0], [1, 0]], np.float32)
    assert average_precisions(perfect, np.eye(2, dtype=np.float32), sets)[0].tolist() == [1.0, 1.0]


def test_average_precision_of_a_resample_is_that_of_the_images_drawn():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(30, 3)).astype(np.float32)
    is_right = rng.random((30, 3)) < 0.4
    counts = rng.multinomial(30, [1 / 30] * 30, size=4)
    eye = np.eye(3, dtype=np.float32)
    measured = average_precisions(scores, eye, [np.flatnonzero(row).tolist() for row in is_right], counts)
    for row, drawn in zip(measured, counts, strict=True):
        again = np.repeat(np.arange(30), drawn)
        sets = [np.flatnonzero(is_right[number]).tolist() for number in again]
        assert row == pytest.approx(average_precisions(scores[again], eye, sets)[0])


@pytest.mark.parametrize("num_bins", [10, 15])
def test_calibration_error_is_that_of_torchmetrics_and_of_a_loop(num_bins):
    images, classifier, truth = random_case(4, num_images=200)
    probabilities = softmax(8.0 * images @ classifier.T)
    prediction = probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1).astype(np.float64)
    calibration = measure_calibration(confidence, (prediction == truth).astype(float), num_bins=num_bins)
    expected = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(truth), num_classes=7, n_bins=num_bins, norm="l1"
    )
    assert calibration.error == pytest.approx(float(expected), abs=1e-6)
    slow = 0.0
    for number in range(num_bins):
        inside = (confidence > number / num_bins) & (confidence <= (number + 1) / num_bins)
        if inside.any():
            slow += inside.mean() * abs(confidence[inside].mean() - (prediction == truth)[inside].mean())
    assert calibration.error == pytest.approx(slow)
    assert sum(entry.num_images for entry in calibration.bins) == 200
    assert calibration.overconfidence == pytest.approx(confidence.mean() - (prediction == truth).mean())


def test_calibration_at_its_ends():
    sure = measure_calibration(np.ones(8), np.ones(8))
    assert (sure.error, sure.bins[0].high, sure.bins[0].accuracy) == (0.0, 1.0, 1.0)
    assert measure_calibration(np.ones(8), np.zeros(8)).error == 1.0
    # ten classes that tie: a tenth sure, a tenth of the time right
    assert measure_calibration(np.full(8, 0.1), np.full(8, 0.1)).error == pytest.approx(0)


def test_the_interval_of_a_calibration_error_holds_it():
    """The plain percentile interval would lie above the error of a well calibrated model."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1.0, 300)
    correct = (rng.random(300) < confidence).astype(float)
    error = measure_calibration(confidence, correct).error
    low, high = calibration_interval(confidence, correct, rng=rng, num_resamples=200)
    assert 0 <= low < error < high < 0.2


def test_mean_per_class_is_resampled_within_classes():
    truth = np.array([0] * 400 + [1] * 4)
    outcomes = np.concatenate([np.tile([1.0, 0.0], 200), [1.0, 1.0, 0.0, 1.0]])
    draws = resampled_class_means(outcomes, truth, rng=np.random.default_rng(0), num_resamples=4000)
    assert draws.mean() == pytest.approx((0.5 + 0.75) / 2, abs=0.01)
    assert draws.std() == pytest.approx(math.sqrt(0.25 / 400 + 0.75 * 0.25 / 4) / 2, rel=0.05)
    perfect = resampled_class_means(np.ones(404), truth, rng=np.random.default_rng(0), num_resamples=10)
    assert perfect.tolist() == [1.0] * 10


def test_confusion_lists_the_most_frequent_wrong_pairs():
    truth = np.array([0, 0, 0, 0, 1, 1, 2])
    prediction = np.array([1, 1, 0, 2, 0, 1, 2])
    pairs = confusion_pairs(truth, prediction, ["cat", "dog", "car"], limit=2)
    assert [(pair.truth, pair.prediction, pair.num_images, pair.share) for pair in pairs] == [
        ("cat", "dog", 2, 0.5),
        ("cat", "car", 1, 0.25),
    ]
