"""Heat maps over HTTP and on the page, by a network of random weights: where they are hot is not asked here."""

import asyncio
import base64
import io
import threading

import pytest
from PIL import Image

import vlm
from tests.random_model import write_random_model
from tests.server.browser import CHROMIUM, until
from tests.server.conftest import Caller
from vlm.index.build import build_index
from vlm.index.embed import EmbedOptions, embed_into
from vlm.models.load import load_model
from vlm.server.app import create_app
from vlm.server.serving import open_service, serve_in_background

EXPLAIN = "/api/v1/indexes/scenes/explain"


@pytest.fixture(scope="module")
def network(scene_tokenizer, tmp_path_factory):
    folder = write_random_model(tmp_path_factory.mktemp("random") / "model", "tiny", scene_tokenizer)
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def scenes(scene_shards, network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained")
    [shard, *_] = sorted(map(str, (scene_shards / "val").glob("*.tar")))
    embed_into(network, [shard], {"image": folder / "embeddings"}, EmbedOptions(batch_size=8, model_spec="random"))
    build_index(folder / "embeddings", folder / "index")
    return folder / "index"


@pytest.fixture
def service(scenes, network):
    return open_service({"scenes": scenes}, load=lambda _: network)


@pytest.fixture
def uid(service):
    return service.indexes["scenes"].service.index.catalogue.entries([0])[0].uid


def opened(url):
    head, _, body = url.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(body)))


def test_the_answer_is_that_of_the_python_call(caller, service, network, uid):
    answer = caller.post(EXPLAIN, {"item": uid, "text": "a red star", "words": True, "against": ["a circle"]})
    assert answer.status_code == 200, answer.text
    image = service.indexes["scenes"].image(uid)
    expected = vlm.explain(vlm.Model(network), image, "a red star", words=True, against=["a circle"])
    values = answer.json()
    overlays = [values.pop("overlay"), *(word.pop("overlay") for word in values["words"])]
    assert values == {name: value for name, value in expected.to_json().items() if name != "image"}
    assert [opened(url).size for url in overlays] == [expected.overlay().size] * 4
    assert len(set(overlays)) == 4


def test_both_clients_explain_items_and_images(service, uid):
    image = service.indexes["scenes"].image(uid)
    with serve_in_background(service) as address:
        with vlm.Client(address) as client:
            of_item = client.explain("a red star", item=uid)
            of_image = client.explain("a red star", image=image)
            with pytest.raises(vlm.UsageError, match="either item, a uid, or image"):
                client.explain("a red star")

        async def ask():
            async with vlm.AsyncClient(address) as client:
                return await client.explain("a red star", item=uid)

        assert asyncio.run(ask()) == of_item == of_image
    assert of_item["words"] == []


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"text": "a star"}, 422, "give either item or image"),
        ({"text": "a star", "item": "nobody"}, 404, "has no item 'nobody'"),
        ({"text": " ", "item": "UID"}, 400, "The text is empty"),
        ({"text": "star " * 33, "item": "UID", "words": True}, 400, "The text has 33 words; maps are made of 32"),
        ({"text": "a star", "item": "UID", "method": "none"}, 422, "method"),
        ({"text": "a star", "image": "http://elsewhere/star.jpg"}, 400, "the server fetches nothing"),
    ],
)
def test_a_wrong_request_is_refused_in_words(caller, uid, body, status, message):
    refused = caller.post(EXPLAIN, {name: uid if value == "UID" else value for name, value in body.items()})
    assert (refused.status_code, message in refused.json()["error"]) == (status, True), refused.text


def test_what_has_no_image_tower_is_refused(index, model):
    caller = Caller(create_app(open_service({"index": index}, load=lambda _: model)), {})
    uid = caller.search(texts=["red"])["hits"][0]["uid"]
    refused = caller.post("/api/v1/indexes/index/explain", {"item": uid, "text": "red"})
    assert (refused.status_code, "no image tower to look into" in refused.json()["error"]) == (400, True), refused.text


def test_a_server_without_torch_says_what_it_lacks(caller, uid, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = caller.post(EXPLAIN, {"item": uid, "text": "a star"})
    assert (refused.status_code, "need torch" in refused.json()["error"]) == (400, True), refused.text


def test_what_others_embed_meanwhile_is_no_part_of_a_map(network, service, uid):
    image = service.indexes["scenes"].image(uid)
    alone = vlm.explain(vlm.Model(network), image, "a red star", method="grad-cam")
    is_over = threading.Event()

    def embed():
        while not is_over.is_set():
            vlm.Model(network).embed_images(Image.new("RGB", (32, 32)))

    thread = threading.Thread(target=embed)
    thread.start()
    try:
        for _ in range(5):
            beside = vlm.explain(vlm.Model(network), image, "a red star", method="grad-cam")
            assert abs(beside.whole.heat - alone.whole.heat).max() < 1e-5
    finally:
        is_over.set()
        thread.join()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_says_why_word_by_word(open_page):
    page = open_page("?q=a+star&-q=a+circle")
    page.locator(".tile > button").first.click()
    assert page.input_value("#why-text") == "a star"
    until(page, "document.querySelector('#detail-image').src.includes('thumbnail')")
    page.click("#why button")
    page.wait_for_selector("#why-words button")
    assert page.locator("#why-words button").all_inner_texts() == ["Image", "a star", "a", "star"]
    assert "rather than for “a circle”" in page.inner_text("#why-status")
    until(page, "document.querySelector('#detail-image').src.startsWith('data:image/jpeg')")
    assert page.get_attribute("#detail-image", "alt").startswith("Heat map of “a star”, hottest")
    page.locator("#why-words button", has_text="star").nth(1).click()
    assert page.get_attribute("#detail-image", "alt").startswith("Heat map of “star”")
    assert page.locator("#why-words [aria-pressed=true]").all_inner_texts() == ["star"]
    page.locator("#why-words button", has_text="Image").click()
    until(page, "document.querySelector('#detail-image').src.includes('thumbnail')")
    # another text, and nothing of the image before it is left for the next
    page.fill("#why-text", "moon")
    page.press("#why-text", "Enter")
    until(page, "document.querySelectorAll('#why-words button').length === 2")
    page.keyboard.press("Escape")
    page.locator(".tile > button").nth(1).click()
    assert page.locator("#why-words button").count() == 0
    page.fill("#why-text", "")
    page.click("#why button")
    assert "Say what to look for" in page.inner_text("#why-status")
