"""Samples of shards by their index, and what makes batches of them: batch plans, collators, threads of this process.

Nothing here needs torch; `vlm.data.loader` makes the same batches in worker processes.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from vlm.data.sampler import SampleIndex
from vlm.data.samples import Sample
from vlm.data.shard_cache import Prefetcher, ShardCache, default_cache
from vlm.data.tar import ShardReader
from vlm.errors import UsageError
from vlm.storage import needs_cache
from vlm.tensor_types import Array, UInt8

BatchT = TypeVar("BatchT", covariant=True)

_MAX_OPEN_SHARDS = 64
# batches of each thread that wait for the reader
_BATCHES_AHEAD = 2


@runtime_checkable
class BatchPlan(Protocol):
    """Which samples batch `number` holds; a batch sampler of `vlm.data.sampler`."""

    @property
    def largest_batch(self) -> int:
        """Most samples a batch may hold."""
        ...

    def __getitem__(self, number: int) -> list[SampleIndex]: ...

    def upcoming_shards(self, number: int) -> list[int]:
        """The shards that batch `number` and those soon after it need, in order."""
        ...


class ShardSet:
    """Samples by their index in some shards; keeps the shards used last open. Each process or thread has its own.

    cache: where remote and compressed shards are kept; the default one if not given.
    """

    def __init__(self, shards: Sequence[str], cache: ShardCache | None = None) -> None:
        self.shards = tuple(shards)
        self.cache = cache or default_cache()
        self._open: dict[int, ShardReader] = {}

    def allocate_images(self, shape: tuple[int, ...]) -> UInt8[Array, "..."]:
        """Memory for the images of a batch."""
        return np.empty(shape, np.uint8)

    def read(self, sample_index: SampleIndex, arrays: tuple[str, ...] = ()) -> Sample:
        """The sample at an index, with the stored arrays of these names.

        Raises:
            BadSample: it cannot be read.
            VlmError: its shard cannot be read.
        """
        return self._reader(sample_index.shard).read(sample_index.number, arrays=arrays)

    def key_and_offset(self, sample_index: SampleIndex) -> tuple[str, int]:
        """Key of a sample and the byte offset of its first part."""
        return self._reader(sample_index.shard).key_and_offset(sample_index.number)

    def _reader(self, shard: int) -> ShardReader:
        # taken out and put back at the end: the dictionary is ordered by last use
        reader = self._open.pop(shard, None) or ShardReader(self.shards[shard], self.cache)
        self._open[shard] = reader
        if len(self._open) > _MAX_OPEN_SHARDS:
            self._open.pop(next(iter(self._open))).close()
        return reader

    def close(self) -> None:
        """Release the files of the shards; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


@runtime_checkable
class Collator(Protocol[BatchT]):
    """Turns the sample indices of a batch into a batch; runs in the workers.

    Images in memory of `ShardSet.allocate_images` are handed over without a copy.
    """

    @property
    def image_bytes(self) -> int:
        """Bytes of the image of a sample in the batch."""
        ...

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> BatchT:
        """The batch of these samples."""
        ...


def batches_by_threads(
    plan: BatchPlan, shards: Sequence[str], collate: Collator[BatchT], *, numbers: range, threads: int = 1
) -> Iterator[BatchT]:
    """The batches of the given numbers, in order, made in threads while the caller works on the one before.

    For what spends its time where Python's lock is free (decoding, resizing) and needs no process of its own, which
    takes torch and seconds to start. With 0 threads the caller makes them itself.

    Raises:
        UsageError: threads is negative. VlmError: a shard cannot be read.
    """
    if threads < 0:
        raise UsageError(f"workers = {threads}; give 0 or more (with 0 this process reads and decodes).")
    of_thread = threading.local()
    opened: list[ShardSet] = []

    def make(number: int) -> BatchT:
        # each thread opens the shards for itself: a file is read from where it stands
        if not hasattr(of_thread, "shards"):
            of_thread.shards = ShardSet(shards)
            opened.append(of_thread.shards)
        return collate(plan[number], of_thread.shards)

    is_any_cached = any(map(needs_cache, shards))
    pending: deque[Future[BatchT]] = deque()
    pool = ThreadPoolExecutor(threads, "batches") if threads else None
    try:
        with Prefetcher(default_cache(), tuple(shards)) as prefetcher:
            for number in numbers:
                if is_any_cached:
                    prefetcher.request(plan.upcoming_shards(number))
                if pool is None:
                    yield make(number)
                    continue
                pending.append(pool.submit(make, number))
                if len(pending) > threads * _BATCHES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        # nothing is begun after the caller has left, or a thread has failed
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for shard_set in opened:
            shard_set.close()
