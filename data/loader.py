"""The streaming loader: batches by number, read and prepared in worker processes, the same for any number of them.

`stream_batches` yields them; a collator makes a batch of the samples that a batch plan names, in a worker. Workers are
processes, or threads of a few of them: decoding and resizing need no Python, and what a process holds is held once.
Images travel from the processes in a `SharedMemoryPool` that is mapped once, before they start.
"""

import gc
import math
import mmap
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from copy import copy
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from vlm.data.samples import SampleIndex
from vlm.data.shard_cache import ShardCache
from vlm.data.shards import BatchPlan, Collator, ShardSet, prefetching
from vlm.errors import UsageError, VlmError
from vlm.tensor_types import Array, Tensor, UInt8

_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class SharedBuffer:
    """A filled buffer of the pool: of which worker, which one, and the layout of the tensor in it."""

    worker: int
    number: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class SharedMemoryPool:
    """Buffers for `workers` processes forked from this one, `buffers` each, of up to `buffer_bytes`.

    A batch in fresh shared memory costs a page fault for every 4 KiB, in the worker and again in the reader; at 224
    pixels that is more than decoding a small JPEG. Here each worker owns a few buffers and fills a free one; the
    reader's tensor is a view of the buffer, and once the last tensor on it is gone the buffer is free again. If none
    is free, fresh memory is used, so nobody waits. The mapping is anonymous: it takes no space in /dev/shm, and a kill
    leaves nothing behind.
    """

    def __init__(self, *, workers: int, buffers: int, buffer_bytes: int) -> None:
        self._buffer_bytes = -(-buffer_bytes // _PAGE) * _PAGE
        # anonymous maps are inherited by fork and shared; one byte says whether a buffer is taken
        flags = mmap.mmap(-1, workers * buffers)
        memory = mmap.mmap(-1, workers * buffers * self._buffer_bytes)
        # for the threads of a worker; each has a copy of its own since the fork
        self._lock = threading.Lock()
        self._is_taken = np.frombuffer(flags, np.uint8).reshape(workers, buffers)
        self._memory = np.frombuffer(memory, np.uint8).reshape(workers, buffers, self._buffer_bytes)

    def acquire(self, worker: int, shape: tuple[int, ...]) -> UInt8[Array, "..."] | None:
        """In a worker: a free buffer of its own as an array of this shape; None if there is none or it is too small."""
        size = math.prod(shape)
        # of no process but this one: only its worker takes a buffer, and only the reader frees it
        with self._lock:
            free = np.flatnonzero(self._is_taken[worker] == 0)
            if size > self._buffer_bytes or not len(free):
                return None
            self._is_taken[worker, free[0]] = 1
        return self._memory[worker, free[0], :size].reshape(shape)

    def buffer_of(self, worker: int, filled: UInt8[Tensor, "..."]) -> SharedBuffer | None:
        """The buffer at whose beginning a tensor is; None if it is elsewhere."""
        offset = filled.data_ptr() - self._memory[worker].ctypes.data
        if not 0 <= offset < self._memory[worker].size:
            return None
        return SharedBuffer(worker, offset // self._buffer_bytes, tuple(filled.shape), filled.stride())

    def open(self, buffer: SharedBuffer) -> UInt8[Tensor, "..."]:
        """In the reader: a buffer's content; it is free once this tensor and all that share its memory are gone."""
        array = self._memory[buffer.worker, buffer.number, : math.prod(buffer.shape)]
        weakref.finalize(array, self._free, buffer.worker, buffer.number)
        # the storage of the tensor keeps this very array alive, so its end is the end of all views of the buffer
        return torch.from_numpy(array).as_strided(buffer.shape, buffer.strides)

    def _free(self, worker: int, number: int) -> None:
        self._is_taken[worker, number] = 0


class HasImages(Protocol):
    """A batch with images [B, 3, H, W]."""

    @property
    def images(self) -> torch.Tensor:
        """Raw bytes of colour."""
        ...

    def with_images(self, images: torch.Tensor) -> Self:
        """The same batch with other images."""
        ...


BatchT = TypeVar("BatchT", bound=HasImages, covariant=True)

# beyond those that wait: the reader holds the current batch, and the next one on its way to the device
_BUFFERS_IN_USE = 2
_PARENT_SECONDS = 2.0
_STOP_SECONDS = 60.0
WORKER_THREADS = 4
"""Workers that share a process where their collator lets them; more would wait for Python's lock with small photos."""
_NOTHING = torch.empty(0, dtype=torch.uint8)


class _WorkerShards(ShardSet):
    """Shards whose images lie, in a worker, in a shared buffer that needs no copy, where one is free.

    worker: the number of its process.
    """

    buffers: SharedMemoryPool | None = None
    worker: int = -1

    @override
    def allocate_images(self, shape: tuple[int, ...]) -> UInt8[Array, "..."]:
        buffer = self.buffers.acquire(self.worker, shape) if self.buffers and self.worker >= 0 else None
        return super().allocate_images(shape) if buffer is None else buffer


@dataclass(frozen=True)
class _WorkerError:
    """The error that ended a worker, returned as a value: torch would bury the message in a traceback."""

    error: VlmError


@dataclass(frozen=True)
class _SharedBatch(Generic[BatchT]):
    """A batch whose images are in a shared buffer."""

    batch: BatchT
    buffer: SharedBuffer


@dataclass
class _Batches(IterableDataset[Any], Generic[BatchT]):
    """The batches of some numbers; of several processes each makes those that are its turn.

    threads: of each process. shards: those that a process reads without threads.
    """

    plan: BatchPlan
    shards: _WorkerShards
    collate: Collator[BatchT]
    numbers: range
    threads: int
    _of_thread: threading.local = field(default_factory=threading.local)

    @override
    def __iter__(self) -> "Iterator[BatchT | _SharedBatch[BatchT] | _WorkerError]":
        worker = get_worker_info()
        own = self.numbers
        if worker is not None:
            own = own[worker.id :: worker.num_workers]
            self.shards.worker = worker.id
        if worker is None or self.threads < 2:
            return (self._make(self.plan[number], self.shards) for number in own)
        return self._make_by_threads(own)

    def _make_by_threads(self, numbers: range) -> "Iterator[BatchT | _SharedBatch[BatchT] | _WorkerError]":
        # the first one alone: what is made when it is first needed (tables, settings of a tokenizer) is made once
        for number in numbers[:1]:
            yield self._make(self.plan[number], self.shards)
        pending: deque[Future[Any]] = deque()
        pool = ThreadPoolExecutor(self.threads, "batches", self._init_thread)
        try:
            for number in numbers[1:]:
                pending.append(pool.submit(self._make_in_thread, self.plan[number]))
                if len(pending) > self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            # nothing is begun once the reader has left
            pool.shutdown(cancel_futures=True)

    def _init_thread(self) -> None:
        # a number of its own in each thread
        torch.set_num_threads(1)
        # and shards of its own: a set closes files that have not been used for long, and a copy has none open
        self._of_thread.shards = copy(self.shards)

    def _make_in_thread(self, sample_indices: list[SampleIndex]) -> "BatchT | _SharedBatch[BatchT] | _WorkerError":
        return self._make(sample_indices, self._of_thread.shards)

    def _make(
        self, sample_indices: list[SampleIndex], shards: _WorkerShards
    ) -> "BatchT | _SharedBatch[BatchT] | _WorkerError":
        try:
            batch = self.collate(sample_indices, shards)
        except VlmError as error:
            return _WorkerError(error)
        buffers = shards.buffers
        buffer = buffers.buffer_of(shards.worker, batch.images) if buffers and shards.worker >= 0 else None
        return batch if buffer is None else _SharedBatch(batch.with_images(_NOTHING), buffer)


def stream_batches(
    plan: BatchPlan,
    shards: Sequence[str],
    collate: Collator[BatchT],
    *,
    numbers: range,
    workers: int = 0,
    threads: int = 1,
    prefetch: int = 4,
    cache: ShardCache | None = None,
) -> Generator[BatchT, None, None]:
    """The batches of the given numbers, in order; closing the generator ends the workers.

    workers: that read, decode and tokenize; 0 does it in this process. Which worker makes a batch has no influence on
        its content, and nothing here draws from a global random generator.
    threads: so many workers share a process, of a collator that threads may use at once; see `WORKER_THREADS`.
    prefetch: batches that a process keeps ready.
    cache: where remote and compressed shards are kept; those of the next window are fetched while this one is read.

    Raises:
        UsageError: workers is negative.
        VlmError: a shard cannot be read, or too many samples in a row cannot be used.
    """
    if workers < 0:
        raise UsageError(f"workers = {workers}; give 0 or more (with 0 this process reads and decodes).")
    processes = -(-workers // threads)
    # as even as can be: a batch comes from each process in turn
    threads = -(-workers // processes) if processes else 1
    # with threads as many again are under way, so that fewer need to wait
    waiting = prefetch if threads == 1 else max(prefetch // 2, 1)
    shard_set = _WorkerShards(shards, cache)
    if workers and collate.image_bytes:
        buffers = waiting + _BUFFERS_IN_USE + (threads if threads > 1 else 0)
        buffer_bytes = plan.largest_batch * collate.image_bytes
        with suppress(OSError):  # so much cannot be mapped; fresh memory is used batch by batch
            shard_set.buffers = SharedMemoryPool(workers=processes, buffers=buffers, buffer_bytes=buffer_bytes)
    loader = DataLoader(
        _Batches(plan, shard_set, collate, numbers, threads),
        batch_size=None,
        num_workers=processes,
        prefetch_factor=waiting if workers else None,
        generator=torch.Generator().manual_seed(0),  # else torch takes a number from the global generator
        worker_init_fn=_init_worker,
        # forked, not spawned: the shared buffers are anonymous mappings that only a fork inherits
        multiprocessing_context="fork" if workers else None,
    )
    return _receive(iter(loader), plan, shard_set, numbers)


def _receive(
    produced: "Iterator[BatchT | _SharedBatch[BatchT] | _WorkerError]",
    plan: BatchPlan,
    shard_set: _WorkerShards,
    numbers: range,
) -> Generator[BatchT, None, None]:
    """The batches, or the error that ended a worker; shards needed soon are fetched meanwhile."""
    # without workers this process reads the shards itself; a service streams batches as long as it lives
    with closing(shard_set), prefetching(shard_set.shards, shard_set.cache) as prefetcher:
        for number in numbers:
            if prefetcher is not None:
                prefetcher.request(plan.upcoming_shards(number))
            batch = _next(produced)
            if isinstance(batch, _WorkerError):
                raise batch.error
            if isinstance(batch, _SharedBatch):
                assert shard_set.buffers is not None
                batch = batch.batch.with_images(shard_set.buffers.open(batch.buffer))
            yield batch


def _next(
    produced: "Iterator[BatchT | _SharedBatch[BatchT] | _WorkerError]",
) -> "BatchT | _SharedBatch[BatchT] | _WorkerError":
    try:
        return next(produced)
    except RuntimeError as error:
        # an error inside a worker names the worker as well, but no process
        if "DataLoader worker (pid" not in str(error):
            raise
        raise VlmError(
            f"A loader worker was killed ({error}), often out of memory: use fewer --workers or a smaller batch. "
            "What was saved is kept; continue with --resume."
        ) from error


def _init_worker(_: int) -> None:
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), name="parent", daemon=True).start()
    torch.set_num_threads(1)
    # objects from before the fork stay; each collection would visit them all, and copy their pages by writing to them
    gc.freeze()
    # timeout, systemd and batch systems send it to all processes of a run, which needs its workers until it has saved
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    """The handler: end this worker once the run has had time to save; torch, too, sends it to one that hangs."""
    timer = threading.Timer(_STOP_SECONDS, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _exit_with_parent(parent: int) -> None:
    """End this worker when its parent was killed: torch itself would wait for ever to hand over the last ones."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)
