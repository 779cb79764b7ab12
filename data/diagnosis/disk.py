"""The disk and the indexes, alone: how fast shards are read in order and at random, and their members found."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from time import perf_counter

import numpy as np

from vlm.data.diagnosis.stages import Stage, seconds_of
from vlm.data.storage.addresses import is_remote, local_path, needs_cache
from vlm.data.storage.remote import identity_of, read_blocks
from vlm.data.tar_index import Span, open_index
from vlm.data.tar_scan import read_entries

_BLOCK_BYTES = 1 << 20
_MOST_BYTES = 256 << 20
_MOST_SHARDS = 8
_PROBES = 256
_MOSTLY = 0.5


def measure_disk(shards: Sequence[str], places: Sequence[tuple[int, int]]) -> list[Stage]:
    """Reading shards in order, and samples at random.

    places: (shard, number) of the samples to read at random, in that order.
    """
    counts = [len(open_index(shard)) for shard in shards[:_MOST_SHARDS]]
    files = [local_path(shard) for shard in shards[:_MOST_SHARDS]]
    read, seconds, note = _in_order(files)
    bytes_a_sample = max(sum(identity_of(file).size for file in files) / max(sum(counts), 1), 1)
    rate = read / seconds
    stages = [
        Stage(name="disk, in order", rate=rate / bytes_a_sample, cores=0, each="machine", bytes_rate=rate, note=note)
    ]
    if all(not needs_cache(shards[shard]) for shard, _ in places):
        stages.append(_at_random(shards, places))
    return stages


def measure_index(shards: Sequence[str]) -> list[Stage]:
    """Finding the members of shards: by going through the tar, and from the cached index."""
    files = [local_path(shard) for shard in shards[:_MOST_SHARDS] if not needs_cache(shard)]
    stages: list[Stage] = []
    if files:
        seconds = seconds_of(lambda: [_scan(shard) for shard in files])
        samples = sum(len(open_index(shard)) for shard in files)
        stages.append(Stage(name="index, scanned", rate=samples / seconds, cores=1, each="process"))
    opened = list(shards[:_MOST_SHARDS])
    samples = sum(len(open_index(shard)) for shard in opened)
    # in a fresh process: this one has them open
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds = pool.submit(seconds_to_open, opened).result()
    return [*stages, Stage(name="index, cached", rate=samples / seconds, cores=1, each="process")]


def seconds_to_open(shards: list[str]) -> float:
    """Seconds to open the indexes of shards for the first time in a process."""
    begun = perf_counter()
    for shard in shards:
        open_index(shard)
    return max(perf_counter() - begun, 1e-9)


def cached_share(path: str) -> float | None:
    """Which share of a file lies in the page cache, from evenly spread probes; None where the system does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    size = os.path.getsize(path)
    probes = np.unique(np.linspace(0, max(size - 1, 0), _PROBES).astype(np.int64)).tolist()
    there = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in probes:
            try:
                there += os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                continue
            except OSError:
                return None
    finally:
        os.close(descriptor)
    return there / len(probes)


def _in_order(files: list[str]) -> tuple[int, float, str]:
    """Bytes read, seconds taken, and whose speed that is."""
    if any(map(is_remote, files)):
        begun = perf_counter()
        return _read_all(files), perf_counter() - begun, "over the network, past the cache"
    before = cached_share(files[0])
    _drop(files)
    dropped = cached_share(files[0])
    read = min(sum(identity_of(file).size for file in files), _MOST_BYTES)
    seconds = seconds_of(lambda: _read_all(files), before=lambda: _drop(files))
    if before is None or dropped is None:
        return read, seconds, "it is not known what lay in memory"
    if dropped > _MOSTLY:
        return read, seconds, "from memory: it could not be read from the disk itself"
    return read, seconds, f"{before:.0%} lay in memory and was dropped first"


def _read_all(files: list[str]) -> int:
    """Read up to `_MOST_BYTES`; the bytes read."""
    read = 0
    for file in files:
        for block in _blocks(file):
            read += len(block)
            if read >= _MOST_BYTES:
                return read
    return read


def _at_random(shards: Sequence[str], places: Sequence[tuple[int, int]]) -> Stage:
    used = sorted({shard for shard, _ in places})
    files = [local_path(shards[shard]) for shard in used]
    descriptors = {shard: os.open(file, os.O_RDONLY) for shard, file in zip(used, files, strict=True)}
    indexes = {shard: open_index(shards[shard]) for shard in used}
    spans: list[tuple[int, Span]] = []
    for shard, number in places:
        member = indexes[shard][number]
        spans += [(descriptors[shard], span) for span in (member.image, member.text, member.json) if span]

    def read_all() -> None:
        for descriptor, span in spans:
            os.pread(descriptor, span.size, span.offset)

    try:
        seconds = seconds_of(read_all, before=lambda: _drop(files))
        warm = seconds_of(read_all)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return Stage(
        name="disk, at random",
        rate=len(places) / seconds,
        cores=0,
        each="process",
        bytes_rate=sum(span.size for _, span in spans) / seconds,
        note=f"{len(places) / warm:,.0f}/s once in memory",
    )


def _drop(files: list[str]) -> None:
    """Ask the system to forget what it keeps of these files in memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _scan(shard: str) -> None:
    with open(shard, "rb") as file:
        read_entries(file, shard)


def _blocks(address: str) -> Iterator[bytes]:
    if is_remote(address):
        yield from read_blocks(address, 0, identity_of(address))
        return
    with open(local_path(address), "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            yield block
