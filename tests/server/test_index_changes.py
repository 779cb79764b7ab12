"""Adding and deleting over HTTP: what is found afterwards, what is refused whole, and who waits for whom."""

import asyncio
import base64
import logging
import threading

import psutil
import pytest

import vlm
from tests.server.conftest import Caller
from vlm.errors import UsageError
from vlm.index.reader import Index
from vlm.index.writer import IndexWriter
from vlm.server.app import create_app
from vlm.server.index_changes import ChangeQueue
from vlm.server.serving import open_service, serve_in_background

ADD = "/api/v1/indexes/index/add"
DELETE = "/api/v1/indexes/index/delete"


@pytest.fixture
def writing(index, model):
    """A service that is open to a writer, and its token."""
    return open_service({"index": index}, write_tokens=frozenset({"w"}), load=lambda _: model)


@pytest.fixture
def writer(writing):
    return Caller(create_app(writing), {"authorization": "Bearer w"})


def all_uids(folder):
    opened = Index.open(folder)
    try:
        return sorted(entry.uid for _, entry in opened.snapshot.entries())
    finally:
        opened.close()


def test_a_search_finds_an_image_as_soon_as_its_addition_is_answered(writer, data_url):
    before = writer.get("/api/v1/indexes").json()["indexes"][0]
    item = {
        "image": data_url("magenta", "yellow"),
        "uid": "new/1",
        "captions": ["magenta then yellow", "two stripes"],
        "metadata": {"year": 2026, "place": {"name": "here"}},
    }
    answer = writer.post(ADD, {"items": [item]})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "rows": before["rows"] + 1,
        "added": 1,
        "known": 0,
        "generation": before["generation"] + 1,
        "uids": ["new/1"],
    }
    hit = writer.search(images=[data_url("magenta", "yellow")], where="year = 2026", top=1)["hits"][0]
    assert (hit["uid"], hit["captions"], hit["metadata"]["place"]) == (
        "new/1",
        {"": ["magenta then yellow", "two stripes"]},
        {"name": "here"},
    )
    assert writer.get("/api/v1/indexes/index/image", params={"uid": "new/1"}).content == base64.b64decode(
        item["image"].partition(",")[2]
    )


def test_images_without_a_uid_are_named_by_their_bytes_and_added_once(writer, data_url):
    body = {"items": [{"image": data_url("magenta", "yellow")}, {"image": data_url("yellow", "magenta")}]}
    first = writer.post(ADD, body).json()
    again = writer.post(ADD, body).json()
    assert (first["added"], first["known"]) == (2, 0)
    assert (again["added"], again["known"]) == (0, 2)
    assert again["uids"] == first["uids"]
    assert again["generation"] == first["generation"]
    assert writer.get("/api/v1/indexes/index/item", params={"uid": first["uids"][0]}).status_code == 200


