"""autofaiss's side of the index benchmark, in its own environment."""

import logging
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from autofaiss import build_index
from index_measure import PeakMemory, measure
from measure_server import serve

built: dict[str, Any] = {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Build the index that autofaiss chooses, or measure it."""
    folder = Path(request["folder"])
    faiss.omp_set_num_threads(1)
    if request["do"] != "build":
        return measure(lambda queries, top: built["index"].search(queries, top)[1], request)
    rows, peak = np.load(folder / "rows.npy"), PeakMemory()
    began = time.process_time()
    index, infos = build_index(
        rows,
        save_on_disk=False,
        metric_type="ip",
        nb_cores=1,
        max_index_memory_usage=request["memory"],
        verbose=logging.ERROR,
    )
    seconds = time.process_time() - began
    faiss.omp_set_num_threads(1)
    if index is None or infos is None:
        return {"failed": "it returned no index"}
    built["index"] = index
    return {
        "what": f"{infos['index_key']} {infos['index_param']}",
        "build_s": seconds,
        "index_mb": len(faiss.serialize_index(index)) / 1e6,
        "peak_mb": peak.mb(),
    }


def careful(request: dict[str, Any]) -> dict[str, Any]:
    """A failure is a valid response, too."""
    try:
        return answer(request)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    serve(careful)
