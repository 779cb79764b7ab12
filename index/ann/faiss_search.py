"""Stored float16 rows back as float32.

Searching any kind of FAISS index: with more or less effort, among chosen positions, exact cosines at the end.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlm.index.ann.index_type import load_faiss, unwrap_transforms
from vlm.tensors import Array, Float, Float32, Int64

if TYPE_CHECKING:
    import faiss


def to_float32(rows: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The same numbers; exact, for float32 holds every float16.

    By torch, which uses the processor's own conversion: numpy's takes twenty times as long.
    """
    if rows.dtype != np.float16:
        return np.asarray(rows, np.float32)
    # torch warns of what it may not write to
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy()).float().numpy()


_MIN_RERANKED = 10
# so many numbers of candidates are compared at once: 1 MB, which stays in a processor's cache
_VALUES_AT_ONCE = 262_144


ScoredPositions = tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]
"""Scores, best first, and positions; -1 where nothing was found."""


def make_search_function(index: "faiss.Index") -> Callable[[Float32[Array, "Q D"], int], ScoredPositions]:
    """What `index.search(queries, top)` gives, 2 to 3 µs sooner: FAISS's C++ search without its wrapper in Python.

    After a walk through a graph Python runs with a cold cache, and each of its steps takes two or three times as long.
    """
    wrapped: Any = index
    search, pointer, dimension = wrapped.search_c, load_faiss().swig_ptr, index.d

    def ask(queries: Float32[Array, "Q D"], top: int) -> ScoredPositions:
        queries, count = np.ascontiguousarray(queries, np.float32), len(queries)
        if queries.shape[1] != dimension:
            raise ValueError(f"queries of {queries.shape[1]} dimensions, the index has {dimension}")
        scores, positions = np.empty((count, top), np.float32), np.empty((count, top), np.int64)
        search(count, pointer(queries), top, pointer(scores), pointer(positions))
        return scores, positions

    return ask


def search_parameters(index: "faiss.Index", *, selector: Any = None, effort: int | None = None) -> Any:
    """FAISS's parameters of one search, of the class that this index wants.

    selector: an IDSelector of the positions that may be found; None: all.
    effort: nprobe of an index with lists, efSearch of a graph; None: what the index was stored with. A flat index
        takes none.
    """
    faiss = load_faiss()
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        within = search_parameters(inner.index, selector=selector, effort=effort)
        return faiss.SearchParametersPreTransform(index_params=within)
    chosen = {} if selector is None else {"sel": selector}
    if isinstance(inner, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=inner.hnsw.efSearch if effort is None else effort, **chosen)
    if isinstance(inner, faiss.IndexIVFRaBitQ):
        parameters = faiss.IVFRaBitQSearchParameters()
        parameters.nprobe = inner.nprobe if effort is None else effort
        parameters.qb, parameters.centered = inner.qb, False
        if selector is not None:
            parameters.sel, parameters.keeps_alive = selector, selector
        return parameters
    if isinstance(inner, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=inner.nprobe if effort is None else effort, **chosen)
    return faiss.SearchParameters(**chosen)


def effort_limit(index: "faiss.Index") -> int | None:
    """nlist of an index with lists, as many as its rows of a graph; None where there is nothing to trade."""
    faiss, inner = load_faiss(), unwrap_transforms(index)
    if isinstance(inner, faiss.IndexHNSW):
        return inner.ntotal
    return inner.nlist if isinstance(inner, faiss.IndexIVF) else None


def set_search_effort(index: "faiss.Index", effort: int) -> None:
    """Search with this effort (nprobe, efSearch) from now on, if the kind has any."""
    faiss, inner = load_faiss(), unwrap_transforms(index)
    if isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = effort
    elif isinstance(inner, faiss.IndexIVF):
        inner.nprobe = effort


def num_candidates(top: int, factor: int) -> int:
    """How many rows to take by their codes for `top` answers: `factor` times as many, but never fewer than for ten.

    The first by its codes is seldom the first indeed, so one answer needs as many candidates as ten.

    >>> num_candidates(1, 4), num_candidates(100, 4), num_candidates(100, 0)
    (40, 400, 100)
    """
    return max(top, _MIN_RERANKED) * factor if factor else top


def rerank(
    rows: Float[Array, "N D"], queries: Float32[Array, "Q D"], positions: Int64[Array, "Q C"], top: int
) -> tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]:
    """The `top` of the candidates by exact cosine, best first, ties by position.

    rows: as stored, float16, not quite of unit length. positions: -1, last, where there is no candidate. K is `top` or
    C, whichever is less, and what could not be filled has position -1 and score -inf.
    """
    if len(queries) == 1:
        return _rerank_one(rows, queries[0], positions[0], top)
    at_once = max(1, _VALUES_AT_ONCE // max(1, positions.shape[1] * rows.shape[1]))
    if len(queries) <= at_once:
        return _rerank(rows, queries, positions, top)
    blocks = [
        _rerank(rows, queries[first : first + at_once], positions[first : first + at_once], top)
        for first in range(0, len(queries), at_once)
    ]
    return np.concatenate([scores for scores, _ in blocks]), np.concatenate([found for _, found in blocks])


def _rerank_one(
    rows: Float[Array, "N D"], query: Float32[Array, " D"], positions: Int64[Array, " C"], top: int
) -> tuple[Float32[Array, "1 K"], Int64[Array, "1 K"]]:
    """As `_rerank`, in two thirds of its time: one question at a time is what people ask."""
    near = to_float32(rows.take(positions, axis=0, mode="wrap"))
    # each row alone, as there: a product of the matrix may round equal rows otherwise by their place
    cosines = np.vecdot(near, query) / np.sqrt(np.vecdot(near, near))
    if len(positions) and positions.item(-1) < 0:
        cosines[positions < 0] = -np.inf
    best = np.lexsort((positions, -cosines))[:top]
    return cosines[best][None], positions[best][None]


def _rerank(
    rows: Float[Array, "N D"], queries: Float32[Array, "Q D"], positions: Int64[Array, "Q C"], top: int
) -> tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]:
    near = to_float32(rows.take(positions, axis=0, mode="wrap"))
    cosines = np.vecdot(near, queries[:, None]) / np.sqrt(np.vecdot(near, near))
    if np.count_nonzero(positions[:, -1] < 0):
        cosines[positions < 0] = -np.inf
    best = np.lexsort((positions, -cosines), axis=1)[:, :top]
    line = np.arange(len(best))[:, None]
    return cosines[line, best], positions[line, best]
