"""Whole epochs of training batches out of shards that are far away and fail: the same as from the local folder."""

from typing import Any

import numpy as np
import pytest

from tests.data.storage.conftest import BUCKET
from tests.data.storage.faulty_server import Fault
from tests.data.storage.test_shard_cache import Watch
from vlm.data.collate import TrainingCollator
from vlm.data.corpus import Source, open_corpus
from vlm.data.loader import stream_batches
from vlm.data.sample_ledger import Ledger, sum_counts
from vlm.data.sampler import BatchSampler
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import VlmError

BATCH = 6


class Lengths:
    """Tokenizes a text as its length."""

    def encode(self, texts):
        return np.array([[len(text)] for text in texts], np.int64)


def stream(url, cache, *, workers, epochs=2, window=12):
    """Batches of so many epochs as plain values, and their ledger."""
    corpus = open_corpus([Source(data=url, name="far")], seed=4, window=window, cache=cache)
    plan = BatchSampler(order=corpus.order, batch_size=BATCH)
    tokenizer: Any = Lengths()
    collate = TrainingCollator(plan=plan, view=RandomResizedCrop(size=8), tokenizer=tokenizer)
    numbers = range(epochs * corpus.order.num_samples // BATCH)
    ledger, found = Ledger(), []
    for batch in stream_batches(plan, corpus.shards, collate, numbers=numbers, workers=workers, cache=cache):
        ledger.count(batch)
        found.append((batch.keys, batch.captions, batch.images.numpy().tobytes()))
    return found, ledger


def faults_for(names):
    """A cut, 500s and a slow answer, spread over the shards."""
    return [
        Fault(path=names[0], cut=5000, times=2),
        Fault(path=names[1], status=500, times=2),
        Fault(path=names[2], pause=0.002, times=2),
        Fault(path=names[3], status=503, times=1, methods=("HEAD", "GET")),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http_are_those_of_the_folder_within_the_bound_of_the_cache(
    workers, faulty_server, served, write_shards, make_cache
):
    names = write_shards(served, 9, padding=30_000)
    size = (served / names[0]).stat().st_size
    near, own = stream(str(served), None, workers=0)
    cache = make_cache(int(5.5 * size))
    faulty_server.faults = faults_for(names)
    with Watch(cache.folder) as watch:
        far, ledger = stream(f"{faulty_server.url}/{{00..08}}.tar", cache, workers=workers)
    assert far == near
    assert ledger.to_values() == own.to_values()
    assert sum_counts(ledger.by_shard()).seen == 2 * 36
    assert all(fault.times == 0 for fault in faulty_server.faults)
    assert size < watch.largest <= cache.max_bytes


def test_batches_out_of_a_bucket_are_those_of_the_folder(s3, bucket, served, make_cache):
    near, _ = stream(str(served), None, workers=0)
    s3.faults = [
        Fault(path=bucket[0], cut=4000, times=2),
        Fault(path=bucket[1], status=500, times=2),
        Fault(path=bucket[2], pause=0.005, times=2),
    ]
    far, ledger = stream(f"s3://{BUCKET}/set", make_cache(block_bytes=5000), workers=2)
    assert far == near
    assert sum_counts(ledger.by_shard()).replaced == 0
    assert all(fault.times == 0 for fault in s3.faults)


def test_a_shard_that_cannot_be_had_ends_the_run_with_its_address(faulty_server, served, write_shards, make_cache):
    names = write_shards(served, 3)
    cache = make_cache()
    stream(f"{faulty_server.url}/{{00..02}}.tar", cache, workers=0, epochs=1)
    for cached in cache.folder.glob("*.tar"):
        cached.unlink()
    faulty_server.faults = [Fault(path=names[1], status=500, times=10_000)]
    with pytest.raises(VlmError, match=names[1]):
        stream(f"{faulty_server.url}/{{00..02}}.tar", cache, workers=1)
