"""Hard negatives in SugarCrepe's and Winoground's layouts, and their scores against every ordering of ties."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from tests.evaluation.encoders import COLOURS, ColourEncoder
from vlm.data.sources.source import SourceOptions
from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.sentence_pairs import SentencePairs, read_sentence_pairs, true_first, winoground_scores


@pytest.fixture
def images(tmp_path):
    """A folder with an image of each colour, as a set."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, (red, green, blue) in COLOURS.items():
        Image.new("RGB", (16, 16), (int(red * 255), int(green * 255), int(blue * 255))).save(folder / f"{name}.png")
    return open_evaluation_set(str(folder), name="colours", options=SourceOptions(captions="none"))


def write_sugar_crepe(folder, *, wrong="blue"):
    folder.mkdir()
    swapped = {
        "0": {"filename": "red.png", "caption": "a red thing", "negative_caption": "a green thing"},
        "1": {"filename": "green.png", "caption": "a green thing", "negative_caption": f"a {wrong} thing"},
    }
    replaced = [{"filename": "blue.png", "caption": "a red thing", "negative_caption": "a blue thing"}]
    (folder / "swap_att.json").write_text(json.dumps(swapped))
    (folder / "replace_att.json").write_text(json.dumps(replaced))
    return str(folder)


class SameEncoder(ColourEncoder):
    """Says the same of everything."""

    def embed_images(self, images):
        return torch.ones(len(images), 3) / 3**0.5

    def embed_texts(self, texts):
        return torch.ones(len(texts), 3) / 3**0.5


def test_accuracy_is_that_of_each_category_and_of_all(images, tmp_path):
    pairs = write_sugar_crepe(tmp_path / "pairs")
    measured = SentencePairs(pairs=pairs).run(EvaluatedModel(ColourEncoder()), images)
    assert {name: value.value for name, value in measured.values.items()} == pytest.approx(
        {"accuracy": 2 / 3, "replace_att/accuracy": 0.0, "swap_att/accuracy": 1.0, "mean_per_category": 0.5}
    )
    assert measured.values["accuracy"].chance == 0.5
    assert measured.details.categories["swap_att"].num_pairs == 2
    rows = measured.samples.to_pylist()
    assert [(row["key"], row["category"], row["accuracy"]) for row in rows] == [
        ("blue.png", "replace_att", 0.0), ("red.png", "swap_att", 1.0), ("green.png", "swap_att", 1.0),
    ]  # fmt: skip
    for name in ("accuracy", "swap_att/accuracy", "replace_att/accuracy"):
        assert pc.mean(measured.samples[name]).as_py() == pytest.approx(measured.values[name].value)


def test_a_model_that_says_the_same_of_everything_gets_chance(images, tmp_path):
    measured = SentencePairs(pairs=write_sugar_crepe(tmp_path / "pairs")).run(EvaluatedModel(SameEncoder()), images)
    assert measured.values["accuracy"].value == measured.values["accuracy"].chance == 0.5
    winoground = SentencePairs(pairs=write_winoground(tmp_path / "w")).run(EvaluatedModel(SameEncoder()), images)
    for name, value in winoground.values.items():
        if name != "mean_per_category":
            assert value.value == value.chance, name


