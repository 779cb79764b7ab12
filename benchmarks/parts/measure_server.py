"""The measuring end of each side of the loader benchmark: one line of JSON in, one line out, until the input ends.

Imported by all sides, also in open_clip's own environment, so it must not import vlm.
"""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil


def serve(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Report that the imports are done, then answer each request with the result of `measure`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(measure(json.loads(line))) + "\n")


def time_stream(open_stream: Callable[[], Iterator[int]], request: dict[str, Any]) -> dict[str, float]:
    """Time a stream that yields the number of images of each batch.

    The rate covers the time from batch number `skip` to the last, which excludes starting the workers. first_s: from
    the call to the first batch. memory_mb: proportional set size of all processes at the end.
    """
    began = time.perf_counter()
    stream = open_stream()
    arrivals: list[float] = []
    images: list[int] = []
    for count in stream:
        arrivals.append(time.perf_counter())
        images.append(count)
        if len(arrivals) == request["batches"]:
            break
    memory = memory_mb()
    del stream
    gc.collect()
    skip = request["skip"]
    return {
        "images_per_s": sum(images[skip:]) / (arrivals[-1] - arrivals[skip - 1]),
        "first_s": arrivals[0] - began,
        "memory_mb": memory,
    }


def memory_mb() -> float:
    """Proportional set size of this process and its children in MB: shared pages are counted once."""
    this = psutil.Process()
    total = 0
    for process in (this, *this.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


def peak_mb(process: psutil.Process | None = None) -> float:
    """Sum of the largest resident memory of a process (this one) and of its children, in MB."""
    # not the peak of getrusage, which has that of whoever started the process
    return _sum_of("VmHWM:", process)


def anonymous_mb(process: psutil.Process | None = None) -> float:
    """Sum of what a process (this one) and its children hold that is not of files, in MB."""
    return _sum_of("RssAnon:", process)


def _sum_of(field: str, process: psutil.Process | None) -> float:
    root = process or psutil.Process()
    total = 0
    for one in (root, *root.children(recursive=True)):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith(field))
    return total * 1024 / 1e6
