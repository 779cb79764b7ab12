import io
import tarfile
import threading
from dataclasses import dataclass, field
from itertools import chain

import pytest

from vlm.data.sampler import SequentialBatches
from vlm.data.shards import batches_by_threads
from vlm.errors import UsageError, VlmError


@dataclass
class Keys:
    """Collates the keys of a batch; fails at one batch, if asked to."""

    fail_at: str = ""
    image_bytes: int = 0
    threads: set[str] = field(default_factory=set)
    made: list[str] = field(default_factory=list)

    def __call__(self, sample_indices, shards):
        self.threads.add(threading.current_thread().name)
        keys = [shards.read(index).key for index in sample_indices]
        self.made += keys
        if self.fail_at in keys:
            raise VlmError(f"{self.fail_at} is damaged")
        return keys


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(10):
                for ending, data in (("jpg", b"image"), ("txt", b"words")):
                    entry = tarfile.TarInfo(f"{shard}-{number}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return [str(tmp_path / f"{shard}.tar") for shard in range(3)]


PLAN = SequentialBatches(counts=[10, 10, 10], batch_size=4)


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_batches_come_in_order_whatever_the_number_of_threads(shards, threads):
    keys = Keys()
    batches = list(batches_by_threads(PLAN, shards, keys, numbers=range(len(PLAN)), threads=threads))
    assert list(chain.from_iterable(batches)) == [f"{shard}-{number}" for shard in range(3) for number in range(10)]
    assert (threading.main_thread().name in keys.threads) == (threads == 0)
    # a share of them
    some = list(batches_by_threads(PLAN, shards, Keys(), numbers=range(1, len(PLAN), 2), threads=threads))
    assert some == batches[1::2]


def test_an_error_in_a_thread_ends_the_batches_and_the_threads(shards):
    before = threading.active_count()
    batches = batches_by_threads(PLAN, shards, Keys(fail_at="0-5"), numbers=range(len(PLAN)), threads=2)
    assert next(batches)[0] == "0-0"
    with pytest.raises(VlmError, match="0-5 is damaged"):
        list(batches)
    assert threading.active_count() == before


def test_a_reader_that_leaves_early_leaves_no_thread_behind(shards):
    before, keys = threading.active_count(), Keys()
    batches = batches_by_threads(PLAN, shards, keys, numbers=range(len(PLAN)), threads=1)
    next(batches)
    batches.close()
    assert threading.active_count() == before
    assert len(keys.made) < 30


def test_a_negative_number_of_threads_is_refused(shards):
    with pytest.raises(UsageError, match="workers = -1"):
        next(batches_by_threads(PLAN, shards, Keys(), numbers=range(3), threads=-1))