def write_winoground(folder):
    folder.mkdir()
    lines = [
        {"id": 7, "image_0": "red", "image_1": "blue", "caption_0": "red", "caption_1": "blue", "tag": "Noun"},
        {"id": 8, "image_0": "red", "image_1": "blue", "caption_0": "blue", "caption_1": "red", "tag": "Noun"},
        {"id": 9, "image_0": "red", "image_1": "green", "caption_0": "red", "caption_1": "red green", "tag": "Verb"},
    ]
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_winoground_has_three_scores_and_its_images_are_found_without_suffix(images, tmp_path):
    measured = SentencePairs(pairs=write_winoground(tmp_path / "w")).run(EvaluatedModel(ColourEncoder()), images)
    assert measured.values["text_score"].value == pytest.approx(2 / 3)
    # "red green" is as near to the red image as to the green one
    assert measured.values["image_score"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert measured.values["group_score"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert measured.values["Noun/group_score"].value == 0.5
    assert [row["pair"] for row in measured.samples.to_pylist()] == ["7", "8", "9"]


def literal_winoground(scores):
    """The three conditions as the authors write them, over all orders of the four scores that ties leave open."""
    names = ("c0_i0", "c1_i0", "c0_i1", "c1_i1")
    flat = dict(zip(names, scores.flatten().tolist(), strict=True))
    counts = np.zeros(3)
    orders = [
        order for order in itertools.permutations(names)
        if all(flat[a] >= flat[b] for a, b in itertools.pairwise(order))
    ]  # fmt: skip
    for order in orders:
        place = {name: -order.index(name) for name in names}
        text = place["c0_i0"] > place["c1_i0"] and place["c1_i1"] > place["c0_i1"]
        image = place["c0_i0"] > place["c0_i1"] and place["c1_i1"] > place["c1_i0"]
        counts += (text, image, text and image)
    return counts / len(orders)


def test_winoground_scores_are_the_mean_over_all_orders_of_ties():
    grid = np.array(list(itertools.product((0.0, 1.0, 2.0, 3.0), repeat=4))).reshape(-1, 2, 2)
    ours = winoground_scores(grid)
    literal = np.array([literal_winoground(scores) for scores in grid])
    assert ours["group_score"] == pytest.approx(literal[:, 2])
    # of these two comparisons each is of two scores alone, and a tie in it is half; one order of all four ties them
    # together where both comparisons share a score
    is_apart = (grid[:, 0].max(axis=1) < grid[:, 1].min(axis=1)) | (grid[:, 0].min(axis=1) > grid[:, 1].max(axis=1))
    assert ours["text_score"][is_apart] == pytest.approx(literal[is_apart, 0])
    is_unlike = np.array([len(set(scores.flatten())) == 4 for scores in grid])
    assert ours["image_score"][is_unlike].tolist() == literal[is_unlike, 1].tolist()


@pytest.mark.parametrize(
    ("true", "false", "expected"), [(1, [0], 1), (0, [1], 0), (1, [1], 0.5), (1, [1, 1], 1 / 3), (1, [1, 2], 0)]
)
def test_a_true_sentence_is_first_in_expectation(true, false, expected):
    assert true_first(true, np.array(false, float)) == pytest.approx(expected)


def test_pairs_whose_images_are_missing_are_left_out_and_counted(images, tmp_path):
    pairs = write_sugar_crepe(tmp_path / "pairs")
    fewer = images.select([row for row, key in enumerate(images.keys) if key != "blue.png"])
    measured = SentencePairs(pairs=pairs).run(EvaluatedModel(ColourEncoder()), fewer)
    assert measured.details.num_missing == 1
    assert measured.warnings == ("1 of 3 pairs are left out: their images are not in the set.",)
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"filename": "x.jpg", "caption": "a", "negative_caption": "b"}]))
    with pytest.raises(UsageError, match=r"has none of the images of .*, such as 'x.jpg'; its own have names such as"):
        SentencePairs(pairs=str(other)).run(EvaluatedModel(ColourEncoder()), images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "other.json, line 1 is not JSON"),
        ('[{"filename": "a.jpg", "caption": "a"}]', "entry 0 has no negative_caption; it needs filename, caption"),
        ('[{"filename": "a.jpg", "caption": "a", "negative_caption": [1]}]', "is a text or a list of texts, not"),
        ("[]", "No sentence pairs at"),
    ],
)
def test_files_that_are_no_pairs_are_named(tmp_path, content, message):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_sentence_pairs(tmp_path / "other.json")


def test_pairs_may_be_the_captions_and_metadata_of_the_set(images):
    captioned = [{"": (f"a {key.removesuffix('.png')} thing",)} for key in images.keys]
    metadata = [{"negative_caption": ["a red thing", "a blue thing"], "category": "colour"} for _ in images.keys]
    packed = replace(images, captions=tuple(captioned), metadata=tuple(metadata))
    measured = SentencePairs().run(EvaluatedModel(ColourEncoder()), packed)
    # "red" and "blue" tie with one of the false sentences, which says the same
    assert measured.values["accuracy"].value == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert measured.values["accuracy"].chance == pytest.approx(1 / 3)
    with pytest.raises(UsageError, match=r"No sample of colours has a caption and the metadata field negative_caption"):
        SentencePairs().run(EvaluatedModel(ColourEncoder()), images)
