"""Captions over HTTP, by a model that has a decoder; random weights, so that nothing is asked of what they say."""

import asyncio
import base64

import pytest

import vlm
from tests.random_model import write_random_model
from tests.server.conftest import Caller
from vlm.index.build import build_index
from vlm.index.embed import EmbedOptions, embed_into
from vlm.models.load import load_model
from vlm.server.app import create_app
from vlm.server.serving import open_service, serve_in_background

CAPTION = "/api/v1/indexes/scenes/caption"


@pytest.fixture(scope="module")
def serve_scenes(scene_shards, scene_tokenizer, tmp_path_factory):
    """Gives a service of drawn scenes, embedded by a model of an architecture, and who calls it."""

    def make(architecture):
        folder = tmp_path_factory.mktemp(architecture)
        model = load_model(str(write_random_model(folder / "model", architecture, scene_tokenizer)), device="cpu")
        [shard, *_] = sorted(map(str, (scene_shards / "val").glob("*.tar")))
        embed_into(model, [shard], {"image": folder / "embeddings"}, EmbedOptions(batch_size=8, model_spec="random"))
        build_index(folder / "embeddings", folder / "index")
        service = open_service({"scenes": folder / "index"}, load=lambda _: model)
        return service, Caller(create_app(service), {})

    return make


def test_images_given_and_stored_are_captioned_in_their_order(serve_scenes):
    service, caller = serve_scenes("tiny-coca")
    index = service.indexes["scenes"]
    uid = index.service.index.catalogue.entries([0])[0].uid
    data_url = "data:image/jpeg;base64," + base64.b64encode(index.image(uid)).decode()
    answer = caller.post(CAPTION, {"images": [data_url], "items": [uid], "prompt": "a picture of"})
    assert answer.status_code == 200, answer.text
    given, stored = answer.json()["captions"]
    assert given == stored
    assert given.startswith("a picture of")
    with serve_in_background(service) as address:
        with vlm.Client(address) as client:
            assert client.caption(index.image(uid), prompt="a picture of") == [given]
        assert asyncio.run(caption_with(address, index.image(uid))) == [given]


async def caption_with(address, image):
    async with vlm.AsyncClient(address) as client:
        return await client.caption(image, prompt="a picture of")


def test_a_wrong_request_for_captions_is_refused(serve_scenes):
    _, caller = serve_scenes("tiny-coca")
    refused = caller.post(CAPTION, {})
    assert (refused.status_code, "Give an image" in refused.json()["error"]) == (400, True)
    assert caller.post(CAPTION, {"items": ["nobody"]}).status_code == 404


def test_a_model_without_a_decoder_says_so(serve_scenes):
    service, caller = serve_scenes("tiny")
    uid = service.indexes["scenes"].service.index.catalogue.entries([0])[0].uid
    refused = caller.post(CAPTION, {"items": [uid]})
    assert (refused.status_code, "decoder" in refused.json()["error"]) == (400, True), refused.text
