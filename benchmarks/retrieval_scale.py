#!/usr/bin/env python
"""Time and memory of exact retrieval ranks in both directions, beside the bare matrix product.

    benchmarks/run retrieval_scale [--images 100000] [--texts 500000] [--size 512] [--repeats 1] [--kind trained]

Embeddings of a made-up model lie in memory-mapped files: each image has as many texts as there are to an image, whose
cosines with it are drawn. The bare product of all scores (block by block, into the same memory) and the ranks of both
directions are computed in turn, as often as asked. Times are given by the clock and of the processors, which other work
on the machine does not share; memory is what the process holds by itself at its peak beyond what it held before.
"""

import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import numpy as np
import psutil
import tyro

from vlm.cli.main import print_error
from vlm.console import show_fields, show_json
from vlm.errors import VlmError
from vlm.evaluation.rank_counts import CANDIDATES_AT_ONCE, QUERIES_AT_ONCE, PositivePairs, count_ranks
from vlm.evaluation.retrieval_metrics import Ranks
from vlm.tensor_types import Array, Float32

# mean and standard deviation of the cosine of an image with its text, that of others is 0 ± 1/√size
_COSINES = {"trained": (0.25, 0.06), "untrained": (0.0, 0.0)}
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the retrieval benchmark."""

    images: int = 100_000
    """Number of images."""

    texts: int = 500_000
    """Number of texts."""

    size: int = 512
    """Length of an embedding."""

    repeats: int = 1
    """How often each side is timed."""

    kind: Literal["trained", "untrained"] = "trained"
    """Cosines as of a trained model, or of one whose positives score like the rest, which is the most work."""

    bare_share: float = 1.0
    """Share of the blocks whose bare product is timed, half before and half after the ranks; its time is scaled up."""

    compiled: Literal["auto", "yes", "no"] = "auto"
    """Count by numba's machine code, which is compiled before the clock starts; auto: where it pays."""

    best_positive: bool = False
    """Count for the best positive of a query alone (recall, rank, MRR), not for each (nDCG and mAP, too)."""

    seed: int = 0
    """Random seed of the embeddings."""

    json: Annotated[bool, tyro.conf.arg(help="Print the results as JSON.")] = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Medians over the repeats. ratio, processor_ratio: time of the ranks over that of the bare product."""

    images: int
    texts: int
    size: int
    kind: str
    bare_seconds: float
    rank_seconds: float
    ratio: float
    processor_ratio: float
    memory_mib: float
    text_to_image_recall_at_1: float
    image_to_text_recall_at_1: float


class Stopwatch:
    """Seconds by the clock and of the processors while it is entered."""

    def __enter__(self) -> "Stopwatch":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        began, processor_began = self._began
        self.seconds = time.perf_counter() - began
        self.processor_seconds = time.process_time() - processor_began


def write_embeddings(folder: Path, options: Arguments) -> tuple[Float32[Array, "N D"], Float32[Array, "T D"]]:
    """The images and texts, memory-mapped; text t is of image t modulo the images."""
    rng = np.random.default_rng(options.seed)
    mean, spread = _COSINES[options.kind]
    images = np.lib.format.open_memmap(folder / "i.npy", "w+", np.float32, (options.images, options.size))
    for first in range(0, options.images, _ROWS_AT_ONCE):
        images[first : first + _ROWS_AT_ONCE] = _unit(rng, min(_ROWS_AT_ONCE, options.images - first), options.size)
    texts = np.lib.format.open_memmap(folder / "t.npy", "w+", np.float32, (options.texts, options.size))
    for first in range(0, options.texts, _ROWS_AT_ONCE):
        own = images[np.arange(first, min(first + _ROWS_AT_ONCE, options.texts)) % options.images]
        noise = _unit(rng, len(own), options.size)
        noise -= np.vecdot(noise, own)[:, None] * own
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        cosine = np.clip(mean + spread * rng.standard_normal((len(own), 1), np.float32), -1, 1)
        texts[first : first + len(own)] = cosine * own + np.sqrt(1 - cosine**2) * noise
    return np.load(folder / "i.npy", mmap_mode="r"), np.load(folder / "t.npy", mmap_mode="r")


def _unit(rng: np.random.Generator, number: int, size: int) -> Float32[Array, "N D"]:
    rows = rng.standard_normal((number, size), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def bare_product(images: Float32[Array, "N D"], texts: Float32[Array, "T D"], blocks: slice) -> float:
    """The scores of some of the blocks of rows, block by block; returns the share that they are of all."""
    left, right = np.asarray(images), np.asarray(texts)
    memory = np.empty(QUERIES_AT_ONCE * CANDIDATES_AT_ONCE, np.float32)
    num_rows = 0
    for row in range(0, len(left), QUERIES_AT_ONCE)[blocks]:
        rows = left[row : row + QUERIES_AT_ONCE]
        num_rows += len(rows)
        for column in range(0, len(right), CANDIDATES_AT_ONCE):
            columns = right[column : column + CANDIDATES_AT_ONCE]
            np.matmul(rows, columns.T, out=memory[: len(rows) * len(columns)].reshape(len(rows), len(columns)))
    return num_rows / len(left)


class PeakMemory:
    """The most memory this process holds by itself while it is entered, in bytes; mapped files are not among it."""

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _own(self) -> int:
        memory = self._process.memory_info()
        return memory.rss - memory.shared

    def _watch(self) -> None:
        while not self._has_ended.wait(0.02):
            self.peak = max(self.peak, self._own() - self._before)

    def __enter__(self) -> "PeakMemory":
        self._before = self._own()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join()


def measure(options: Arguments, folder: Path) -> Outcome:
    """Both sides in turn."""
    images, texts = write_embeddings(folder, options)
    columns = np.arange(options.texts)
    pairs = PositivePairs(rows=columns % options.images, columns=columns)
    compiled = None if options.compiled == "auto" else options.compiled == "yes"
    if compiled:
        few = PositivePairs(rows=columns[:2], columns=columns[:2])
        count_ranks(np.array(images[:8]), np.array(texts[:8]), few, compiled=True)
    costs: list[tuple[float, float, float, float]] = []
    peak = 0
    recalls: list[float] = []
    # every so many blocks, the odd ones of these before the ranks and the even ones after
    step = max(1, round(2 / options.bare_share))
    for _ in range(options.repeats):
        bare: list[tuple[float, Stopwatch]] = [_timed_product(images, texts, slice(step // 2, None, step))]
        with PeakMemory() as memory, Stopwatch() as watch:
            by_image, by_text = count_ranks(
                images, texts, pairs, every_positive=not options.best_positive, compiled=compiled
            )
        bare.append(_timed_product(images, texts, slice(0, None, step)))
        peak = max(peak, memory.peak)
        assert by_text is not None
        recalls = [Ranks.from_counts(counts).recall(1) for counts in (by_text, by_image)]
        share = sum(part for part, _ in bare)
        seconds = sum(side.seconds for _, side in bare) / share
        processor_seconds = sum(side.processor_seconds for _, side in bare) / share
        costs.append((seconds, watch.seconds, watch.seconds / seconds, watch.processor_seconds / processor_seconds))
        print(f"bare {seconds:.1f} s, ranks {watch.seconds:.1f} s", file=sys.stderr)
    bare_seconds, rank_seconds, ratio, processor_ratio = map(median, zip(*costs, strict=True))
    return Outcome(
        images=options.images,
        texts=options.texts,
        size=options.size,
        kind=options.kind,
        bare_seconds=bare_seconds,
        rank_seconds=rank_seconds,
        ratio=ratio,
        processor_ratio=processor_ratio,
        memory_mib=peak / 2**20,
        text_to_image_recall_at_1=recalls[0],
        image_to_text_recall_at_1=recalls[1],
    )


def _timed_product(
    images: Float32[Array, "N D"], texts: Float32[Array, "T D"], blocks: slice
) -> tuple[float, Stopwatch]:
    with Stopwatch() as watch:
        share = bare_product(images, texts, blocks)
    return share, watch


def main() -> int:
    """Measure, show."""
    options = tyro.cli(Arguments, description=__doc__)
    try:
        with tempfile.TemporaryDirectory() as folder:
            outcome = measure(options, Path(folder))
    except VlmError as error:
        print_error(error)
        return 1
    if options.json:
        show_json(asdict(outcome))
    else:
        show_fields(asdict(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
