"""Scanning shards with several processes: what comes out, and in which order, does not depend on how many or where."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

from vlm.data.tar import ShardReader
from vlm.errors import VlmError
from vlm.ray_engine import RayCluster, run_on_ray

_CHUNKS_AHEAD = 4
"""Submitted for each process, so that none is idle while results are consumed, and few results wait in memory."""


class ShardChunk(Protocol):
    """Samples of one shard, as one task of one process; it travels by pickle."""

    @property
    def shard(self) -> str:
        """The URL of the shard."""
        ...


Chunk = TypeVar("Chunk", bound=ShardChunk)
Result = TypeVar("Result")
Scan = Callable[[ShardReader, Chunk], Result]
"""What is done with a chunk, given its shard."""


def scan_shards(
    make_scan: Callable[[], Scan[Chunk, Result]],
    chunks: Iterable[Chunk],
    *,
    workers: int,
    cluster: RayCluster | None = None,
) -> Iterator[Result]:
    """The result of each chunk, in the order of the chunks.

    make_scan: called once in each process, so that what costs time to open (a tokenizer) is opened once.
    workers: processes that scan; 0 does it in this one.
    cluster: processes that scan instead, of a Ray cluster, whose machines see the shards under the same addresses.

    Raises:
        VlmError: a process was killed, on a cluster again and again at the same chunk.
    """
    if cluster is not None:
        yield from _scan_on_ray(make_scan, list(chunks), cluster)
        return
    if not workers:
        scanner = _Scanner(make_scan())
        try:
            yield from map(scanner, chunks)
        finally:
            scanner.close()
        return

    # spawned, not forked: this process may have threads by now
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_init_worker, initargs=(make_scan,)
    )
    pending: deque[Future[Any]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_scan_in_worker, chunk))
            # in the order submitted: a slow chunk holds back later ones, which are finished meanwhile
            if len(pending) > _CHUNKS_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise VlmError(
            f"One of the {workers} scanning processes was killed, most likely out of memory; "
            "repeat with fewer --workers."
        ) from error
    finally:
        # also when the consumer stops early and this generator is closed
        pool.shutdown(cancel_futures=True)


def _scan_on_ray(
    make_scan: Callable[[], Scan[Chunk, Result]], chunks: Sequence[Chunk], cluster: RayCluster
) -> Iterator[Result]:
    # they end in any order
    waiting: dict[int, Result] = {}
    num_yielded = 0
    open_scanner = partial(_open_scanner, make_scan)
    for number, result in run_on_ray(open_scanner, chunks, cluster, name_of=lambda chunk: chunk.shard):
        waiting[number] = result
        while num_yielded in waiting:
            yield waiting.pop(num_yielded)
            num_yielded += 1


def _open_scanner(make_scan: Callable[[], Scan[Any, Any]]) -> "_Scanner":
    return _Scanner(make_scan())


class _Scanner:
    """Scans chunk after chunk; keeps the shard used last open, since most chunks follow one of the same shard."""

    def __init__(self, scan: Scan[Any, Any]) -> None:
        self._scan = scan
        self._reader: ShardReader | None = None

    def __call__(self, chunk: ShardChunk) -> Any:
        if self._reader is None or self._reader.url != chunk.shard:
            self.close()
            self._reader = ShardReader(chunk.shard)
        return self._scan(self._reader, chunk)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


# a global, because an executor passes its tasks no state of the process that runs them
_worker_scanner: _Scanner | None = None


def _init_worker(make_scan: Callable[[], Scan[Any, Any]]) -> None:
    global _worker_scanner
    _worker_scanner = _Scanner(make_scan())


def _scan_in_worker(chunk: ShardChunk) -> Any:
    assert _worker_scanner is not None
    return _worker_scanner(chunk)
