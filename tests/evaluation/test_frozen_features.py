import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from tests.evaluation.encoders import ColourEncoder
from tests.evaluation.test_evaluation_set import png
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.few_shot import (
    FewShot,
    NearestClassMean,
    NearestNeighbours,
    SubsetSize,
    class_mean_cosines,
    crossed_interval,
    neighbour_votes,
    nested_subset,
)
from vlm.evaluation.labelled_features import LabelledFeatures, expected_hits, hold_out, unit_rows
from vlm.evaluation.linear_probe import LinearProbe, StrengthTrial, fit_linear, fit_probe, halving_search, log_loss

COLOURS = ("red", "green", "blue")


def random_features(number, *, classes=5, size=12, seed=0, noise=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=number)
    centres = np.random.default_rng(99).normal(size=(classes, size))
    features = centres[labels] + noise * rng.normal(size=(number, size))
    return LabelledFeatures(
        features=features.astype(np.float32), labels=labels, classes=tuple(f"class {name}" for name in range(classes))
    )


def balanced(features, classes=5):
    labels = np.arange(len(features)) % classes
    return LabelledFeatures(features=features, labels=labels, classes=tuple("abcdefgh"[:classes]))


CLASSIFIERS = {
    "neighbours": neighbour_votes,
    "class mean": class_mean_cosines,
    "linear": lambda train, features: fit_linear(train, strength=1.0).scores(features),
}


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_perfect_features_score_exactly_1_and_constant_ones_exactly_chance(classifier):
    perfect = balanced(np.eye(5, dtype=np.float32)[np.arange(40) % 5])
    assert expected_hits(CLASSIFIERS[classifier](perfect, perfect.features), perfect.labels).tolist() == [1.0] * 40
    constant = balanced(np.full((40, 7), 0.3, np.float32))
    hits = expected_hits(CLASSIFIERS[classifier](constant, constant.features), constant.labels)
    assert hits == pytest.approx(np.full(40, 0.2))


def test_ties_are_resolved_in_expectation_but_for_classes_that_are_ruled_out():
    scores = np.array([[1.0, 1.0, 0.5], [2.0, 2.0, 2.0], [0.1, -np.inf, 0.0], [3.0, 3.0 - 1e-9, -np.inf]])
    assert expected_hits(scores, np.array([0, 2, 0, 1])).tolist() == [0.5, pytest.approx(1 / 3), 1.0, 0.5]


def slow_votes(train, features, neighbours, temperature):
    votes = np.zeros((len(features), len(train.classes)))
    for row, query in enumerate(features.astype(np.float64)):
        cosines = []
        for candidate in train.features.astype(np.float64):
            cosines.append(query @ candidate / np.linalg.norm(query) / np.linalg.norm(candidate))
        for column in np.argsort(cosines)[::-1][:neighbours]:
            votes[row, train.labels[column]] += np.exp((cosines[column] - 1) / temperature)
    return votes


def weigh_distances(distances):
    return np.exp(-distances / 0.07)


@pytest.mark.parametrize("neighbours", [1, 20, 1000])
def test_votes_are_those_of_a_slow_version_and_of_scikit_learn(monkeypatch, neighbours):
    train, test = random_features(150), random_features(40, seed=1)
    # the queries in several blocks
    monkeypatch.setattr("vlm.evaluation.few_shot._COSINES_AT_ONCE", 150 * 7)
    votes = neighbour_votes(train, test.features, neighbours=neighbours)
    np.testing.assert_allclose(votes, slow_votes(train, test.features, neighbours, 0.07), rtol=1e-4, atol=1e-12)
    weigh: Any = weigh_distances
    theirs = KNeighborsClassifier(min(neighbours, 150), metric="cosine", weights=weigh)
    theirs.fit(train.features, train.labels)
    shares = votes / votes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, theirs.predict_proba(test.features), atol=1e-4)


def test_neighbours_tied_for_the_last_place_share_it_whatever_their_order():
    # one image at the query, then four equally far of which two more may vote
    features = np.array([[1, 0], [0.6, 0.8], [0.6, 0.8], [0.6, -0.8], [0.6, 0.8]], np.float32)
    labels = np.array([0, 1, 1, 2, 2])
    train = LabelledFeatures(features=features, labels=labels, classes=("a", "b", "c"))
    far = np.exp(-0.4 / 0.5)
    votes = neighbour_votes(train, np.array([[2.0, 0.0]]), neighbours=3, temperature=0.5)
    assert votes[0] == pytest.approx([1.0, far, far], rel=1e-5)
    order = np.array([4, 2, 0, 3, 1])
    shuffled = neighbour_votes(train.take(order), np.array([[2.0, 0.0]]), neighbours=3, temperature=0.5)
    assert shuffled == pytest.approx(votes)