@pytest.mark.parametrize(
    ("second", "status", "message"),
    [
        ({"image": "data:image/png;base64," + base64.b64encode(b"no image").decode()}, 400, "Image 2 cannot be added"),
        ({"image": "http://example.org/a.png"}, 400, "the server fetches nothing"),
        ({"image": "CUT"}, 400, "Image 2 cannot be added"),
        ({"image": "GOOD", "uid": "EXISTING"}, 400, "Index index has"),
        ({"image": "GOOD", "uid": "one"}, 400, "2 of the images have the uid 'one'"),
        ({"image": "GOOD", "metadata": {"long": "x" * 70_000}}, 422, "at most 65,536"),
        ({"image": "GOOD", "metadata": {"deep": [[[[[[[[[1]]]]]]]]]}}, 422, "more than 8 levels"),
        ({"image": "GOOD", "captions": [""]}, 422, "captions"),
        ({"image": "GOOD", "caption": "misspelt"}, 422, "Extra inputs"),
    ],
)
def test_one_bad_image_and_nothing_is_added(writer, index, data_url, paint, second, status, message):
    before = all_uids(index)
    files = sorted(path.name for path in index.rglob("*"))
    good = data_url("magenta", "yellow")
    cut = base64.b64encode(paint("red", "blue")[: len(paint("red", "blue")) // 2]).decode()
    replaced = {"GOOD": good, "CUT": f"data:image/png;base64,{cut}", "EXISTING": before[0]}
    second = {name: replaced.get(value, value) if isinstance(value, str) else value for name, value in second.items()}
    answer = writer.post(ADD, {"items": [{"image": data_url("cyan", "red"), "uid": "one"}, second]})
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text
    assert str(index.parent) not in answer.text
    assert all_uids(index) == before
    assert sorted(path.name for path in index.rglob("*")) in (files, sorted([*files, "writer.lock"]))


def test_rows_are_deleted_by_uid_and_by_filter_or_only_counted(writer, index):
    uids = all_uids(index)
    counted = writer.post(DELETE, {"where": "key in ('00', '01')", "dry_run": True}).json()
    assert (counted["deleted"], counted["rows"], counted["examples"]) == (2, len(uids) - 2, ["00", "01"])
    assert all_uids(index) == uids
    deleted = writer.post(DELETE, {"uids": uids[:1]}).json()
    assert (deleted["deleted"], deleted["rows"]) == (1, len(uids) - 1)
    assert uids[0] not in [hit["uid"] for hit in writer.search(texts=["red"], top=100)["hits"]]
    filtered = writer.post(DELETE, {"where": "width = 16", "expect": len(uids) - 1}).json()
    assert (filtered["rows"], filtered["generation"]) == (0, deleted["generation"] + 1)
    assert writer.search(texts=["red"])["hits"] == []
    # without a segment, the type that the next one would have
    described = writer.get("/api/v1/indexes").json()["indexes"][0]
    assert described["kind"] == Index.open(index).info().kind == "flat"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"uids": ["nobody"]}, "Index index has no 'nobody'"),
        ({"uids": ["nobody"], "dry_run": True}, "Index index has no 'nobody'"),
        ({}, "either uids or a filter"),
        ({"uids": ["a"], "where": "width = 16"}, "either uids or a filter"),
        ({"where": "width >"}, "The filter, at column 8"),
    ],
)
def test_a_wrong_deletion_deletes_nothing(writer, index, body, message):
    before = all_uids(index)
    answer = writer.post(DELETE, body)
    assert (answer.status_code, message in answer.json()["error"]) == (400, True), answer.text
    assert str(index.parent) not in answer.text
    assert all_uids(index) == before


def test_most_of_an_index_is_deleted_only_by_who_says_how_much(writer, index):
    before = all_uids(index)
    for body in ({"where": "width = 16"}, {"uids": before[:6]}):
        answer = writer.post(DELETE, body)
        assert answer.status_code == 400
        number = 11 if "where" in body else 6
        assert (
            f"{number} of 11 rows of index index would be deleted, more than half; send expect = {number}"
            in answer.text
        )
    for body in ({"where": "width = 16", "expect": 10}, {"where": "key = '00'", "expect": 0}):
        answer = writer.post(DELETE, body)
        assert (answer.status_code, "nothing was deleted" in answer.json()["error"]) == (400, True)
        assert writer.post(DELETE, body | {"dry_run": True}).status_code == 400
    assert all_uids(index) == before
    assert writer.post(DELETE, {"where": "key < '20'", "expect": 7}).json()["deleted"] == 7
    hint = writer.post(DELETE, {"where": "width = 17", "dry_run": True}).json()["hint"]
    assert hint.startswith("0 rows match: 17 is not a value of width")


def test_both_clients_ask_before_most_of_an_index_goes(writing, index):
    async def delete(address):
        async with vlm.AsyncClient(address, token="w", retries=0) as client:
            with pytest.raises(UsageError, match="7 rows would be deleted, not 8 as expected"):
                await client.delete(where="key < '20'", expect=8)
            return await client.delete(where="key < '20'", expect=7)

    with serve_in_background(writing) as address:
        with vlm.Client(address, token="w", retries=0) as client:
            with pytest.raises(UsageError, match=r"11 of 11 rows .* more than half; send expect = 11"):
                client.delete(where="width = 16")
            assert client.delete(where="width = 16", dry_run=True)["deleted"] == 11
            assert len(all_uids(index)) == 11
        assert asyncio.run(delete(address))["deleted"] == 7
    assert len(all_uids(index)) == 4


