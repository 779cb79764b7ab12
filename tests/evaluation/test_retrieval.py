import io
import json
import tarfile

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image

from tests.data.tar_fixture import tiny_image
from tests.evaluation.encoders import ColourEncoder
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation import retrieval_metrics
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.retrieval import Retrieval, evaluate_retrieval
from vlm.evaluation.retrieval_metrics import FlatCaptions, measure_retrieval


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_perfect_model_finds_all_with_several_captions_each():
    images = unit(np.eye(5))
    captions = [[f"{number} a", f"{number} b"] for number in range(5)]
    found = measure_retrieval(images, np.repeat(images, 2, axis=0), captions)
    assert found.text_to_image.recall[1] == found.image_to_text.recall[1] == 1.0
    assert found.text_to_image.median_rank == 1.0
    assert (found.num_images, found.num_texts) == (5, 10)


def test_images_with_the_same_caption_are_right_answers_for_each_other():
    images = unit([[1, 0], [0, 1]])
    texts = unit([[0, 1], [0, 1]])
    assert measure_retrieval(images, texts, [["same"], ["same"]]).text_to_image.recall[1] == 1.0
    assert measure_retrieval(images, texts, [["one"], ["other"]]).text_to_image.recall[1] == 0.5


def test_one_right_caption_of_many_is_enough_for_a_image():
    images = unit([[1, 0], [0, 1]])
    texts = unit([[0.1, 1], [1, 0], [0, 1], [-1, 0]])
    found = measure_retrieval(images, texts, [["a", "b"], ["c", "d"]])
    assert found.image_to_text.recall[1] == 1.0
    assert found.text_to_image.recall[1] == 0.75


def test_a_image_without_captions_is_an_answer_but_no_query():
    images = unit([[1, 0], [0.9, 0.1]])
    found = measure_retrieval(images, unit([[0.9, 0.1]]), [["a"], []])
    assert found.image_to_text.num_queries == 1
    assert found.text_to_image.recall[1] == 0.0


class WordModel:
    """Embeds all images and all texts alike."""

    name = "words"
    fingerprint = "words"
    logit_scale = 1.0
    view = EvalTransform(size=16)

    def embed_images(self, images):
        return torch.ones(len(images), 2) / 2**0.5

    def embed_texts(self, texts):
        return torch.ones(len(texts), 2) / 2**0.5


