"""The clients against a server with a socket, and their retries against one that refuses."""

import asyncio
import http.server
import threading

import numpy as np
import pytest
from PIL import Image

import vlm
from vlm.errors import UsageError, VlmError
from vlm.server.serving import open_service, serve_in_background


def uids(result):
    return [hit.uid for hit in result]


def test_a_search_over_the_network_is_that_of_the_index(address, expected, paint, tmp_path):
    (tmp_path / "a.png").write_bytes(paint("green", "cyan"))
    with vlm.Client(address) as client:
        assert uids(client.search("red and blue", top=5)) == expected(texts=("red and blue",), top=5)
        assert uids(client.search(image=tmp_path / "a.png", top=3)) == expected(images=(paint("green", "cyan"),), top=3)
        assert uids(client.search(image=Image.open(tmp_path / "a.png"), top=3)) == expected(
            images=(paint("green", "cyan"),), top=3
        )
        result = client.search("red", minus="blue", where="width = 16", facets="width", top=2)
        assert uids(result) == expected(texts=("red",), minus=("blue",), top=2)
        assert result.facets == {"width": {16: 11}}
        assert uids(client.search(vector=[1.0] + [0.0] * 7, top=2)) == expected(vectors=((1.0,) + (0.0,) * 7,), top=2)
        hit = result[0]
        assert hit.caption in hit.captions[""]
        assert hit.metadata["width"] == 16
        assert hit.image().size == (16, 16)
        [classes] = client.classify(tmp_path / "a.png", ["red", "green", "cyan"], top=2)
        assert {entry.name for entry in classes} == {"green", "cyan"}
        page = client.search("red", top=4, after=client.search("red", top=4).next)
        assert uids(page) == expected(texts=("red",), top=8)[4:]


def test_errors_of_the_server_are_those_of_the_library(address):
    with vlm.Client(address) as client:
        with pytest.raises(UsageError, match="A query needs a text"):
            client.search()
        with pytest.raises(UsageError, match="no item 'nobody'"):
            client.search(like="nobody")
        with pytest.raises(UsageError, match="has no item 'nobody'"):
            client.image("nobody")
        with pytest.raises(UsageError, match="cannot be read"):
            client.search(image="nowhere.png")
    with vlm.Client(address, index="other") as client, pytest.raises(UsageError, match="the indexes are index"):
        client.search("red")


def test_the_asynchronous_client_answers_alike(address, expected):
    async def ask():
        async with vlm.AsyncClient(address) as client:
            results = await asyncio.gather(*(client.search(text, top=3) for text in ("red", "blue", "green")))
            image = await client.image(results[0][0].uid)
            return [uids(result) for result in results], image.size

    answers, size = asyncio.run(ask())
    assert answers == [expected(texts=(text,), top=3) for text in ("red", "blue", "green")]
    assert size == (16, 16)


def test_items_and_a_map_come_to_both_clients(address, index, model):
    async def ask():
        async with vlm.AsyncClient(address, retries=0) as client:
            with pytest.raises(UsageError, match="has no item 'nobody'"):
                await client.items(["00", "nobody"])
            with pytest.raises(UsageError, match="Give an image"):
                await client.caption([])
            return await client.items("00"), await client.map([-1, -1, 1, 1], top=3, uids="21", colour="width")

    with vlm.Client(address, retries=0) as client:
        with pytest.raises(UsageError, match="Index index has no map; make one with vlm index map"):
            client.map()
        with vlm.open_index(index, model=model) as opened:
            opened.make_map()
        assert [item["uid"] for item in client.items(["21", "00"])] == ["21", "00"]
        assert len(client.map(where="key < '20'")["points"]["uids"]) == 7
        with pytest.raises(UsageError, match="box = 3 is not a list of numbers"):
            client.map(3)
        with pytest.raises(UsageError, match="Give an image"):
            client.caption([])
    items, answer = asyncio.run(ask())
    assert items[0]["captions"] == {"": ["black and blue", "stripes of blue"]}
    assert (len(answer["points"]["uids"]), answer["legend"]) == (3, [{"value": 16, "rows": 11}])
    assert answer["places"].keys() == {"21"}


