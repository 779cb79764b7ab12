"""HNSW: a graph of near rows over the float32 rows, walked from its top (Malkov and Yashunin 2018)."""

from collections.abc import Mapping
from math import log2
from typing import TYPE_CHECKING

from vlm.index.kinds.kind import Copy, Kind, Rows, Tuning, check_range, load_faiss

if TYPE_CHECKING:
    import faiss

# the FAISS wiki's range is 4 to 64 links; 32 is its and autofaiss's usual choice
_LINKS, _MAX_LINKS = 32, 256
# FAISS's own default; more lengthens the build in proportion
_EF_CONSTRUCTION = 40
# texts lie off the pictures' manifold and need about four times a picture's 16
_EF_SEARCH = 64
MAX_EF = 4096


def _parameters(rows: int, tuning: Tuning) -> dict[str, int]:
    """By default 32 links a node, ef_construction 40, ef_search 64."""
    links = _LINKS if tuning.links is None else tuning.links
    ef_construction = _EF_CONSTRUCTION if tuning.ef_construction is None else tuning.ef_construction
    ef_search = _EF_SEARCH if tuning.ef_search is None else tuning.ef_search
    check_range("links", links, _MAX_LINKS, "above it a node's list outgrows its row", least=2)
    check_range("ef_construction", ef_construction, MAX_EF, "above it flat is quicker")
    check_range("ef_search", ef_search, MAX_EF, "above it flat is quicker")
    return {"links": links, "ef_construction": ef_construction, "ef_search": ef_search}


def _prepare(rows: Rows, parameters: dict[str, int], gpu: Copy | None) -> "faiss.Index":
    """HNSW over float32 rows by inner product: at unit length the nearest by it are the nearest by Euclid too.

    A graph built with several threads is not the same twice.
    """
    faiss = load_faiss()
    index = faiss.IndexHNSWFlat(rows.dimension, parameters["links"], faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = parameters["ef_construction"], parameters["ef_search"]
    return index


def _resident_bytes(rows: int, dimension: int, parameters: Mapping[str, int]) -> int:
    """Row, 2 M links of 4 bytes on the ground, M for each of the 1 / (M - 1) levels above it, level and offset."""
    links = parameters["links"]
    above = 4 * links / (links - 1)
    return round(rows * (4 * dimension + 8 * links + above + 12))


def _work(rows: int, parameters: Mapping[str, int]) -> float:
    return parameters["ef_search"] * log2(max(rows, 2))


HNSW = Kind(
    name="hnsw",
    parameters=_parameters,
    prepare=_prepare,
    resident_bytes=_resident_bytes,
    work=_work,
    wishes=("links", "ef_construction", "ef_search"),
    effort="ef_search",
)