@pytest.mark.parametrize(("options", "message"), [({"neighbours": 0}, "0 neighbours"), ({"temperature": 0}, "above 0")])
def test_votes_need_neighbours_and_a_temperature(options, message):
    train = random_features(5)
    with pytest.raises(UsageError, match=message):
        neighbour_votes(train, train.features, **options)


def test_class_means_are_those_of_a_slow_version_and_of_scikit_learns_centroids():
    train, test = random_features(100), random_features(60, seed=1)
    cosines = class_mean_cosines(train, test.features)
    vectors = unit_rows(train.features.astype(np.float64))
    for number in range(5):
        mean = vectors[train.labels == number].mean(axis=0)
        expected = unit_rows(test.features.astype(np.float64)) @ mean / np.linalg.norm(mean)
        np.testing.assert_allclose(cosines[:, number], expected)
    # classes that are turned copies of each other have means of one length: the nearest is that of the best cosine
    quarter = np.kron(np.eye(6), [[0, -1], [1, 0]])
    parts = [unit_rows(random_features(30).features.astype(np.float64))]
    for _ in range(3):
        parts.append(parts[-1] @ quarter)
    turned = LabelledFeatures(
        features=np.concatenate(parts), labels=np.repeat(np.arange(4), 30), classes=("a", "b", "c", "d")
    )
    theirs = NearestCentroid().fit(turned.features, turned.labels)
    predictions = class_mean_cosines(turned, test.features).argmax(axis=1)
    assert predictions.tolist() == theirs.predict(unit_rows(test.features)).tolist()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
def test_linear_fits_are_scikit_learns_also_from_another_origin(classes, strength):
    train, test = random_features(200, classes=classes), random_features(50, classes=classes, seed=1)
    moved = LabelledFeatures(features=train.features + 100, labels=train.labels, classes=train.classes)
    theirs = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=5000)
    theirs.fit(train.features.astype(np.float64), train.labels)
    classifier = fit_linear(moved, strength=strength)
    scores = classifier.scores(test.features + 100)
    probabilities = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(test.features), atol=5e-3)
    assert classifier.is_converged
    assert log_loss(scores, test.labels) == pytest.approx(
        -np.log(theirs.predict_proba(test.features)[np.arange(50), test.labels]).mean(), abs=2e-3
    )


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_the_size_of_features_is_met_by_the_strength_alone(size):
    train = random_features(200)
    sized = LabelledFeatures(features=train.features * np.float32(size), labels=train.labels, classes=train.classes)
    classifier = fit_linear(sized, strength=1.0 * size**2)
    np.testing.assert_allclose(classifier.weights * size, fit_linear(train, strength=1.0).weights, rtol=1e-3, atol=1e-4)


def test_a_class_without_training_images_is_never_chosen():
    train = random_features(60)
    some = train.take(np.flatnonzero(train.labels != 2))
    assert (fit_linear(some, strength=1.0).scores(train.features)[:, 2] == -np.inf).all()
    assert (class_mean_cosines(some, train.features)[:, 2] == -1).all()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UsageError, match=r"needs scikit-learn: pip install 'vlm-pipeline\[evaluation\]'"):
        fit_linear(random_features(20), strength=1.0)


def test_a_fit_that_is_cut_short_says_so():
    assert not fit_linear(random_features(200), strength=1e-4, max_iterations=2).is_converged


@pytest.mark.parametrize(
    ("train", "strength", "message"),
    [
        (random_features(20), 0.0, "strength of 0 is not above 0"),
        (random_features(20).take(np.zeros(3, np.int64)), 1.0, "All 3 training images are of one class"),
    ],
)
def test_fits_that_mean_nothing_are_refused(train, strength, message):
    with pytest.raises(UsageError, match=message):
        fit_linear(train, strength=strength)


@pytest.mark.parametrize("peak", [-6.0, -3.3, 0.0, 0.125, 2.4, 5.9, 6.0])
def test_the_search_reaches_the_best_of_a_full_grid_of_eight_a_decade(peak):
    def trial(exponent):
        return StrengthTrial(strength=10**exponent, accuracy=-abs(exponent - peak), log_loss=0.0)

    trials = halving_search(trial)
    grid = np.arange(-48, 49) / 8
    assert (
        max(trials, key=lambda exponent: trials[exponent].accuracy)
        in grid[np.abs(grid - peak) == np.abs(grid - peak).min()]
    )
    assert len(trials) <= 15


