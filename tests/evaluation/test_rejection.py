import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from vlm.errors import UsageError
from vlm.evaluation.rejection import (
    RejectRule,
    fit_whitened_lda,
    measure_separation,
    pass_threshold,
    placements,
    read_reject_rule,
    resampled_separations,
    write_reject_rule,
)


@pytest.mark.parametrize("decimals", [1, 9])
def test_separation_is_that_of_scikit_learn_and_of_all_pairs(decimals):
    """Rounded to one decimal many scores of both sets are equal."""
    rng = np.random.default_rng(0)
    inside = rng.normal(0.8, 1, size=70).round(decimals)
    outside = rng.normal(0, 1, size=50).round(decimals)
    separation = measure_separation(inside, outside)
    is_inside = np.repeat([1, 0], [70, 50])
    scores = np.concatenate([inside, outside])
    assert separation.auroc == pytest.approx(roc_auc_score(is_inside, scores))
    pairs = (inside[:, None] > outside).astype(float) + 0.5 * (inside[:, None] == outside)
    assert placements(inside, outside) == pytest.approx(pairs.mean(axis=1))
    false_rate, true_rate, _ = roc_curve(is_inside, scores, drop_intermediate=False)
    assert separation.fpr_at_95_tpr == pytest.approx(false_rate[np.argmax(true_rate >= 0.95)])
    assert (inside >= separation.threshold).mean() >= 0.95


def test_perfect_and_constant_scores():
    perfect = measure_separation(np.full(20, 0.9), np.full(20, 0.1))
    assert (perfect.auroc, perfect.fpr_at_95_tpr) == (1.0, 0.0)
    assert measure_separation(np.full(20, 0.5), np.full(20, 0.5)).auroc == 0.5
    assert pass_threshold(np.arange(100.0)) == 5.0


def test_separations_of_resamples_lie_around_the_measured_one():
    rng = np.random.default_rng(0)
    inside = rng.normal(1, 1, size=200)
    outside = rng.normal(0, 1, size=200)
    auroc, fpr = resampled_separations(inside, outside, rng=rng, num_resamples=200)
    assert auroc.mean() == pytest.approx(measure_separation(inside, outside).auroc, abs=0.01)
    # as by Hanley and McNeil 1982 for this AUROC and these numbers
    assert 0.015 < auroc.std() < 0.035
    assert np.quantile(fpr, 0.025) <= measure_separation(inside, outside).fpr_at_95_tpr <= np.quantile(fpr, 0.975)


def clusters(rng, *, num_classes=6, each=40, size=12, spread=0.05):
    """Unit vectors near the first axes, with more spread along some directions than along others."""
    centres = np.eye(size)[:num_classes]
    noise = rng.normal(size=(num_classes * each, size)) * np.linspace(1, 4, size) * spread
    rows = np.repeat(centres, each, axis=0) + noise
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), np.repeat(
        np.arange(num_classes), each
    )


def test_whitened_lda_is_its_definition_written_out():
    rng = np.random.default_rng(0)
    images, classes = clusters(rng)
    lda = fit_whitened_lda(images, classes, num_discriminants=3, residual_weight=2.0)
    within = np.zeros((12, 12))
    for number in range(6):
        some = images[classes == number].astype(np.float64)
        within += (some - some.mean(axis=0)).T @ (some - some.mean(axis=0)) / len(images)
    within += 0.01 * np.trace(within) / 12 * np.eye(12)
    values, vectors = np.linalg.eigh(within)
    white = images @ (vectors @ np.diag(values**-0.5) @ vectors.T)
    means = np.stack([white[classes == number].mean(axis=0) for number in range(6)])
    between = np.cov(means.T, bias=True)
    axes = np.linalg.eigh(between)[1][:, ::-1][:, :3]
    for image, score in zip(white[:10], lda.scores(images[:10]), strict=True):
        nearest = min(np.linalg.norm(axes.T @ (image - mean)) for mean in means)
        rest = (np.eye(12) - axes @ axes.T) @ (image - white.mean(axis=0))
        assert score == pytest.approx(-(nearest + 2 * np.linalg.norm(rest)), rel=1e-3)


def test_whitened_lda_sees_what_similarity_does_not():
    """Images outside lie as near to a class by their cosine, but off the directions in which images of classes vary."""
    rng = np.random.default_rng(1)
    images, classes = clusters(rng, spread=0.02)
    fresh, _ = clusters(rng, spread=0.02)
    outside = fresh.copy()
    outside[:, 7] += 0.4  # a direction of the residual subspace
    lda = fit_whitened_lda(images, classes)
    separation = measure_separation(lda.scores(fresh).astype(np.float64), lda.scores(outside).astype(np.float64))
    assert separation.auroc > 0.99
    similarity = measure_separation(*(rows[:, :6].max(axis=1).astype(np.float64) for rows in (fresh, outside)))
    assert similarity.auroc < 0.6


def test_more_dimensions_than_images_are_no_trouble():
    rng = np.random.default_rng(0)
    images, classes = clusters(rng, num_classes=3, each=4, size=64)
    assert np.isfinite(fit_whitened_lda(images, classes).scores(images)).all()


@pytest.mark.parametrize("classes", [[0, 0, 0], [0, 1, 2]])
def test_whitened_lda_needs_classes_of_several_images(classes):
    with pytest.raises(UsageError, match="needs two classes or more"):
        fit_whitened_lda(np.eye(3, dtype=np.float32), np.array(classes))


def test_whitened_lda_needs_images_that_differ():
    images = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 1]]
    with pytest.raises(UsageError, match="needs images that differ within a class"):
        fit_whitened_lda(images, np.array([0, 0, 0, 1, 1]))


def test_a_rule_comes_back_from_its_file(tmp_path):
    images, classes = clusters(np.random.default_rng(0))
    lda = fit_whitened_lda(images, classes, residual_weight=0.5)
    rule = RejectRule(score="whitened-lda", threshold=-3.25, fingerprint="abc", classes=("Käse", "cat"), lda=lda)
    write_reject_rule(rule, tmp_path / "reject.safetensors")
    again = read_reject_rule(str(tmp_path / "reject.safetensors"))
    assert (again.score, again.threshold, again.fingerprint, again.classes) == (
        "whitened-lda",
        -3.25,
        "abc",
        ("Käse", "cat"),
    )
    similarity = np.zeros(len(images))
    assert again.scores(images, similarity).tolist() == rule.scores(images, similarity).tolist()
    again.check_model("abc")
    with pytest.raises(UsageError, match="measured on the model abc, and this one is def"):
        again.check_model("def")
    write_reject_rule(RejectRule(threshold=0.25, fingerprint="abc"), tmp_path / "plain.safetensors")
    assert read_reject_rule(str(tmp_path / "plain.safetensors")).lda is None


def test_a_number_is_a_threshold_on_the_cosine():
    rule = read_reject_rule("0.2")
    rule.check_model("any")
    assert rule.scores(np.eye(2, dtype=np.float32), np.array([0.1, 0.3])).tolist() == [0.1, 0.3]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2", "from -1 to 1"),
        ("nan", "from -1 to 1"),
        ("nothing.here", "neither a number nor a file"),
        ("FILE", "is no reject"),
    ],
)
def test_what_is_no_threshold_is_refused(tmp_path, value, message):
    path = tmp_path / "file.safetensors"
    path.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(UsageError, match=message):
        read_reject_rule(str(path) if value == "FILE" else value)
