import numpy as np
import pytest

from vlm.evaluation.retrieval import measure_retrieval


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


def test_metrics_are_flat_names():
    images = unit(np.eye(3))
    metrics = measure_retrieval(images, images, [["a"], ["b"], ["c"]]).metrics()
    assert metrics["text_to_image_recall@1"] == 1.0
    assert metrics["image_to_text_median_rank"] == pytest.approx(1.0)
