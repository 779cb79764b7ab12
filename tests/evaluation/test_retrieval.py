import io
import json
import tarfile

import numpy as np
import pytest
import torch

from tests.data.tar_fixture import tiny_image
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.evaluation.retrieval import evaluate_retrieval, measure_retrieval


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
