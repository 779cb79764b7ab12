"""Our side of the index benchmark: autotune, build, open, search."""

import shutil
import time
from pathlib import Path
from typing import Any

from index_measure import PeakMemory, measure
from measure_server import serve

from vlm.index.ann.faiss_search import load_faiss
from vlm.index.autotune.autotuner import autotune, retune
from vlm.index.autotune.trial import TuningTarget
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings
from vlm.index.reader import Index

opened: dict[str, Index] = {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Autotune and build, or measure the built index."""
    folder = Path(request["folder"])
    load_faiss().omp_set_num_threads(1)
    if request["do"] != "build":
        return measure(lambda queries, top: opened["index"].nearest(queries, top)[1], request)
    out, peak = folder / "index", PeakMemory()
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    plan = autotune(
        Embeddings.open(folder / "images"),
        Embeddings.open(folder / "texts"),
        TuningTarget(recall=request["recall"]),
        max_rows=request["plan_rows"],
    )
    planned = time.perf_counter()
    built = build_index(folder / "images", out, kind=plan.kind, tuning=plan.tuning, evidence=plan.evidence)
    before = time.perf_counter()
    retune(out, Embeddings.open(folder / "images"), plan)
    settling = time.perf_counter() - before
    opened["index"] = index = Index.open(out)
    numbers = index.info().parameters
    told = " ".join(f"{name} {numbers[name]}" for name in ("nprobe", "ef_search", "rerank") if name in numbers)
    return {
        "what": f"{plan.winner.label} {told}",
        "plan_s": planned - began + settling,
        "build_s": built.seconds,
        "index_mb": (out / "segments" / "segment-00000.faiss").stat().st_size / 1e6,
        "peak_mb": peak.mb(),
        "kind": built.kind,
        "parameters": numbers,
        "why": plan.why,
    }


if __name__ == "__main__":
    serve(answer)