def test_a_reader_may_not_change(writing, data_url, index):
    before = all_uids(index)
    caller = Caller(create_app(writing), {})
    assert caller.post(ADD, {"items": [{"image": data_url("red")}]}).status_code == 403
    assert caller.post(DELETE, {"where": "width = 16"}).status_code == 403
    assert all_uids(index) == before


def test_while_another_process_writes_a_change_is_told_to_wait_and_searches_go_on(writer, index, data_url):
    with IndexWriter(index):
        answer = writer.post(ADD, {"items": [{"image": data_url("magenta")}]})
        assert (answer.status_code, answer.json()["kind"]) == (409, "busy")
        assert "Index index is being changed by another process" in answer.json()["error"]
        assert answer.headers["retry-after"] == "5"
        assert writer.search(texts=["red"], top=1)["hits"]
    assert writer.post(ADD, {"items": [{"image": data_url("magenta")}]}).status_code == 200


def test_changes_wait_for_one_another_and_not_for_ever():
    async def run():
        queue = ChangeQueue(wait_seconds=0.2)
        going_on, may_end = threading.Event(), threading.Event()
        order = []

        def slow():
            going_on.set()
            may_end.wait(10)
            order.append("slow")
            return {}

        def quick():
            order.append("quick")
            return {}

        first = asyncio.create_task(queue.run(slow))
        await asyncio.to_thread(going_on.wait)
        with pytest.raises(UsageError, match=r"more than 0\.2 seconds; nothing was done"):
            await queue.run(quick)
        # whoever asked leaves; the change is carried through, and the next one waits for its end
        first.cancel()
        second = asyncio.create_task(queue.run(quick))
        await asyncio.sleep(0.05)
        assert order == []
        may_end.set()
        await second
        await queue.close()
        return order

    assert asyncio.run(run()) == ["slow", "quick"]


def test_both_clients_add_and_delete(writing, paint, index):
    async def change(address):
        async with vlm.AsyncClient(address, token="w") as client:
            added = await client.add([{"image": paint("yellow", "magenta"), "uid": "b"}])
            assert await client.fields()
            return added, await client.delete(where="key in ('00')", dry_run=True), await client.delete(["a", "b"])

    with serve_in_background(writing) as address:
        with vlm.Client(address, token="w") as client:
            added = client.add([{"image": paint("magenta", "yellow"), "uid": "a", "captions": ["two stripes"]}])
            assert client.search(image=paint("magenta", "yellow"), top=1)[0].uid == "a"
            with pytest.raises(UsageError, match="Index index has no 'nobody'"):
                client.delete("nobody")
        also_added, counted, deleted = asyncio.run(change(address))
    assert also_added["generation"] == added["generation"] + 1
    assert (counted["deleted"], deleted["deleted"]) == (1, 2)
    assert deleted["rows"] == len(all_uids(index)) == added["rows"] - 1


def test_changes_leave_no_progress_bars_in_the_log(writer, data_url, capsys, caplog):
    caplog.set_level(logging.INFO, logger="vlm")
    item = {"image": data_url("magenta", "yellow"), "uid": "new/1"}
    assert writer.post(ADD, {"items": [item]}).status_code == 200
    assert writer.post(DELETE, {"uids": ["new/1"]}).status_code == 200
    assert "%|" not in capsys.readouterr().err


def test_additions_leave_no_file_open(writer, data_url):
    def add(number: int) -> None:
        item = {"image": data_url("magenta", "yellow"), "uid": f"open/{number}"}
        assert writer.post(ADD, {"items": [item]}).status_code == 200

    for number in range(3):
        add(number)
    before = psutil.Process().num_fds()
    for number in range(3, 6):
        add(number)
    # a version more may be open, until the one before it is let go
    assert psutil.Process().num_fds() <= before + 2


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8"])
def test_metadata_nested_as_deep_as_json_may_be(writer, media_type):
    content = b'{"items":[{"image":"data:image/gif;base64,AA","metadata":{"a":' + b"[" * 1000 + b"]" * 1000 + b"}}]}"
    response = writer("POST", ADD, content=content, headers={"content-type": media_type})
    assert (response.status_code, "nested more than 8 levels" in response.json()["error"]) == (422, True)
