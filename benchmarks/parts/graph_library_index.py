"""HNSW graphs of other libraries in the index benchmark, in their own environment: built, and tuned to a recall."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import hnswlib
import numpy as np
from index_measure import PeakMemory, measure
from measure_server import serve
from usearch.index import Index as UsearchIndex

LINKS = 16
EF_CONSTRUCTION = 200
_EF = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_TUNED_FOR = 10

Search = Callable[[np.ndarray, int], np.ndarray]
built: dict[str, Search] = {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Build the graph of the requested library, with the smallest ef that reaches the recall on the tuning queries."""
    if request["do"] != "build":
        return measure(built["search"], request)
    folder = Path(request["folder"])
    rows, peak = np.load(folder / "rows.npy"), PeakMemory()
    began = time.perf_counter()
    search, set_ef, size = {"hnswlib": _hnswlib, "usearch": _usearch, "FAISS HNSW": _faiss}[request["library"]](rows)
    seconds = time.perf_counter() - began
    peak_mb = peak.mb()
    truth = np.load(folder / "planned_truth.npy")
    planned = np.load(folder / "planned.npy")
    for ef in _EF:
        set_ef(ef)
        found = search(planned, _TUNED_FOR)
        scores = np.einsum("qd,qkd->qk", planned, rows[np.maximum(found, 0)])
        recall = float((scores >= truth[:, _TUNED_FOR - 1 : _TUNED_FOR] - 1e-6).mean())
        if recall >= request["recall"]:
            break
    tuned_seconds = time.perf_counter() - began - seconds
    built["search"] = search
    what = f"M {LINKS}, efConstruction {EF_CONSTRUCTION}, ef {ef}"
    return {"what": what, "plan_s": tuned_seconds, "build_s": seconds, "index_mb": size() / 1e6, "peak_mb": peak_mb}


def _hnswlib(rows: np.ndarray) -> tuple[Search, Callable[[int], None], Callable[[], float]]:
    index = hnswlib.Index(space="ip", dim=rows.shape[1])
    index.init_index(max_elements=len(rows), M=LINKS, ef_construction=EF_CONSTRUCTION, random_seed=0)
    index.set_num_threads(1)
    index.add_items(rows, num_threads=1)
    # its labels are unsigned
    return (
        lambda queries, top: index.knn_query(queries, k=top, num_threads=1)[0].astype(np.int64),
        index.set_ef,
        index.index_file_size,
    )


def _usearch(rows: np.ndarray) -> tuple[Search, Callable[[int], None], Callable[[], float]]:
    index = UsearchIndex(
        ndim=rows.shape[1], metric="ip", dtype="f32", connectivity=LINKS, expansion_add=EF_CONSTRUCTION
    )
    index.add(np.arange(len(rows)), rows, threads=1)

    def search(queries: np.ndarray, top: int) -> np.ndarray:
        found: Any = index.search(queries, top, threads=1)
        return np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1)

    def set_ef(ef: int) -> None:
        index.expansion_search = ef

    return search, set_ef, lambda: float(index.serialized_length)


def _faiss(rows: np.ndarray) -> tuple[Search, Callable[[int], None], Callable[[], float]]:
    faiss.omp_set_num_threads(1)
    index: Any = faiss.IndexHNSWFlat(rows.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EF_CONSTRUCTION
    index.add(rows)

    def set_ef(ef: int) -> None:
        index.hnsw.efSearch = ef

    return lambda queries, top: index.search(queries, top)[1], set_ef, lambda: len(faiss.serialize_index(index))


if __name__ == "__main__":
    serve(answer)