def test_an_image_that_lacks_a_language_is_a_candidate_only(tmp_path, logged):
    """One image of a multilingual set without a German caption ended the whole evaluation."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(4):
            captions = {"en": [f"mill {number}"]} | ({"de": ["Mühle", f"Mühle {number}"]} if number else {})
            for name, data in (("jpg", tiny_image(number)), ("json", json.dumps({"captions": captions}).encode())):
                entry = tarfile.TarInfo(f"{number}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    shards = [str(tmp_path / "0.tar")]
    german = evaluate_retrieval(WordModel(), shards, languages=("de", "fr"))
    assert (german.num_images, german.num_texts) == (4, 6)
    assert (german.image_to_text.num_queries, german.text_to_image.num_queries) == (3, 6)
    assert "1 of 4 images have no caption in de, fr: they are candidates" in logged.text
    assert "No image has a caption in 'fr'; there are captions in de, en." in logged.text
    with pytest.raises(UsageError, match=r"No image with a caption in fr can be used .* its captions are in de, en\."):
        evaluate_retrieval(WordModel(), shards, languages=("fr",))
    logged.clear()
    assert evaluate_retrieval(WordModel(), shards, languages=("en",)).num_texts == 4
    assert not logged.text


def test_metrics_are_flat_names():
    images = unit(np.eye(3))
    metrics = measure_retrieval(images, images, [["a"], ["b"], ["c"]]).metrics()
    assert metrics["text_to_image_recall@1"] == 1.0
    assert metrics["image_to_text_median_rank"] == pytest.approx(1.0)


CAPTIONS = [["a", "b"], ["a"], ["c"], []]


def test_an_equal_caption_of_another_image_is_right_or_wrong_as_asked():
    images = unit([[1, 0, 0], [0.9, 0.1, 0], [0, 0, 1], [0, 1, 0]])
    texts = unit([[0.9, 0.1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]])
    right = measure_retrieval(images, texts, CAPTIONS)
    wrong = measure_retrieval(images, texts, CAPTIONS, same_text="negative")
    # the two captions "a" each find the other image first
    assert (right.text_to_image.recall[1], wrong.text_to_image.recall[1]) == (1.0, 0.5)
    assert right.text_to_image.mean_average_precision == 1.0
    assert wrong.text_to_image.mean_reciprocal_rank == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)


def test_pairs_are_those_of_equal_texts():
    pairs = FlatCaptions.from_images([["a", "b", "a"], ["a"], ["c"], []]).pairs(4, "positive")
    assert sorted(zip(pairs.rows.tolist(), pairs.columns.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3), (2, 4),
    ]  # fmt: skip
    own = FlatCaptions.from_images([["a", "b", "a"], ["a"]]).pairs(2, "negative")
    assert (own.rows.tolist(), own.columns.tolist()) == ([0, 0, 0, 1], [0, 1, 2, 3])


def test_captions_that_name_classes_leave_out_what_counts_every_positive(logged):
    images = unit(np.random.default_rng(0).standard_normal((80, 4)))
    found = measure_retrieval(images, images, [[f"class {number % 2}"] for number in range(80)])
    assert found.text_to_image.mean_average_precision is None
    assert found.text_to_image.recall[10] > 0.9
    assert "A caption is right for 40 images on average" in logged.text


def test_captions_too_alike_for_memory_are_refused(monkeypatch):
    monkeypatch.setattr(retrieval_metrics, "_MOST_PAIRS", 50)
    with pytest.raises(UsageError, match=r"100 pairs of an image and a right caption, more than fit .* classification"):
        measure_retrieval(np.ones((10, 2), np.float32), np.ones((10, 2), np.float32), [["same"]] * 10)


def test_recall_is_that_of_a_literal_reading_of_clip_benchmark():
    """Its functions as they are published: top-k, one-hot, true positives per positive, above 0."""
    rng = np.random.default_rng(2)
    images, texts = torch.from_numpy(unit(rng.standard_normal((40, 8)))), unit(rng.standard_normal((120, 8)))
    image_of = torch.arange(40).repeat_interleave(3)
    scores = torch.from_numpy(texts) @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(120), image_of] = True
    captions = [[f"{number} {caption}" for caption in range(3)] for number in range(40)]
    ours = measure_retrieval(images.numpy(), texts, captions, same_text="negative")
    for direction, table, right in (
        (ours.text_to_image, scores, positive),
        (ours.image_to_text, scores.T, positive.T),
    ):
        for k in (1, 5, 10):
            best = table.topk(k, dim=1).indices
            found = torch.gather(right, 1, best).sum(dim=1) / right.sum(dim=1)
            assert direction.recall[k] == pytest.approx((found > 0).float().mean().item())


@pytest.fixture
def colour_set(tmp_path):
    """Six images of three colours with captions in two languages, two of them the same, and one without German."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(6):
            word = list(colours)[number % 3]
            captions = {"en": [f"{word} thing", f"{word} {number}"]} | ({"de": [f"{word} Ding"]} if number else {})
            file = io.BytesIO()
            Image.new("RGB", (16, 16), colours[word]).save(file, format="PNG")
            members = {"png": file.getvalue(), "json": json.dumps({"captions": captions}).encode()}
            for name, data in members.items():
                entry = tarfile.TarInfo(f"{number}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return open_evaluation_set(str(tmp_path / "0.tar"), name="colours")


def test_the_evaluator_says_of_each_query_what_it_found_and_of_each_value_what_chance_gives(colour_set):
    measured = Retrieval(languages=("en",)).run(EvaluatedModel(ColourEncoder()), colour_set)
    assert (measured.evaluator, measured.data, measured.num_images) == ("retrieval", "colours", 6)
    # "red thing" is right for both red images; "red 0" for one, which ties with the other
    assert measured.values["text_to_image_recall@1"].value == pytest.approx(0.75)
    assert measured.values["text_to_image_recall@1"].chance == pytest.approx((2 / 6 + 1 / 6) / 2)
    assert measured.values["image_to_text_recall@1"].value == pytest.approx(3 / 4)
    assert measured.values["text_to_image_median_rank"].value == pytest.approx(1.25)
    interval = measured.values["text_to_image_mrr"]
    assert interval.low <= interval.value <= interval.high
    samples = measured.samples.to_pylist()
    assert len(samples) == 12 + 6
    first = samples[1]
    assert (first["key"], first["direction"], first["language"], first["caption"]) == (
        "0", "text_to_image", "en", "red 0",
    )  # fmt: skip
    assert (first["wrong_key"], first["text_to_image_rank"]) == ("3", 1.5)
    assert samples[0]["wrong_key"] in set("1245")
    assert samples[12]["wrong_caption"] == "red 3"
    assert samples[12]["text_to_image_recall@1"] is None
    for name, value in measured.values.items():
        if name in measured.samples.column_names:
            assert pc.mean(measured.samples[name]).as_py() == pytest.approx(value.value)
    assert measured.to_json()["details"]["text_to_image"]["recall"]["1"] == pytest.approx(0.75)


def test_languages_are_measured_together_and_apart_in_one_pass_of_the_images(colour_set):
    encoder = ColourEncoder()
    for languages in (("en", "de"), ("all",)):
        measured = Retrieval(languages=languages).run(EvaluatedModel(encoder), colour_set)
        assert set(measured.details.by_language) == {"en", "de"}
        german = measured.details.by_language["de"]
        assert (german.num_texts, german.image_to_text.num_queries, german.num_images) == (5, 5, 6)
        assert measured.details.num_texts == 17
        alone, warnings = Retrieval(languages=("de",)).measure(EvaluatedModel(ColourEncoder()), colour_set)
        assert alone == german
        assert measured.values["de/text_to_image_recall@5"].value == german.text_to_image.recall[5]
        assert "1 of 6 images have no caption in de" in warnings[0]
    assert encoder.num_images == 2 * 6
    means = {row["captions"]: [] for row in measured.samples.to_pylist()}
    assert set(means) == {"all", "en", "de"}


@pytest.mark.parametrize("languages", [(), ("en",), ("de", "fr")])
def test_measuring_without_intervals_gives_the_same_figures(colour_set, languages):
    evaluator = Retrieval(languages=languages)
    result, warnings = evaluator.measure(EvaluatedModel(ColourEncoder()), colour_set)
    measured = evaluator.run(EvaluatedModel(ColourEncoder()), colour_set)
    assert measured.details == result
    assert measured.warnings == warnings
    assert {name: value.value for name, value in measured.values.items()} == result.metrics()
