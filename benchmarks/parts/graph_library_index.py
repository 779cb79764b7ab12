"""HNSW graphs of other libraries in the index benchmark, in their own environment: built, and tuned to a recall."""

import json
import time
from pathlib import Path
from typing import Any, Protocol

import faiss
import hnswlib
import numpy as np
from index_measure import PeakMemory, Search, measure, tune_ef
from measure_server import serve
from usearch.index import Index as UsearchIndex

LINKS = 16
EF_CONSTRUCTION = 200

built: dict[str, Search] = {}


class Graph(Protocol):
    """A library's graph: built or read back, its ef set, searched."""

    def build(self, rows: np.ndarray) -> None:
        """Build it by one thread."""
        ...

    def save(self, path: str) -> None:
        """Write it to a file."""
        ...

    def load(self, path: str, dimension: int) -> None:
        """Read it from a file."""
        ...

    def set_ef(self, ef: int) -> None:
        """Set the candidates of a search."""
        ...

    def search(self, queries: np.ndarray, top: int) -> np.ndarray:
        """Search by one thread; gives positions."""
        ...


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Build the graph of the requested library, with the least ef that reaches the recall on the tuning queries.

    A graph that lies in the folder from a run before is read instead.
    """
    if request["do"] != "build":
        return measure(built["search"], request)
    folder, library = Path(request["folder"]), request["library"]
    graph: Graph = {"hnswlib": Hnswlib, "usearch": Usearch, "FAISS HNSW": Faiss}[library]()
    file = folder / f"{library}.graph"
    costs_file = file.with_suffix(".json")
    if not costs_file.is_file():
        costs = _build(graph, np.load(folder / "rows.npy"))
        graph.save(str(file))
        costs_file.write_text(json.dumps(costs | {"index_mb": file.stat().st_size / 1e6}), encoding="utf-8")
    else:
        graph.load(str(file), np.load(folder / "rows.npy", mmap_mode="r").shape[1])

    def set_search(ef: int) -> Search:
        graph.set_ef(ef)
        return graph.search

    began = time.process_time()
    ef = tune_ef(set_search, folder, request["recall"])
    built["search"] = set_search(ef)
    told = {"what": f"M {LINKS}, efConstruction {EF_CONSTRUCTION}, ef {ef}", "plan_s": time.process_time() - began}
    return told | json.loads(costs_file.read_text(encoding="utf-8"))


def _build(graph: Graph, rows: np.ndarray) -> dict[str, float]:
    peak, began = PeakMemory(), time.process_time()
    graph.build(rows)
    return {"build_s": time.process_time() - began, "peak_mb": peak.mb()}


class Hnswlib:
    """The graph of hnswlib."""

    def build(self, rows: np.ndarray) -> None:
        """Build it by one thread."""
        self._index = hnswlib.Index(space="ip", dim=rows.shape[1])
        self._index.init_index(max_elements=len(rows), M=LINKS, ef_construction=EF_CONSTRUCTION, random_seed=0)
        self._index.add_items(rows, num_threads=1)

    def save(self, path: str) -> None:
        """Write it to a file."""
        self._index.save_index(path)

    def load(self, path: str, dimension: int) -> None:
        """Read it from a file."""
        self._index = hnswlib.Index(space="ip", dim=dimension)
        self._index.load_index(path)

    def set_ef(self, ef: int) -> None:
        """Set the candidates of a search."""
        self._index.set_num_threads(1)
        self._index.set_ef(ef)

    def search(self, queries: np.ndarray, top: int) -> np.ndarray:
        """Search by one thread; gives positions."""
        # its labels are unsigned
        return self._index.knn_query(queries, k=top, num_threads=1)[0].astype(np.int64)


class Usearch:
    """The graph of usearch."""

    def build(self, rows: np.ndarray) -> None:
        """Build it by one thread."""
        self._index = UsearchIndex(
            ndim=rows.shape[1], metric="ip", dtype="f32", connectivity=LINKS, expansion_add=EF_CONSTRUCTION
        )
        self._index.add(np.arange(len(rows)), rows, threads=1)

    def save(self, path: str) -> None:
        """Write it to a file."""
        self._index.save(path)

    def load(self, path: str, dimension: int) -> None:
        """Read it from a file."""
        self._index = UsearchIndex.restore(path)

    def set_ef(self, ef: int) -> None:
        """Set the candidates of a search."""
        self._index.expansion_search = ef

    def search(self, queries: np.ndarray, top: int) -> np.ndarray:
        """Search by one thread; gives positions."""
        found: Any = self._index.search(queries, top, threads=1)
        return np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1)


class Faiss:
    """The graph of bare FAISS."""

    def build(self, rows: np.ndarray) -> None:
        """Build it by one thread."""
        faiss.omp_set_num_threads(1)
        self._index: Any = faiss.IndexHNSWFlat(rows.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = EF_CONSTRUCTION
        self._index.add(rows)

    def save(self, path: str) -> None:
        """Write it to a file."""
        faiss.write_index(self._index, path)

    def load(self, path: str, dimension: int) -> None:
        """Read it from a file."""
        faiss.omp_set_num_threads(1)
        self._index = faiss.read_index(path)

    def set_ef(self, ef: int) -> None:
        """Set the candidates of a search."""
        self._index.hnsw.efSearch = ef

    def search(self, queries: np.ndarray, top: int) -> np.ndarray:
        """Search by one thread; gives positions."""
        return self._index.search(queries, top)[1]


if __name__ == "__main__":
    serve(answer)
