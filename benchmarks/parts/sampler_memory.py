"""Cost of the sampler for N samples: `sampler_memory.py N SAMPLES_PER_SHARD FOLDER` prints one line of JSON.

Metadata only: shards of even size, without and with a selection of all samples, memory-mapped as in training.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vlm.data.sampler import BatchSampler, SampleOrder
from vlm.data.selection import SelectedShard, Selection, read_selection, write_selection

BATCH, BATCHES = 64, 200


def main(samples: int, per_shard: int, folder: Path) -> dict[str, Any]:
    """Anonymous memory in MB and seconds, of the sampler without and with a selection."""
    counts = tuple(min(per_shard, samples - first) for first in range(0, samples, per_shard))
    path = folder / f"{samples}.selection"
    # in its own process: memory freed here would be reused and hide the cost of the sampler
    writer = multiprocessing.get_context("fork").Process(target=_write, args=(path, counts))
    writer.start()
    writer.join()
    result = {
        "samples": samples,
        "plain": _cost(lambda: SampleOrder(counts=counts)),
        "selected": _cost(lambda: SampleOrder.of_selection(read_selection(path).times)),
    }
    path.unlink()
    return result


def _write(path: Path, counts: tuple[int, ...]) -> None:
    shards = tuple(SelectedShard(name=str(n), fingerprint=str(n), samples=count) for n, count in enumerate(counts))
    rng = np.random.default_rng(0)
    times = tuple(rng.integers(0, 3, count, dtype=np.uint16) for count in counts)
    write_selection(path, Selection(shards=shards, times=times))


def _cost(build: Callable[[], SampleOrder]) -> dict[str, float]:
    before, began = _anonymous_mb(), time.perf_counter()
    order = build()
    visits = order.num_samples
    built = time.perf_counter()
    first = BatchSampler(order=order, batch_size=BATCH)
    for number in range(BATCHES):
        first[number]
    located = time.perf_counter()
    for number in np.random.default_rng(0).integers(visits // BATCH, size=5).tolist():
        first[number]
    ended = time.perf_counter()
    return {
        "build_s": built - began,
        "sample_us": (located - built) / (BATCH * BATCHES) * 1e6,
        "jump_ms": (ended - located) / 5 * 1e3,
        "anonymous_mb": _anonymous_mb() - before,
    }


def _anonymous_mb() -> float:
    info = psutil.Process().memory_info()
    return (info.rss - info.shared) / 1e6


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
