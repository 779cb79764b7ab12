"""The shapes that clients of other tools expect."""

import base64
import json

import numpy as np
import pytest


def test_embeddings_are_those_of_the_model(caller, model, data_url, paint):
    body = {"input": ["red", data_url("blue"), "a green"], "model": "anything"}
    answer = caller.post("/v1/embeddings", body).json()
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    vectors = np.array([entry["embedding"] for entry in answer["data"]], np.float32)
    texts = np.asarray(model.embed_texts(["red", "a green"]))
    assert np.allclose(vectors[[0, 2]], texts, atol=1e-7)
    assert vectors[1].argmax() == 1
    assert answer["object"] == "list"


def test_one_text_and_base64_are_understood(caller, model):
    answer = caller.post("/v1/embeddings", {"input": "red", "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert np.allclose(vector, np.asarray(model.embed_texts(["red"]))[0], atol=1e-7)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "has 0 entries"),
        ({"input": ["a", " "]}, "is empty"),
        ({"input": "a", "dimensions": 3}, "gives 8"),
        ({"input": ["data:image/png;base64,QUJD"]}, "not an image"),
    ],
)
def test_inputs_that_cannot_be_embedded_are_refused(caller, body, message):
    response = caller.post("/v1/embeddings", body)
    assert response.status_code == 400
    assert message in response.json()["error"]


def ask_knn(caller, **fields):
    """As clip-retrieval's client asks: JSON without a content type, all fields there."""
    body = {
        "text": None, "image": None, "image_url": None, "embedding_input": None, "deduplicate": False,
        "use_safety_model": True, "use_violence_detector": True, "indice_name": "index", "use_mclip": False,
        "aesthetic_score": 9, "aesthetic_weight": 0.5, "modality": "image", "num_images": 3, "num_result_ids": 5,
    }  # fmt: skip
    return caller("POST", "/knn-service", content=json.dumps(body | fields).encode())


def test_knn_service_answers_text_image_and_vector(caller, paint):
    wanted = caller.search(texts=["red"], top=5)["hits"]
    hits = ask_knn(caller, text="red").json()
    assert [hit.get("uid") for hit in hits] == [hit["uid"] for hit in wanted[:3]] + [None, None]
    assert [round(hit["similarity"], 5) for hit in hits] == [round(hit["score"], 5) for hit in wanted]
    assert "red" in hits[0]["caption"] or hits[0]["similarity"] > 0
    image = base64.b64encode(paint("blue")).decode()
    assert ask_knn(caller, image=image).status_code == 200
    assert len(ask_knn(caller, embedding_input=[1.0] + [0.0] * 7).json()) == 5


def test_metadata_is_found_by_the_ids_of_the_hits(caller):
    hits = ask_knn(caller, text="red").json()
    ids = [hit["id"] for hit in hits]
    answers = caller("POST", "/metadata", content=json.dumps({"ids": ids, "indice_name": "index"}).encode()).json()
    assert [answer["id"] for answer in answers] == ids
    assert answers[0]["metadata"]["uid"] == hits[0]["uid"]
    assert caller.get("/indices-list").json() == ["index"]


def test_metadata_of_rows_that_are_not_there_is_refused_without_a_path(caller, index):
    from vlm.api.index import open_index

    ids = [hit["id"] for hit in ask_knn(caller, text="red").json()]
    with open_index(index) as opened:
        opened.delete(ask_knn(caller, text="red").json()[0]["uid"])
    caller.search(texts=["red"])
    for wrong in (ids[0], 10**6, -1, 2**70):
        response = caller("POST", "/metadata", content=json.dumps({"ids": [ids[1], wrong]}).encode())
        assert response.status_code in (400, 404), response.text
        assert str(index) not in response.text
    assert caller("POST", "/metadata", content=json.dumps({"ids": ids[1:]}).encode()).status_code == 200


def test_no_address_is_fetched(caller):
    response = ask_knn(caller, image_url="http://127.0.0.1:1/a.jpg")
    assert response.status_code == 400
    assert "the server fetches nothing" in response.json()["error"]


def test_duplicates_are_folded_when_asked(caller):
    folded = ask_knn(caller, text="red", deduplicate=True, num_result_ids=100).json()
    every = ask_knn(caller, text="red", num_result_ids=100).json()
    assert len(folded) <= len(every)
    assert {hit["id"] for hit in folded} <= {hit["id"] for hit in every}