def test_a_token_is_sent(index, model):
    service = open_service({"index": index}, read_tokens=frozenset({"r"}), load=lambda _: model)
    with serve_in_background(service) as address:
        with vlm.Client(address, token="r") as client:
            assert len(client.search("red", top=2)) == 2
        with vlm.Client(address) as client, pytest.raises(UsageError, match="A token is needed"):
            client.search("red")


@pytest.fixture
def refusing():
    """A server that refuses the first requests with 503, and counts them."""
    counts = {"refuse": 0, "requests": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            counts["requests"] += 1
            refuses = counts["requests"] <= counts["refuse"]
            body = b'{"error": "busy"}' if refuses else b'{"indexes": [{"name": "index"}]}'
            self.send_response(503 if refuses else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", counts
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_a_busy_server_refuses_is_asked_again(refusing):
    address, counts = refusing
    counts["refuse"] = 2
    with vlm.Client(address, retries=2) as client:
        assert client.indexes() == [{"name": "index"}]
    assert counts["requests"] == 3


def test_after_the_last_try_the_refusal_is_the_error(refusing):
    address, counts = refusing
    counts["refuse"] = 10
    with vlm.Client(address, retries=1) as client, pytest.raises(VlmError, match="busy"):
        client.indexes()
    assert counts["requests"] == 2


def test_a_server_that_is_not_there_is_said():
    with vlm.Client("http://127.0.0.1:9", retries=0) as client, pytest.raises(VlmError, match="cannot be reached"):
        client.search("red")
    with pytest.raises(UsageError, match="is not the address of a server"):
        vlm.Client("localhost:8000")


def test_arrays_are_images_too(address, expected):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    with vlm.Client(address) as client:
        assert client.search(image=red, top=1)[0].score > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.add([{"uid": "a"}]), "{'uid': 'a'} cannot be added: give a list of mappings"),
        (lambda client: client.add("path"), "'path' cannot be added"),
        (lambda client: client.add({"image": "a.jpg"}), "cannot be added"),
        (lambda client: client.add(3), "3 cannot be added"),
        (lambda client: client.search(3), "texts = 3 is not a text"),
        (lambda client: client.search("red", weights="ab"), "weights = 'ab'"),
        (lambda client: client.search(vector=3), "vector = 3"),
        (lambda client: client.search("red", top=object()), "cannot be sent: Object of type object"),
        (lambda client: client.delete(3), "uids = 3"),
        (lambda client: client.classify([], 3), "classes = 3"),
    ],
)
def test_an_argument_of_another_kind_is_named_before_anything_is_sent(call, message):
    with vlm.Client("http://127.0.0.1:9", index="index", retries=0) as client, pytest.raises(UsageError, match=message):
        call(client)


def test_a_closed_client_says_so(refusing):
    address, _ = refusing
    client = vlm.Client(address)
    client.close()
    with pytest.raises(UsageError, match=f"The client of {address} is closed"):
        client.search("red")

    async def search():
        client = vlm.AsyncClient(address)
        await client.close()
        await client.search("red")

    with pytest.raises(UsageError, match="is closed"):
        asyncio.run(search())


def test_a_change_whose_connection_breaks_is_not_sent_again(free_port):
    import socket
    import threading

    received: list[bytes] = []

    def hang_up(listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                received.append(connection.recv(1 << 16))

    with socket.create_server(("127.0.0.1", free_port())) as listener:
        threading.Thread(target=hang_up, args=(listener,), daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with vlm.Client(address, index="photos", retries=3) as client:
            with pytest.raises(
                VlmError, match=r"broke before the answer came .*Whether the change was made is not known"
            ):
                client.delete(["a"])
            assert len(received) == 1
            with pytest.raises(VlmError, match=r"cannot be reached: .*Server"):
                client.indexes()
            assert len(received) == 5
