"""One side of the loader benchmark: this project's loader, as `vlm train` builds it."""

import gc
import resource
import time
from collections.abc import Iterator
from typing import Any

from measure_server import anonymous_mb, memory_mb, peak_mb, serve, time_stream

from vlm.data.collate import TrainingBatch, TrainingCollator
from vlm.data.loader import WORKER_THREADS, stream_batches
from vlm.data.sampler import BatchSampler, SampleOrder
from vlm.data.shards import count_samples
from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform, RandomResizedCrop
from vlm.models.model import normalise


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Time the loader, or with `epochs` measure its memory after each epoch, its peak, seconds, CPU seconds."""
    if "epochs" in request:
        began, before = time.perf_counter(), _cpu_seconds()
        memory = memory_by_epoch(request)
        return memory | {"seconds": time.perf_counter() - began, "cpu_s": _cpu_seconds() - before}

    def stream() -> Iterator[int]:
        for batch in _open(request, request["batches"]):
            images = normalise(batch.images, EvalTransform()) if request["is_float"] else batch.images
            yield len(images)

    return time_stream(stream, request)


def memory_by_epoch(request: dict[str, Any]) -> dict[str, Any]:
    """MB of all processes at the end of each epoch; after the last their peaks, and what is not of files."""
    samples = sum(count_samples(request["shards"]))
    ends = [-(-epoch * samples // request["batch"]) for epoch in range(1, request["epochs"] + 1)]
    found: list[float] = []
    last: dict[str, float] = {}
    for number, _ in enumerate(_open(request, ends[-1]), 1):
        if number == ends[len(found)]:
            found.append(memory_mb())
            # while the workers are still there
            last = {"peak_mb": peak_mb(), "anonymous_mb": anonymous_mb()}
    return {"memory_mb": found, **last}


def _cpu_seconds() -> float:
    """Of this process and of those it started, which have ended."""
    gc.collect()
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _open(request: dict[str, Any], batches: int) -> Iterator[TrainingBatch]:
    order = SampleOrder(counts=tuple(count_samples(request["shards"])))
    plan = BatchSampler(order=order, batch_size=request["batch"])
    collate = TrainingCollator(
        plan=plan, view=RandomResizedCrop(size=request["size"]), tokenizer=open_tokenizer("clip")
    )
    numbers = range(batches)
    return stream_batches(
        plan, request["shards"], collate, numbers=numbers, workers=request["workers"], threads=WORKER_THREADS
    )


if __name__ == "__main__":
    open_tokenizer("clip")  # imports open_clip, which the other side does in its first lines
    serve(measure)