def test_of_strengths_with_equal_accuracy_that_of_the_lowest_cross_entropy_wins():
    def trial(exponent):
        return StrengthTrial(strength=10**exponent, accuracy=1.0, log_loss=abs(exponent + 1.5))

    trials = halving_search(trial)
    assert min(trials, key=lambda exponent: trials[exponent].log_loss) == -1.5


def test_the_probe_is_fitted_to_training_and_validation_images_with_the_strength_chosen_on_the_latter():
    train, validation = random_features(100), random_features(60, seed=3)
    fitted = fit_probe(train, validation, rng=np.random.default_rng(0))
    both = LabelledFeatures(
        features=np.concatenate([train.features, validation.features]),
        labels=np.concatenate([train.labels, validation.labels]),
        classes=train.classes,
    )
    best = fitted.trials[0]
    np.testing.assert_allclose(fitted.classifier.weights, fit_linear(both, strength=best.strength).weights, atol=1e-6)
    alone = fit_linear(train, strength=best.strength).scores(validation.features)
    assert best.accuracy == pytest.approx(expected_hits(alone, validation.labels).mean())
    assert all(trial.accuracy <= best.accuracy for trial in fitted.trials)
    assert fit_probe(train, validation, rng=np.random.default_rng(0), strength=3.0).trials == ()


def test_of_each_class_a_share_is_held_out_and_single_images_stay():
    data = LabelledFeatures(
        features=np.arange(34, dtype=np.float32)[:, None],
        labels=np.repeat([0, 1, 2], [30, 3, 1]),
        classes=("a", "b", "c"),
    )
    train, validation = hold_out(data, share=0.2, rng=np.random.default_rng(0))
    assert np.bincount(validation.labels).tolist() == [6, 1]
    assert sorted([*train.features[:, 0], *validation.features[:, 0]]) == list(range(34))
    with pytest.raises(UsageError, match="No class has two training images"):
        hold_out(data.take(np.array([0, 30, 33])), share=0.2, rng=np.random.default_rng(0))
    with pytest.raises(UsageError, match="validation share of 1 "):
        hold_out(data, share=1.0, rng=np.random.default_rng(0))


def test_smaller_subsets_of_a_seed_are_parts_of_larger_ones():
    labels = np.repeat([0, 1, 2], [200, 40, 5])
    sizes = [SubsetSize(shots=1), SubsetSize(shots=2), SubsetSize(shots=16), SubsetSize(share=0.1), SubsetSize(share=1)]
    subsets = [nested_subset(labels, size, seed=3) for size in sizes]
    assert [np.bincount(labels[rows]).tolist() for rows in subsets] == [
        [1, 1, 1],
        [2, 2, 2],
        [16, 16, 5],
        # of a tenth of 5 images, one
        [20, 4, 1],
        [200, 40, 5],
    ]
    assert set(subsets[0]) <= set(subsets[1]) <= set(subsets[2])
    assert set(subsets[3]) <= set(subsets[4])
    assert not np.array_equal(subsets[2], nested_subset(labels, sizes[2], seed=4))
    assert [size.name for size in sizes] == ["1-shot", "2-shot", "16-shot", "10%", "100%"]


@pytest.mark.parametrize("options", [{}, {"shots": 2, "share": 0.5}, {"shots": -1}, {"share": 1.5}])
def test_a_subset_has_one_size(options):
    with pytest.raises(UsageError, match="no size of a few-shot set"):
        SubsetSize(**options)


def test_the_interval_of_a_point_covers_seeds_and_images():
    rng = np.random.default_rng(0)
    by_seed = (rng.random((5, 400)) < rng.uniform(0.4, 0.8, size=(5, 1))).astype(np.float64)
    both = crossed_interval(by_seed, rng=rng)
    same_seeds = crossed_interval(np.repeat(by_seed[:1], 5, axis=0), rng=rng)
    assert both.value == by_seed.mean()
    deviation = by_seed.mean(axis=1).std() / np.sqrt(5)
    # ±1.96 standard errors of the mean over seeds, and a little for the images
    assert both.half_width is not None
    assert same_seeds.half_width is not None
    assert both.half_width == pytest.approx(1.96 * deviation, rel=0.35)
    assert both.half_width > 2 * same_seeds.half_width
    assert crossed_interval(np.ones((3, 20)), rng=rng).low == pytest.approx(0.025 ** (1 / 20))


