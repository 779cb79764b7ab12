"""The map over HTTP: regions, colours, places of results, additions and deletions, and what is refused."""

import pytest

from tests.server.conftest import Caller
from vlm.api.index import open_index
from vlm.server.app import create_app
from vlm.server.serving import open_service

MAP = "/api/v1/indexes/index/map"


@pytest.fixture
def mapped(index, model):
    with open_index(index, model=model) as opened:
        opened.make_map()
    return index


@pytest.fixture
def mapped_caller(mapped, model):
    service = open_service({"index": mapped}, write_tokens=frozenset({"w"}), load=lambda _: model)
    return Caller(create_app(service), {"authorization": "Bearer w"})


def test_the_whole_map_and_a_region_of_it(mapped_caller, mapped):
    whole = mapped_caller.post(MAP, {}).json()
    points = whole["points"]
    uids = set(points["uids"])
    assert whole["rows"] == whole["inside"] == len(uids) == 11
    assert whole["new"] == whole["unplaced"] == 0
    assert points["values"] == [-1] * 11
    assert max(map(abs, points["x"] + points["y"])) <= 1
    assert whole["bounds"] == [min(points["x"]), min(points["y"]), max(points["x"]), max(points["y"])]
    middle = sum(sorted(points["x"])[5:7]) / 2
    left = mapped_caller.post(MAP, {"box": [-1, -1, middle, 1], "top": 3}).json()
    assert (left["inside"], len(left["points"]["uids"])) == (6, 3)
    for x, uid in zip(left["points"]["x"], left["points"]["uids"], strict=True):
        assert x == points["x"][points["uids"].index(uid)] <= middle


def test_points_are_coloured_by_the_most_frequent_values_of_a_column(mapped_caller):
    answer = mapped_caller.post(MAP, {"colour": "width"}).json()
    assert answer["legend"] == [{"value": 16, "rows": 11}]
    assert answer["points"]["values"] == [0] * 11
    by_key = mapped_caller.post(MAP, {"colour": "key", "where": "key < '20'"}).json()
    assert (by_key["inside"], len(by_key["legend"])) == (7, 7)
    numbers = dict(zip(by_key["points"]["uids"], by_key["points"]["values"], strict=True))
    assert by_key["legend"][numbers["01"]] == {"value": "01", "rows": 1}


def test_places_of_results_are_given_whether_shown_or_not(mapped_caller):
    answer = mapped_caller.post(MAP, {"top": 1, "uids": ["00", "21", "nobody"]}).json()
    assert answer["places"].keys() == {"00", "21"}
    whole = mapped_caller.post(MAP, {}).json()["points"]
    number = whole["uids"].index("21")
    assert answer["places"]["21"] == [whole["x"][number], whole["y"][number]]


def test_additions_lie_among_their_like_and_deletions_vanish(mapped_caller, data_url):
    item = {"image": data_url("black", "blue"), "uid": "twin"}
    assert mapped_caller.post("/api/v1/indexes/index/add", {"items": [item]}).status_code == 200
    assert mapped_caller.post("/api/v1/indexes/index/delete", {"uids": ["01"]}).status_code == 200
    answer = mapped_caller.post(MAP, {"uids": ["00", "01", "twin"]}).json()
    assert (answer["rows"], answer["new"], answer["unplaced"]) == (11, 1, 0)
    # stripes of the same two colours
    assert answer["places"]["twin"] == pytest.approx(answer["places"]["00"], abs=0.01)
    assert "01" not in answer["places"]
    assert "01" not in answer["points"]["uids"]


def test_the_information_of_an_index_says_whether_it_has_a_map(mapped_caller, caller):
    assert mapped_caller.get("/api/v1/indexes").json()["indexes"][0]["map_rows"] == 11


def test_without_a_map_the_cure_is_named(caller, index):
    assert caller.get("/api/v1/indexes").json()["indexes"][0]["map_rows"] == 0
    answer = caller.post(MAP, {})
    assert (answer.status_code, answer.json()["kind"]) == (404, "not_found")
    assert "Index index has no map; make one with vlm index map" in answer.json()["error"]
    assert str(index) not in answer.text


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"box": [0, 0, 1]}, 422, "box"),
        ({"top": 10_001}, 422, "top"),
        ({"colour": "nothing"}, 400, "There is no column 'nothing'"),
        ({"where": "width >"}, 400, "The filter, at column 8"),
        ({"uids": ["a"] * 1001}, 422, "uids"),
        ({"color": "key"}, 422, "color"),
    ],
)
def test_a_wrong_request_is_refused_in_words(mapped_caller, body, status, message):
    answer = mapped_caller.post(MAP, body)
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_a_damaged_map_is_said_without_a_path(mapped, model):
    service = open_service({"index": mapped}, load=lambda _: model)
    [path] = (mapped / "maps").iterdir()
    path.write_bytes(b"x" * path.stat().st_size)
    answer = Caller(create_app(service), {}).post(MAP, {})
    assert (answer.status_code, answer.json()["kind"]) == (422, "unprocessable")
    assert "The map of index index cannot be read" in answer.json()["error"]
    assert str(mapped) not in answer.text


def test_several_items_come_at_once_in_their_order(caller):
    items = caller.post("/api/v1/indexes/index/items", {"uids": ["21", "00"]}).json()["items"]
    assert [item["uid"] for item in items] == ["21", "00"]
    assert items[1]["captions"] == {"": ["black and blue", "stripes of blue"]}
    unknown = caller.post("/api/v1/indexes/index/items", {"uids": ["00", "nobody"]})
    assert (unknown.status_code, "has no item 'nobody'" in unknown.json()["error"]) == (404, True)
