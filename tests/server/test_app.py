"""The API: what each route answers, and what it refuses."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import Caller
from vlm.server.app import create_app
from vlm.server.serving import open_service


def uids(answer):
    return [hit["uid"] for hit in answer["hits"]]


def test_a_search_answers_as_the_index_does(caller, expected, data_url, paint):
    assert uids(caller.search(texts=["red and blue"], top=5)) == expected(texts=("red and blue",), top=5)
    assert uids(caller.search(images=[data_url("green", "cyan")], top=3)) == expected(
        images=(paint("green", "cyan"),), top=3
    )
    some_uid = expected(texts=("red",), top=1)[0]
    assert uids(caller.search(items=[some_uid], top=4)) == expected(items=(some_uid,), top=4)
    assert uids(caller.search(texts=["red"], minus=["blue"], weights=[1, 0.5], top=4)) == expected(
        texts=("red",), minus=("blue",), weights=(1, 0.5), top=4
    )
    vector = [1.0] + [0.0] * 7
    assert uids(caller.search(vectors=[vector], top=2)) == expected(vectors=(tuple(vector),), top=2)


def test_pages_follow_one_another_to_the_end(caller, expected):
    seen, after = [], ""
    for _ in range(10):
        page = caller.search(texts=["red"], top=4, after=after)
        seen += uids(page)
        after = page["next"]
        if not after:
            break
    assert seen == expected(texts=("red",), top=100)
    assert len(seen) == 11


def test_a_hit_names_no_path_unless_asked_at_the_start(caller, index, model, tmp_path):
    answer = caller.search(texts=["red"], top=1)
    assert str(tmp_path) not in str(answer)
    assert set(answer["hits"][0]) == {"score", "uid", "key", "captions", "metadata"}
    from tests.server.conftest import Caller

    open_paths = Caller(create_app(open_service({"index": index}, shows_paths=True, load=lambda _: model)), {})
    assert open_paths.search(texts=["red"], top=1)["hits"][0]["path"].startswith(str(tmp_path))


def test_facets_count_the_rows_that_match_the_filter(caller):
    answer = caller.search(texts=["red"], top=1, facets=["width"])
    assert answer["facets"] == {"width": [{"value": 16, "rows": 11}]}
    keys = caller.post("/api/v1/indexes/index/facets", {"fields": ["key"], "where": "key in ('00', '01')"}).json()
    assert keys["facets"]["key"] == [{"value": "00", "rows": 1}, {"value": "01", "rows": 1}]
    wrong = caller.post("/api/v1/indexes/index/facets", {"fields": ["colour"]})
    assert wrong.status_code == 400
    assert "There is no column 'colour'; the columns are" in wrong.json()["error"]


def test_columns_are_described(caller):
    fields = {field["name"]: field for field in caller.get("/api/v1/indexes/index/fields").json()["fields"]}
    assert fields["width"] == {
        "name": "width", "types": ["number"], "distinct": 1, "minimum": 16, "maximum": 16, "is_category": True,
    }  # fmt: skip
    assert fields["key"]["distinct"] == 11


def test_an_item_has_its_captions_its_image_and_a_thumbnail(caller):
    uid = uids(caller.search(texts=["red"], top=1))[0]
    item = caller.get("/api/v1/indexes/index/item", params={"uid": uid})
    assert item.json()["uid"] == uid
    assert item.json()["captions"][""]
    image = caller.get("/api/v1/indexes/index/image", params={"uid": uid})
    assert image.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(image.content)).size == (16, 16)
    small = caller.get("/api/v1/indexes/index/thumbnail", params={"uid": uid, "size": 100})
    assert small.headers["content-type"] == "image/jpeg"
    assert "max-age" in small.headers["cache-control"]
    again = caller.get(
        "/api/v1/indexes/index/thumbnail",
        params={"uid": uid, "size": 100},
        headers={"if-none-match": small.headers["etag"]},
    )
    assert (again.status_code, again.content) == (304, b"")


def test_what_is_not_there_is_404(caller):
    for path in ("item", "image", "thumbnail"):
        response = caller.get(f"/api/v1/indexes/index/{path}", params={"uid": "nobody"})
        assert (response.status_code, response.json()["kind"]) == (404, "not_found")
    missing = caller.post("/api/v1/indexes/other/search", {"texts": ["red"]})
    assert (missing.status_code, missing.json()["error"]) == (404, "There is no index 'other'; the indexes are index.")
    assert caller.get("/nowhere").json()["kind"] == "not_found"
    assert caller.get("/api/v1/indexes/index/search").status_code == 405


def test_an_image_whose_shard_is_gone_is_404_without_its_path(caller, shards):
    uid = uids(caller.search(texts=["red"], top=1))[0]
    for shard in shards:
        Path(shard).unlink()
    response = caller.get("/api/v1/indexes/index/image", params={"uid": uid})
    assert response.status_code == 404
    assert "moved, removed or damaged" in response.json()["error"]
    assert "shards" not in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "A query needs a text, image, item or vector"),
        ({"texts": ["red"], "tpo": 3}, 422, "tpo: Extra inputs are not permitted"),
        ({"texts": ["red"], "top": 0}, 422, "top: "),
        ({"texts": ["red"], "top": 5000}, 400, "top = 5,000 is out of range: at most 1,000"),
        ({"texts": ["red"] * 33}, 422, "at most 32 items"),
        ({"texts": "red"}, 422, "texts: "),
        ({"texts": ["red"], "where": "width >"}, 400, "The filter, at column 8"),
        ({"texts": ["red"], "after": "zzz"}, 400, "'zzz' is not a cursor"),
        ({"items": ["nobody"]}, 400, "no item 'nobody'"),
        ({"images": ["http://example.org/a.jpg"]}, 400, "must be a data URL"),
        ({"images": ["data:image/png;base64,@@@"]}, 400, "not valid base64"),
        ({"images": ["data:image/png;base64," + base64.b64encode(b"no image").decode()]}, 400, "is not an image"),
        ({"vectors": [[1.0, 2.0]]}, 400, "has 2 numbers"),
        ({"texts": ["red"], "facets": ["nothing"]}, 400, "There is no column 'nothing'"),
    ],
)
def test_a_wrong_request_is_one_clear_error(caller, body, status, message):
    response = caller.post("/api/v1/indexes/index/search", body)
    assert response.status_code == status, response.text
    problem = response.json()
    assert set(problem) == {"error", "kind", "request_id"}
    assert message in problem["error"]
    assert problem["request_id"] == response.headers["x-request-id"]


def test_a_batch_answers_each_query_or_says_what_is_wrong_with_it(caller, expected):
    body = {"queries": [{"texts": ["red"], "top": 2}, {"items": ["nobody"]}, {"texts": ["blue"], "top": 2}]}
    results = caller.post("/api/v1/indexes/index/batch", body).json()["results"]
    assert uids(results[0]) == expected(texts=("red",), top=2)
    assert "no item 'nobody'" in results[1]["error"]
    assert uids(results[2]) == expected(texts=("blue",), top=2)


def test_broken_json_and_a_very_deep_one_are_refused(caller):
    for content in (b"{", b"[" * 100_000, b'{"texts": ["\xff"]}'):
        response = caller(
            "POST", "/api/v1/indexes/index/search", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code in (400, 422)
        assert set(response.json()) == {"error", "kind", "request_id"}


def test_an_image_with_too_many_pixels_is_refused_by_its_header(caller):
    file = io.BytesIO()
    Image.fromarray(np.zeros((8000, 8000), np.uint8)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    response = caller.post("/api/v1/indexes/index/search", {"images": [url]})
    assert response.status_code == 400
    assert "8,000 × 8,000 pixels; at most 50,000,000" in response.json()["error"]


def test_health_readiness_and_figures(caller):
    assert caller.get("/health").json() == {"status": "ok"}
    ready = caller.get("/ready").json()
    assert ready["status"] == "ready"
    caller.search(texts=["red"], top=1)
    caller.search(texts=["red"], top=1)
    figures = caller.get("/metrics").text
    assert 'vlm_index_rows{index="index"} 11.0' in figures
    assert 'vlm_requests_total{method="POST",route="/api/v1/indexes/{name}/search",status="200"} 2.0' in figures
    assert 'vlm_cache_hits{index="index"} 1.0' in figures
    assert 'vlm_stage_seconds_count{stage="search"} 2.0' in figures


def test_a_service_is_not_ready_while_its_model_is_wrong(index, make_model):
    from tests.server.conftest import Caller

    caller = Caller(create_app(open_service({"index": index}, load=lambda _: make_model(fingerprint="another"))), {})
    response = caller.get("/ready")
    assert (response.status_code, response.json()["index"]) == (503, "index")
    assert caller.get("/health").status_code == 200


def test_the_description_names_every_route_with_its_errors(caller):
    described = caller.get("/api/v1/openapi.json").json()
    search = described["paths"]["/api/v1/indexes/{name}/search"]["post"]
    assert {"200", "400", "404", "422", "503"} <= set(search["responses"])
    assert described["components"]["schemas"]["SearchRequest"]["examples"]
    assert {"/v1/embeddings", "/knn-service", "/metadata", "/ready"} <= set(described["paths"])


def resolved(described, schema):
    """A schema of the description, without its reference."""
    return described["components"]["schemas"][schema["$ref"].split("/")[-1]] if "$ref" in schema else schema


def test_every_answer_is_described_and_every_body_has_an_example_that_is_answered(index, model):
    service = open_service({"index": index}, write_tokens=frozenset({"w"}), load=lambda _: model)
    caller = Caller(create_app(service), {"authorization": "Bearer w"})
    described = caller.get("/api/v1/openapi.json").json()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            [answer] = operation["responses"]["200"].get("content", {"": {}}).values()
            is_file = path.endswith(("/image", "/thumbnail", "/metrics"))
            assert is_file or answer["schema"], path
            if method != "post":
                continue
            schema = resolved(described, operation["requestBody"]["content"]["application/json"]["schema"])
            assert schema["examples"]
            # the model that knows colours writes no captions and has no tower to explain: test_caption, test_explain
            for example in () if path.endswith(("/caption", "/explain")) else schema["examples"]:
                # the examples name items of other indexes, and a column that this one lacks
                text = json.dumps(example).replace("train-000005", "00").replace("year < 2000", "key = '00'")
                text = text.replace("1200", "1")
                response = caller.post(path.replace("{name}", "index"), json.loads(text))
                wanted = 404 if path.endswith("/map") else 200
                assert response.status_code == wanted, (path, response.text)


def test_words_are_fused_duplicates_folded_and_a_column_counted_in_one_answer(caller, expected):
    wanted = expected(texts=("red",), words="stripes blue", top=5)
    answer = caller.search(texts=["red"], words="stripes blue", top=5, facets=["width"])
    assert uids(answer) == wanted
    assert all("fused" in hit for hit in answer["hits"])
    assert answer["facets"] == {"width": [{"value": 16, "rows": 11}]}
    folded = caller.search(texts=["red"], duplicates=0.45, top=20)
    assert uids(folded) == expected(texts=("red",), duplicates=0.45, top=20)
    assert sum(hit.get("similar", 0) for hit in folded["hits"]) + len(folded["hits"]) <= 11
    assert len(folded["hits"]) < 11


def test_the_page_comes_with_a_policy_and_is_small(caller):
    sizes = 0
    for path, media_type in (
        ("/", "text/html"),
        ("/page.js", "text/javascript"),
        ("/map.js", "text/javascript"),
        ("/page.css", "text/css"),
    ):
        response = caller.get(path)
        assert response.headers["content-type"].startswith(media_type)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "http://" not in response.text.replace("http://service", "")
        assert "https://" not in response.text
        sizes += len(response.content)
    assert sizes < 150_000


def test_images_given_and_stored_are_classified(caller, data_url):
    uid = uids(caller.search(texts=["red"], top=1))[0]
    body = {"images": [data_url("blue")], "items": [uid], "classes": ["red", "blue", "green"], "top": 2}
    results = caller.post("/api/v1/indexes/index/classify", body).json()["results"]
    assert results[0]["classes"][0]["name"] == "blue"
    assert [len(result["classes"]) for result in results] == [2, 2]
    refused = caller.post("/api/v1/indexes/index/classify", {"classes": ["red", "blue"]})
    assert (refused.status_code, refused.json()["kind"]) == (400, "bad_request")
    wrong = caller.post("/api/v1/indexes/index/classify", body | {"templates": ["a photo"]})
    assert wrong.status_code == 400
    assert "{}" in wrong.json()["error"]


def test_only_what_is_likely_relevant_is_kept_on_request(caller, expected):
    refused = caller.post("/api/v1/indexes/index/search", {"texts": ["red"], "relevant": True})
    # too few rows to measure against; the reason comes through
    assert refused.status_code == 400
    assert "20" in refused.json()["error"]
    wrong = caller.post("/api/v1/indexes/index/search", {"texts": ["red"], "relevant": 1.5})
    assert wrong.status_code == 422