class PoolingColourEncoder(ColourEncoder):
    """With features before the projection that have no order of colours in them."""

    def pool_images(self, images):
        means = images.float().mean(dim=(2, 3))
        return torch.cat([means, means.roll(1, dims=1)], dim=1)


@pytest.fixture
def colour_sets(tmp_path):
    """Four training and two test images of each colour, in class folders."""
    sets = []
    for name, number in (("train", 4), ("test", 2)):
        for colour in COLOURS:
            (tmp_path / name / colour).mkdir(parents=True)
            for copy in range(number):
                (tmp_path / name / colour / f"{copy}.png").write_bytes(png(colour))
        sets.append(open_evaluation_set(str(tmp_path / name), name=name))
    return sets


@pytest.mark.parametrize("kind", [LinearProbe, NearestNeighbours, NearestClassMean, FewShot])
@pytest.mark.parametrize("layer", ["pooled", "projected"])
def test_evaluators_give_1_for_perfect_features_and_a_row_for_each_image(colour_sets, kind, layer):
    train, test = colour_sets
    options = {"shots": (1, 2), "shares": (0.5,), "seeds": 2} if kind is FewShot else {}
    evaluator = kind(train=train, layer=layer, **options)
    measured = evaluator.run(EvaluatedModel(PoolingColourEncoder()), test)
    assert evaluator.name.endswith(f"-{layer}")
    assert (measured.evaluator, measured.data, measured.num_images) == (evaluator.name, "test", 6)
    first, *_ = measured.values
    assert measured.samples is not None
    for value in measured.values.values():
        assert (value.value, value.chance) == (1.0, pytest.approx(1 / 3))
    assert measured.samples.column("key").to_pylist() == list(test.keys)
    assert measured.samples.column(first).to_pylist() == [1.0] * 6
    assert json.loads(json.dumps(measured.to_json()))["details"]["layer"] == layer
    if kind is FewShot:
        assert list(measured.values) == ["2-shot", "1-shot", "50%"]
        assert [point.num_train for point in measured.details.points] == [6, 3, 6]
    else:
        assert measured.samples.column("prediction").to_pylist() == measured.samples.column("truth").to_pylist()
        assert measured.values["accuracy"].low == pytest.approx(0.025 ** (1 / 6))
    # a probe of classes so far apart may end at either end of the search
    assert measured.warnings == () or kind is LinearProbe


def test_training_on_the_test_images_is_told(colour_sets):
    train, _ = colour_sets
    measured = NearestClassMean(train=train).run(EvaluatedModel(ColourEncoder()), train)
    assert measured.warnings == ("The training images are the test images, too: nothing is said of other images.",)


def test_few_shot_curves_say_what_their_probes_learned_from(colour_sets):
    train, test = colour_sets
    model = EvaluatedModel(PoolingColourEncoder())
    measured = FewShot(train=train, shots=(1, 8), shares=(), seeds=3).run(model, test)
    # of four images of a class one is held out to choose strengths on
    assert (measured.details.num_validation, measured.details.points[0].num_train) == (3, 9)
    assert all(point.strength > 0 for point in measured.details.points)
    assert "A class has 3 training images, fewer than the 8" in measured.warnings[0]
    by_mean = FewShot(train=train, shots=(1,), shares=(), classifier="class-mean").run(model, test)
    assert (by_mean.details.num_validation, by_mean.details.points[0].strength) == (0, None)
    validated = FewShot(train=train, validation=test, shots=(4,), shares=(), seeds=1).run(model, test)
    assert (validated.details.num_validation, validated.details.points[0].num_train) == (6, 12)


def test_sets_that_no_classifier_can_use_are_refused(colour_sets):
    train, test = colour_sets
    model = EvaluatedModel(ColourEncoder())
    blue = [row for row, key in enumerate(train.keys) if "blue" in key]
    others = [row for row in range(len(train)) if row not in blue]
    with pytest.raises(UsageError, match=r"1 classes of test have no training image in train, such as 'blue'"):
        NearestNeighbours(train=train.select(others)).run(model, test)
    with pytest.raises(UsageError, match="All images of train are of class 'blue'"):
        NearestNeighbours(train=train.select(blue)).run(model, test.select([0]))
    with pytest.raises(UsageError, match="no features before their projection"):
        LinearProbe(train=train).run(model, test)
    with pytest.raises(UsageError, match="make no curve"):
        FewShot(train=train, shots=(), shares=()).run(model, test)
