"""One step of the index size benchmark, in its own process with limited memory."""

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from growth_rows import read_questions, write_rows
from index_measure import PeakMemory
from index_vectors import Mixture
from measure_server import serve
from pyroaring import BitMap

from vlm.index import build
from vlm.index.ann.faiss_search import load_faiss
from vlm.index.autotune.query_sampling import exact_scores, per_query_recall
from vlm.index.engine_writer import InsertBatch
from vlm.index.filter_language import parse_filter
from vlm.index.reader import Index
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter
from vlm.manifest import is_complete
from vlm.tensor_types import Array, Float32

FILTERS = {
    "half of the rows": "language = 'en'",
    "one in 40": "language = 'en' and width >= 512 and year >= 2018 and not tags has 'babe'",
    "one in 500": "year = 2001 and width >= 3000",
}
_TOP = 10
_FILTERED_QUESTIONS = 50
_ROWS_AT_ONCE = 65_536

Values = dict[str, Any]


def draw(folder: Path, request: Values) -> Values:
    """The rows, and those to be added later, from one mixture."""
    dimension, questions = request["dimension"], request["questions"]
    mixture = Mixture(request["rows"], dimension, seed=request["seed"])
    if not is_complete(folder / "rows"):
        write_rows(
            folder / "rows", request["rows"], mixture, dimension=dimension, name="row", seed=1, questions=questions
        )
    if not is_complete(folder / "more"):
        write_rows(folder / "more", request["changed"], mixture, dimension=dimension, name="more", seed=2)
    return {"items": request["rows"], "bytes": _bytes_in(folder / "rows" / "parts")}


def make(folder: Path, request: Values) -> Values:
    """Build the index: checksums of the embeddings, segment, catalog."""
    for left in (folder / "index", *folder.glob(".index.*.part")):
        shutil.rmtree(left, ignore_errors=True)
    seconds: dict[str, float] = {}
    build.write_segment = _timed(build.write_segment, "segment_cpu_s", seconds)
    build.write_catalogue = _timed(build.write_catalogue, "catalogue_cpu_s", seconds)
    built = build.build_index(folder / "rows", folder / "index", kind=request["kind"])
    files = {path.name: path.stat().st_size for path in (folder / "index").rglob("*") if path.is_file()}
    sizes = {
        f"{name}_bytes": sum(size for file, size in files.items() if file.endswith(ending))
        for name, ending in (("faiss", ".faiss"), ("vectors", "0.npy"), ("catalogue", ".sqlite"))
    }
    return {"items": built.rows, "parameters": built.parameters, **seconds, **sizes}


def add(folder: Path, request: Values) -> Values:
    """Add new rows."""
    with IndexWriter(folder / "index") as writer:
        before = time.perf_counter()
        change = writer.add(InsertBatch.from_folder(folder / "more"))
        return {"items": change.added, "change_s": time.perf_counter() - before, "segments": change.segments}


def delete(folder: Path, request: Values) -> Values:
    """Delete rows all over the index by uid."""
    chosen = np.random.default_rng(3).permutation(request["rows"])[: request["changed"] // 2]
    uids = [f"row{row:09d}" for row in chosen] + [f"more{row:09d}" for row in range(len(chosen))]
    with IndexWriter(folder / "index") as writer:
        before = time.perf_counter()
        change = writer.delete(uids)
        return {"items": change.removed, "change_s": time.perf_counter() - before, "dead": change.dead}


def search(folder: Path, request: Values) -> Values:
    """Text queries one by one, with and without a filter."""
    began = time.perf_counter()
    index = Index.open(folder / "index")
    found: Values = {"items": 1, "open_s": time.perf_counter() - began}
    questions = read_questions(folder / "rows")
    found["all"] = _asked(index, questions, None)
    for name, words in FILTERS.items():
        condition = parse_filter(words)
        began = time.perf_counter()
        rows = index.catalogue.where(condition)
        first_ms = 1000 * (time.perf_counter() - began)
        again: list[float] = []
        for _ in range(4):
            began = time.perf_counter()
            index.catalogue.where(condition)
            again.append(1000 * (time.perf_counter() - began))
        found[name] = {
            "where_first_ms": first_ms,
            "where_ms": float(np.median(again)),
            **_asked(index, questions[:_FILTERED_QUESTIONS], rows),
        }
    return found


def compact(folder: Path, request: Values) -> Values:
    """Compact all live rows into one segment and one catalog."""
    seconds: dict[str, float] = {}
    IndexWriter._rewrite_catalogue = _timed(IndexWriter._rewrite_catalogue, "catalogue_cpu_s", seconds)
    with IndexWriter(folder / "index") as writer:
        change = writer.compact()
    return {"items": change.rows, "bytes": _bytes_in(folder / "index"), **seconds}


def check(folder: Path, request: Values) -> Values:
    """Check files, joins, counts, metadata, distances."""
    report = check_index(folder / "index")
    return {"items": report.rows, "faults": len(report.faults)}


STEPS: dict[str, Callable[[Path, Values], Values]] = {
    "draw": draw,
    "build": make,
    "search": search,
    "add": add,
    "delete": delete,
    "search again": search,
    "compact": compact,
    "check": check,
}
"""The steps in order."""


def answer(request: Values) -> Values:
    """Run a step; a failure is a valid response, too."""
    limit = request["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    load_faiss().omp_set_num_threads(request["threads"])
    peak, began, computed = PeakMemory(), time.perf_counter(), time.process_time()
    try:
        found = STEPS[request["do"]](Path(request["folder"]), request)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}
    spent = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - computed}
    return {**spent, "peak_mb": peak.whole_mb(), **found}


def _asked(index: Index, questions: Float32[Array, "Q D"], rows: BitMap | None) -> Values:
    """Recall, and milliseconds per query with its catalog entries; cpu_ms: mean CPU time."""
    index.search(questions[:5], _TOP, rows)
    seconds, computed = [], time.process_time()
    for question in questions:
        before = time.perf_counter()
        index.search(question[None], _TOP, rows)
        seconds.append(time.perf_counter() - before)
    cpu_ms = 1000 * (time.process_time() - computed) / len(questions)
    p50, p95, p99 = (1000 * float(value) for value in np.percentile(seconds, (50, 95, 99)))
    scores, _ = index.nearest(questions, _TOP, rows)
    recall = float(per_query_recall(scores, exact_scores(_blocks(index, rows), questions, _TOP), _TOP).mean())
    count = len(index) if rows is None else len(rows)
    return {"rows": count, "cpu_ms": cpu_ms, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "recall@10": recall}


def _blocks(index: Index, rows: BitMap | None) -> Iterator[Float32[Array, "_ D"]]:
    for views in index.snapshot.views:
        chosen = views if rows is None else views.restricted_to(rows)
        for positions in chosen.position_blocks(_ROWS_AT_ONCE):
            yield chosen.segment.vectors.take(positions)


def _timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """Wrap a function so that its CPU seconds are recorded under a name."""

    def call(*arguments: Any, **named: Any) -> Any:
        before = time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            seconds[name] = time.process_time() - before

    return call


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    serve(answer)
