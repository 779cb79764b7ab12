"""A served index over its versions, and the caches before it."""

import gc
import weakref

import numpy as np
import pytest

from tests.server.conftest import ClassifyingModel
from vlm.errors import VlmError
from vlm.index.writer import IndexWriter
from vlm.server.served_index import ServedIndex, ThumbnailCache
from vlm.service.query import Query, TextCache


@pytest.fixture
def served(index, model):
    return ServedIndex.open("index", index, load=lambda _: model)


def uids(result):
    return [hit.entry.uid for hit in result.hits]


def test_a_new_version_is_taken_up_between_two_searches(served, index):
    [before] = served.search_batch([Query(texts=("red",), top=3)])
    with IndexWriter(index) as writer:
        writer.delete(uids(before)[:1])
    [after] = served.search_batch([Query(texts=("red",), top=3)])
    assert after.generation == before.generation + 1
    assert uids(before)[0] not in uids(after)


def test_a_damaged_version_is_refused_and_the_one_before_goes_on(served, index, caplog):
    [before] = served.search_batch([Query(texts=("red",), top=3)])
    manifest = index / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[: len(whole) // 2])
    for _ in range(3):
        [now] = served.search_batch([Query(texts=("red",), top=3)])
        assert uids(now) == uids(before)
    assert served.reload_error
    assert caplog.text.count("the one before serves") == 1
    assert served.info()["reload_error"]
    manifest.write_bytes(whole)
    served.search_batch([Query(texts=("red",), top=3)])
    assert not served.reload_error


def test_an_error_of_one_query_of_a_batch_is_its_own(served):
    queries = [Query(texts=("red",)), Query(items=("nobody",)), Query(texts=("blue",))]
    first, wrong, third = served.search_batch(queries)
    assert isinstance(wrong, VlmError)
    assert uids(first) == uids(served.search_batch(queries[:1])[0])
    assert uids(third) == uids(served.search_batch(queries[2:])[0])


def test_the_same_text_is_embedded_once(model):
    cache = TextCache(size=2)
    first = np.asarray(cache.embed(model, ["red", "blue", "red"]))
    again = np.asarray(cache.embed(model, ["blue", "green"]))
    assert np.array_equal(first, np.asarray(model.embed_texts(["red", "blue", "red"])))
    assert np.array_equal(again, np.asarray(model.embed_texts(["blue", "green"])))
    assert (cache.hits, cache.misses) == (2, 3)
    # two texts are kept: red, the least recently used, is gone
    cache.embed(model, ["red"])
    assert cache.misses == 4


def test_thumbnails_are_kept_up_to_a_number_of_bytes():
    made = []

    def make(name):
        made.append(name)
        return b"x" * 10

    cache = ThumbnailCache(max_bytes=25)
    for name in ("a", "b", "a", "c", "a", "b"):
        cache.get((name,), lambda name=name: make(name))
    # b was the least recently used when c came
    assert made == ["a", "b", "c", "b"]


def test_readiness_needs_the_model_and_a_search(served, model):
    assert served.check_ready() > 0
    model.embed_texts = None
    with pytest.raises(TypeError):
        served.check_ready()


def test_a_remembered_text_does_not_hold_the_vectors_of_its_batch():
    batches = []

    class Watched(ClassifyingModel):
        def embed_texts(self, texts):
            rows = np.ones((len(texts), 8), np.float32)
            batches.append(weakref.ref(rows))
            return rows

    cache = TextCache(size=10)
    encoder = Watched()
    cache.embed(encoder, ["red", "blue", "green"])
    gc.collect()
    assert batches[0]() is None
    assert cache.hits == 0
    cache.embed(encoder, ["blue"])
    assert cache.hits == 1
