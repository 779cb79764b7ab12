"""Each usual error of wiring is built into a model that is right otherwise, and has to be named."""

import re

import numpy as np
import pytest

from vlm.evaluation.class_metrics import rank_classes
from vlm.evaluation.wiring_checks import ClassWiring, check_classes, consistent_mapping, is_at_chance, key_like

NAMES = ["cat", "dog", "car", "tree", "house", "apple", "bird", "ship"]


def wiring(labels=None, *, names=NAMES, edit_images=None, edit_classifier=None, each=12, noise=0.05):
    rng = np.random.default_rng(0)
    true = rng.permutation(np.repeat(np.arange(len(NAMES)), each))
    images = np.eye(len(NAMES), 16)[true] + noise * rng.normal(size=(len(true), 16))
    images = (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32)
    classifier = np.eye(len(NAMES), 16, dtype=np.float32)
    images = images if edit_images is None else edit_images(images)
    classifier = classifier if edit_classifier is None else edit_classifier(classifier)
    truth = true if labels is None else labels(true)
    ranking = rank_classes(images, classifier, [[number] for number in truth.tolist()])
    return ClassWiring(
        images=images,
        classifier=classifier,
        truth=truth,
        prediction=ranking.prediction,
        lowest=ranking.lowest,
        names=names,
    )


def sorted_order(true):
    """Labels that number the classes in the order of their sorted names."""
    return np.argsort(np.argsort(NAMES))[true]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (
            {"labels": lambda true: (true + 1) % 8},
            r"labels are shifted by \+1 against the class names \(100% are right",
        ),
        ({"labels": lambda true: np.array([5, 2, 0, 7, 1, 3, 4, 6])[true]}, "order of the classes differs"),
        ({"labels": sorted_order}, "as if one of them were sorted by name"),
        ({"labels": lambda true: np.roll(true, 1)}, "label of the next image"),
        ({"labels": lambda true: np.roll(true, -1)}, "label of the previous image"),
        ({"edit_images": lambda rows: 7 * rows}, "images are not of unit length"),
        ({"edit_classifier": lambda rows: -rows}, "a sign is turned round"),
        ({"edit_images": lambda rows: np.repeat(rows[:1], len(rows), axis=0)}, "images have the same embedding"),
        (
            {"edit_classifier": lambda rows: np.repeat(rows[:1], len(rows), axis=0)},
            "texts .*: look at another tokenizer",
        ),
        ({"edit_classifier": lambda rows: rows[[0, 1, 2, 3, 0, 1, 2, 3]]}, "'house' that of 'cat'"),
        ({"names": [f"n0144{number}764" for number in range(8)]}, "8 of 8 class names look like keys"),
    ],
)
def test_an_error_of_wiring_is_named(options, word):
    assert re.search(word, "\n".join(check_classes(wiring(**options))))


def test_an_image_tower_that_gives_one_class_is_named():
    def towards_the_first(rows):
        moved = rows + 10 * np.eye(1, 16, dtype=np.float32)
        return moved / np.linalg.norm(moved, axis=1, keepdims=True)

    problems = check_classes(wiring(edit_images=towards_the_first))
    assert any("100% of the images are taken for 'cat'" in problem for problem in problems)


def test_nothing_is_said_of_a_right_model_or_of_noise():
    assert check_classes(wiring()) == []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert check_classes(wiring(lambda true, rng=rng: rng.permutation(true), noise=0.3)) == []
    # with few images some permutation always fits
    assert check_classes(wiring(lambda true: (true + 3) % 8, each=2)) == []


def test_a_mapping_takes_each_class_once():
    truth = np.array([0, 0, 0, 1, 1, 2])
    prediction = np.array([2, 2, 1, 2, 1, 2])
    assert consistent_mapping(truth, prediction, 4).tolist() == [2, 1, -1, -1]


def test_a_score_is_at_chance_when_its_interval_reaches_it():
    assert is_at_chance(0.09, 0.1)
    assert not is_at_chance(0.11, 0.1)
    assert not is_at_chance(None, 0.1)
    assert not is_at_chance(0.1, None)


def test_texts_like_keys_are_told_from_words():
    keys = ["n01440764", "00123", "a.JPG", "3f2504e0-4f89-11d3-9a0c-0305e82c3301", "d41d8cd98f00b204", "12-34"]
    assert key_like([*keys, "a cat", "zero", "nectarine", "café", "猫", "deadbeef"]) == keys
