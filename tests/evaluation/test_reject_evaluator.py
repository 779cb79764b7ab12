import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.test_zero_shot_classification import Constant, Painter
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.reject_evaluator import Rejection, open_outside
from vlm.evaluation.rejection import measure_separation
from vlm.evaluation.zero_shot import open_labelled_set

NAMES = ["red", "lime", "blue"]


class Painted(Painter):
    """Sees the three channels of an image, and the greyness of grey ones as a direction of its own."""

    def embed_images(self, images):
        means = images.float().mean(dim=(2, 3)) / 255
        grey = means.min(dim=1, keepdim=True).values
        rows = torch.cat([means, grey, torch.zeros(len(means), 4)], dim=1)
        return torch.nn.functional.normalize(rows, dim=1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("rejection")
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (root / "inside" / name).mkdir(parents=True)
        for copy in range(10):
            colour = rng.integers(0, 60, 3)
            colour[number] = rng.integers(180, 256)
            save(root / "inside" / name / f"{copy}.png", colour)
    (root / "outside").mkdir()
    for copy in range(20):
        save(root / "outside" / f"{copy}.png", np.full(3, rng.integers(60, 256)))
    return open_labelled_set(str(root / "inside"), label="label"), open_outside(str(root / "outside"))


def save(path, colour):
    Image.new("RGB", (8, 8), tuple(int(part) for part in colour)).save(path)


def test_images_of_none_of_the_classes_are_told_apart(sets):
    inside, outside = sets
    measurement, rule = Rejection(outside=outside).measure(EvaluatedModel(Painted()), inside)
    values = measurement.values
    assert list(values) == [
        "similarity_auroc",
        "similarity_fpr_at_95_tpr",
        "whitened_lda_auroc",
        "whitened_lda_fpr_at_95_tpr",
    ]
    assert values["similarity_auroc"].value == values["whitened_lda_auroc"].value == 1
    assert values["similarity_fpr_at_95_tpr"].value == 0
    assert (values["similarity_auroc"].chance, values["similarity_fpr_at_95_tpr"].chance) == (0.5, 0.95)
    assert measurement.warnings == ()
    details = measurement.details
    assert (details.num_inside, details.num_outside, details.num_fitted, details.num_classes) == (30, 20, 15, 3)
    # the rule does what was measured
    images = EvaluatedModel(Painted()).image_features(outside)[1]
    similarity = (images @ np.eye(3, 8, dtype=np.float32).T).max(axis=1)
    assert (rule.scores(images, similarity) < rule.threshold).all()
    assert (rule.fingerprint, sorted(rule.classes)) == ("painter", sorted(NAMES))


def test_the_samples_hold_what_the_figures_are_made_of(sets):
    inside, outside = sets
    measurement = Rejection(outside=outside).run(EvaluatedModel(Painted()), inside)
    rows = measurement.samples.to_pylist()
    assert [row["key"] for row in rows[:30]] == list(inside.keys)
    assert rows[30]["key"] == f"outside: {outside.keys[0]}"
    for score in ("similarity", "whitened_lda"):
        scores = {
            side: np.array([row[score] for row in rows if row["inside"] is side and row[score] is not None])
            for side in (True, False)
        }
        assert measure_separation(scores[True], scores[False]).auroc == measurement.values[f"{score}_auroc"].value
    # no image counts by whose own class whitened LDA was made
    assert sum(row["whitened_lda"] is None for row in rows) == 15


def test_a_constant_model_tells_nothing(sets):
    inside, outside = sets
    measurement = Rejection(outside=outside).run(EvaluatedModel(Constant()), inside)
    assert measurement.values["similarity_auroc"].value == 0.5
    assert measurement.values["similarity_fpr_at_95_tpr"].value == 1
    assert "similarity of" in measurement.warnings[0]
    assert "does not tell it from" in measurement.warnings[0]


def test_without_labels_the_predicted_classes_do(sets):
    inside, outside = sets
    unlabelled = open_outside(inside.name)
    assert unlabelled.labels is None
    measurement = Rejection(outside=outside, class_names="red,lime,blue").run(EvaluatedModel(Painted()), unlabelled)
    assert measurement.values["whitened_lda_auroc"].value == 1


def test_one_image_a_class_leaves_similarity_alone(sets):
    inside, outside = sets
    few = inside.select([0, 10, 20])
    measurement, rule = Rejection(outside=outside).measure(EvaluatedModel(Painted()), few)
    assert "whitened_lda_auroc" not in measurement.values
    assert measurement.details.whitened_lda is None
    assert "Whitened LDA is left out" in measurement.warnings[-1]
    assert rule.lda is None
