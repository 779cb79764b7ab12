"""Bare FAISS with the parameters that our autotuner chose: no folder, no catalog, no checks."""

import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from index_measure import PeakMemory, measure
from measure_server import serve

_KEYS = {
    "flat": "Flat",
    "sq8": "SQ8",
    "hnsw": "HNSW{links}",
    "ivf": "IVF{nlist},Flat",
    "ivfsq": "IVF{nlist},SQ8",
    "ivfpq": "IVF{nlist},PQ{subvectors}x4fs",
    "rabitq": "RR,IVF{nlist},RaBitQ",
}
_TRAINING_ROWS_PER_LIST = 50

built: dict[str, Any] = {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Build the requested index type, or measure it."""
    folder = Path(request["folder"])
    faiss.omp_set_num_threads(1)
    if request["do"] != "build":
        return measure(built["search"], request)
    rows, numbers, peak = np.load(folder / "rows.npy"), request["parameters"], PeakMemory()
    rerank = numbers.get("rerank", 0)
    key = _KEYS[request["kind"]].format(**numbers, subvectors=rows.shape[1] // 2) + (",RFlat" if rerank else "")
    began = time.process_time()
    # as our index type compares: product codes by distance, all others by inner product
    is_by_distance = request["kind"] == "ivfpq"
    index = faiss.index_factory(rows.shape[1], key, faiss.METRIC_L2 if is_by_distance else faiss.METRIC_INNER_PRODUCT)
    if is_by_distance:
        faiss.extract_index_ivf(index).cp.spherical = True
    if request["kind"] == "ivfsq":
        _encode_uniformly(index)
    if request["kind"] == "hnsw":
        index.hnsw.efConstruction = numbers["ef_construction"]
    wanted = max(numbers.get("nlist", 0) * _TRAINING_ROWS_PER_LIST, 16_384 if rerank else 0)
    index.train(rows[np.random.default_rng(0).permutation(len(rows))[:wanted]])
    index.add(rows)
    seconds = time.process_time() - began
    built["search"] = _searcher(index, numbers, rerank)
    return {
        "what": f"{key} {_told(numbers)}",
        "build_s": seconds,
        "index_mb": len(faiss.serialize_index(index)) / 1e6,
        "peak_mb": peak.mb(),
    }


def _encode_uniformly(refined: Any) -> None:
    """One range for all dimensions, as our index type has it; the factory has no string for it."""
    index: Any = faiss.downcast_index(refined.base_index)
    index.sq = faiss.ScalarQuantizer(index.d, faiss.ScalarQuantizer.QT_8bit_uniform)


def _searcher(index: Any, numbers: dict[str, int], rerank: int) -> Any:
    space, inner = faiss.ParameterSpace(), index.base_index if rerank else index
    if "nprobe" in numbers:
        space.set_index_parameter(inner, "nprobe", numbers["nprobe"])
    if "ef_search" in numbers:
        space.set_index_parameter(inner, "efSearch", numbers["ef_search"])
    if rerank:
        index.k_factor = rerank
    return lambda queries, top: index.search(queries, top)[1]


def _told(numbers: dict[str, int]) -> str:
    return " ".join(f"{name} {numbers[name]}" for name in ("nprobe", "ef_search", "rerank") if name in numbers)


if __name__ == "__main__":
    serve(answer)
