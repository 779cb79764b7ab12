"""Captions over HTTP as beam search and sampling write them, several for each image."""

from typing import Any

import pytest

from tests.random_model import random_model
from vlm.api.inference import DecodingOptions, Model
from vlm.data.tokenizers import open_tokenizer

ROUTE = "/api/v1/indexes/index/caption"


@pytest.fixture
def model(scene_tokenizer) -> Any:
    """A captioner of random weights, in place of the model that knows colours."""
    return random_model("tiny-coca", open_tokenizer(str(scene_tokenizer), 24))


def test_images_given_and_stored_are_captioned_as_by_the_call(caller, model, paint, data_url):
    uid = caller.search(texts=["red"], top=1)["hits"][0]["uid"]
    body = {"images": [data_url("blue", "red")], "items": [uid], "prompt": "a", "beams": 3, "captions": 2}
    answer = caller.post(ROUTE, body).json()
    decoding = DecodingOptions(prompt="a", beams=3, captions=2)
    [expected] = Model(model).caption([paint("blue", "red")], decoding=decoding).to_json()
    assert answer["results"][0]["captions"] == [
        {"caption": caption["caption"], "log_likelihood": pytest.approx(caption["log_likelihood"], abs=1e-5)}
        for caption in expected["captions"]
    ]
    assert answer["captions"] == [result["captions"][0]["caption"] for result in answer["results"]]
    assert [len(result["captions"]) for result in answer["results"]] == [2, 2]
    sampled = body | {"beams": 1, "sample": True, "top_p": 0.9, "seed": 5, "max_length": 8}
    assert caller.post(ROUTE, sampled).json() == caller.post(ROUTE, sampled).json()


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"captions": 4}, 400, "need as many beams"),
        ({"beams": 1000}, 422, "beams"),
        ({"max_length": 999}, 400, "above the model's context of 24"),
        ({"top_p": 0.5}, 400, "give sample"),
    ],
)
def test_options_that_do_not_fit_are_refused(caller, data_url, change, status, message):
    response = caller.post(ROUTE, {"images": [data_url("blue")]} | change)
    assert response.status_code == status
    assert message in response.json()["error"]
