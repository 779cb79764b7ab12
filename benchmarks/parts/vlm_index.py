"""Our sides of the index benchmark: build the index that the autotuner chooses, or one of a given type; search it."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from index_measure import PeakMemory, Search, measure, tune_ef
from measure_server import serve

from vlm.index.ann.faiss_search import load_faiss
from vlm.index.autotune.autotuner import autotune, retune
from vlm.index.autotune.trial import TuningTarget
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings
from vlm.index.reader import Index
from vlm.index.writer import IndexWriter

opened: dict[str, Index] = {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Autotune and build, or build the requested type, or measure the built index."""
    folder = Path(request["folder"])
    load_faiss().omp_set_num_threads(1)
    if request["do"] != "build":
        return measure(_search, request)
    out, peak = folder / f"index-{request['kind']}", PeakMemory()
    shutil.rmtree(out, ignore_errors=True)
    build = _build_chosen if request["kind"] == "auto" else _build_graph
    told = build(folder, out, request) | {"peak_mb": peak.mb()}
    numbers = opened["index"].info().parameters
    set_numbers = " ".join(f"{name} {numbers[name]}" for name in ("nprobe", "ef_search", "rerank") if name in numbers)
    megabytes = (out / "segments" / "segment-00000.faiss").stat().st_size / 1e6
    return told | {"what": f"{told['what']} {set_numbers}", "index_mb": megabytes, "parameters": numbers}


def _search(queries: Any, top: int) -> Any:
    return opened["index"].nearest(queries, top)[1]


def _build_chosen(folder: Path, out: Path, request: dict[str, Any]) -> dict[str, Any]:
    """As `vlm index build` with a target of recall."""
    began = time.process_time()
    plan = autotune(
        Embeddings.open(folder / "images"),
        Embeddings.open(folder / "texts"),
        TuningTarget(recall=request["recall"]),
        max_rows=request["plan_rows"],
    )
    planned = time.process_time()
    built = build_index(
        folder / "images",
        out,
        kind=plan.kind,
        tuning=plan.tuning,
        link_queries=plan.link_queries,
        evidence=plan.evidence,
    )
    finished = time.process_time()
    retune(out, Embeddings.open(folder / "images"), plan)
    seconds = {"plan_s": planned - began + time.process_time() - finished, "build_s": finished - planned}
    opened["index"] = Index.open(out)
    return seconds | {"what": plan.winner.label, "kind": built.kind, "why": plan.why}


def _build_graph(folder: Path, out: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The index type with the effort that is tuned as that of the graphs of others is."""
    began = time.process_time()
    linking = folder / "linking.npy"
    link_queries = np.load(linking) if linking.is_file() else None
    built = build_index(folder / "images", out, kind=request["kind"], link_queries=link_queries)
    finished = time.process_time()

    def set_search(ef: int) -> Search:
        with IndexWriter(out) as writer:
            writer.set_search_params(effort=ef, rerank=0)
        if "index" in opened:
            opened.pop("index").close()
        opened["index"] = Index.open(out)
        return _search

    set_search(tune_ef(set_search, folder, request["recall"]))
    seconds = {"plan_s": time.process_time() - finished, "build_s": finished - began}
    links = "" if link_queries is None else f" linked by {len(link_queries):,} texts"
    return seconds | {"what": f"{built.kind}{links}", "kind": built.kind}


if __name__ == "__main__":
    serve(answer)
