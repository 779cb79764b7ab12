"""FAISS, loaded on first use, and its GPU; an index searched: more or less effort, some positions, exact reranking."""

import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.errors import VlmError
from vlm.tensor_types import Array, Float, Float32, Int64, UInt8

if TYPE_CHECKING:
    import faiss


def load_faiss() -> ModuleType:
    """The faiss module.

    Raises:
        VlmError: it is not installed.
    """
    # on first use, so that what needs no index works without FAISS
    try:
        import faiss
    except ImportError as error:
        raise VlmError(f"FAISS cannot be imported ({error}); install it with: pip install faiss-cpu") from error
    return faiss


CopyToGpu = Callable[["faiss.Index"], "faiss.Index"]
"""Makes the copy of an index that lives on a GPU."""


def gpu_unavailable_reason() -> str:
    """Why FAISS has no GPU here; empty if it has one."""
    faiss = load_faiss()
    if not hasattr(faiss, "StandardGpuResources"):
        return (
            "this FAISS is built for CPUs alone; in an environment without faiss-cpu, pip install faiss-gpu brings CUDA"
        )
    return "" if faiss.get_num_gpus() else "this FAISS is built for GPUs, but sees none"


def find_gpu() -> CopyToGpu | None:
    """A function that copies an index to the first GPU that FAISS sees; None if it sees none."""
    if gpu_unavailable_reason():
        return None
    return lambda index: load_faiss().index_cpu_to_gpu(_resources(), 0, index)


@cache
def _resources() -> Any:
    """Working memory on the GPU, more than a gigabyte: allocated with the first copy, once per process."""
    return load_faiss().StandardGpuResources()


def unwrap_transforms(index: "faiss.Index") -> Any:
    """The index behind the transforms and the order of its rows, if it has any, as FAISS's own class.

    It lives as long as `index`.
    """
    faiss = load_faiss()
    # FAISS hands out base classes, whose parameters Python cannot see
    inner = faiss.downcast_index(index)
    is_wrapper = isinstance(inner, faiss.IndexPreTransform | faiss.IndexIDMap)
    return unwrap_transforms(inner.index) if is_wrapper else inner


def map_index(path: str, *, has_array_lists: bool = False) -> "faiss.Index":
    """The FAISS index of a file, whose rows are memory-mapped where this build of FAISS can.

    has_array_lists: it has lists, each an array of rows or codes. FAISS 1.15 maps any index after it has set as much
        memory to zero, 36 ms for 2 GB; what it has for lists on disk takes 6.

    Raises:
        RuntimeError: FAISS cannot read it.
    """
    faiss = load_faiss()
    if not has_array_lists or sys.platform == "win32":
        return faiss.read_index(path, getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
    index = faiss.read_index(path, faiss.IO_FLAG_MMAP)
    lists = faiss.downcast_InvertedLists(unwrap_transforms(index).invlists)
    # or each search would start 32 threads that read its lists before it does
    lists.prefetch_nthread = 0
    return index


def to_float32(rows: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The same numbers; exact, for float32 holds every float16.

    Done by torch where it is loaded, since it uses the processor's conversion instruction: numpy takes ten times as
    long. Loading it for this would never pay.
    """
    if "torch" not in sys.modules or rows.dtype != np.float16:
        return np.asarray(rows, np.float32)
    # and not taken from there: another thread may be in the middle of loading it, which this waits for
    import torch

    # torch warns about memory that it may not write to
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy()).float().numpy()


_SIGN_EXPONENT_FRACTION = np.int32(-0x70002000)  # where float32 has the bits that float16 has
_EXPONENT_BIAS = np.float32(2.0**112)  # by which their exponents differ
# fewer numbers are converted as soon by numpy's one call
_MIN_CONVERTED = 4096


def stored_to_float32(rows: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """As `to_float32`, for finite numbers, which stored rows are: without torch in a fifth of the time.

    numpy converts number by number. Here the bits of all are moved to where float32 has them, the sign by the copies of
    it that int32 has, and a product, which is exact, mends the exponents.
    """
    if "torch" in sys.modules or rows.dtype != np.float16 or rows.size < _MIN_CONVERTED:
        return to_float32(rows)
    bits = rows.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= _SIGN_EXPONENT_FRACTION
    values = bits.view(np.float32)
    values *= _EXPONENT_BIAS
    return values


ScoredPositions = tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]
"""Scores, best first, and positions; -1 where nothing was found."""

_NO_POSITION = -1


SearchFunction = Callable[..., ScoredPositions]
"""Of float32 queries of shape (Q, D), a number of results, and `search_parameters` (default: those of the index)."""


def make_search_function(index: "faiss.Index") -> SearchFunction:
    """A function like `index.search(queries, top)`, with exact cosines from a graph of float16 rows as well.

    It is 2 to 3 µs faster, because it skips FAISS's Python wrapper: after a graph search Python runs with a cold cache,
    and each of its steps takes two or three times as long.
    """
    faiss = load_faiss()
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexIDMap):
        return _make_ordered_search(outer)
    return _make_plain_search(index)


def _make_plain_search(index: Any) -> SearchFunction:
    search_c = index.search_c
    pointer = load_faiss().swig_ptr
    dimension = index.d

    def search(queries: Float32[Array, "Q D"], top: int, parameters: Any = None) -> ScoredPositions:
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.shape[1] != dimension:
            raise ValueError(f"queries of {queries.shape[1]} dimensions, the index has {dimension}")
        scores = np.empty((len(queries), top), np.float32)
        positions = np.empty((len(queries), top), np.int64)
        search_c(len(queries), pointer(queries), top, pointer(scores), pointer(positions), parameters)
        return scores, positions

    return search


def _make_ordered_search(outer: Any) -> SearchFunction:
    """Searches the graph inside, whose rows are the float16 ones in another order; their cosines are exact.

    FAISS's own inner products are those of rows whose length float16 has rounded. The rows that it found are still in
    the processor's cache, so that comparing them again takes less than anything read from elsewhere.
    """
    graph = unwrap_transforms(outer)
    search_graph = _make_plain_search(graph)
    # views, which live as long as `outer`; of bytes, since both may be at odd addresses, as a file is mapped, and numpy
    # copies an array of numbers at an odd address, all of it, before it takes one
    row_bytes = graph_rows(graph).view(np.uint8)
    order = load_faiss().rev_swig_ptr(outer.id_map.data(), outer.ntotal) if outer.ntotal else np.zeros(0, np.int64)
    order_bytes = order.view(np.uint8).reshape(-1, order.itemsize)

    def search(queries: Float32[Array, "Q D"], top: int, parameters: Any = None) -> ScoredPositions:
        _, places = search_graph(queries, top, parameters)
        scores, places = rerank(row_bytes, queries, places, top)
        positions = order_bytes.take(places, axis=0, mode="wrap").view(np.int64)[..., 0]
        if _NO_POSITION in places[:, -1].tolist():
            positions[places < 0] = _NO_POSITION
        return scores, positions

    # FAISS holds addresses alone
    search.__dict__["keeps_alive"] = outer
    return search


def graph_rows(graph: Any) -> Float[Array, "N D"]:
    """The float16 rows of a graph, where they are; they live as long as it does."""
    faiss = load_faiss()
    codes = faiss.downcast_index(graph.storage).codes
    values = graph.ntotal * graph.d
    if not values:
        return np.zeros((0, graph.d), np.float16)
    return faiss.rev_swig_ptr(codes.data(), 2 * values).view(np.float16).reshape(graph.ntotal, graph.d)


def use_one_search_thread() -> None:
    """Let FAISS search on the calling thread alone; each thread has this setting for itself.

    On a machine that does other work, the threads of one search wait for one another: seen on two busy cores, an exact
    search of 17,000 rows took 25 ms by two threads and 1 ms by one.
    """
    load_faiss().omp_set_num_threads(1)


def search_parameters(index: "faiss.Index", *, selector: Any = None, effort: int | None = None) -> Any:
    """FAISS's parameters of one search by `make_search_function`, of the class that this index needs.

    selector: an IDSelector of the positions that may be returned; None: all.
    effort: nprobe of an index with lists, efSearch of a graph; None: what the index was stored with. A flat index has
        none.
    """
    faiss = load_faiss()
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        within = search_parameters(inner.index, selector=selector, effort=effort)
        return faiss.SearchParametersPreTransform(index_params=within)
    if isinstance(inner, faiss.IndexIDMap):
        if selector is None:
            return search_parameters(inner.index, effort=effort)
        by_place = faiss.IDSelectorTranslated(inner.id_map, selector)
        # FAISS holds only the addresses of the order and the selector
        by_place.keeps_alive = (inner, selector)
        return search_parameters(inner.index, selector=by_place, effort=effort)
    selection = {} if selector is None else {"sel": selector}
    if isinstance(inner, faiss.IndexHNSW):
        ef_search = inner.hnsw.efSearch if effort is None else effort
        return faiss.SearchParametersHNSW(efSearch=ef_search, check_relative_distance=False, **selection)
    # before IndexIVF, of which it is a subclass with parameters of its own
    if isinstance(inner, faiss.IndexIVFRaBitQ):
        parameters = faiss.IVFRaBitQSearchParameters()
        parameters.nprobe = inner.nprobe if effort is None else effort
        parameters.qb = inner.qb
        parameters.centered = False
        if selector is not None:
            parameters.sel = selector
            # FAISS holds only the address of the selector
            parameters.keeps_alive = selector
        return parameters
    if isinstance(inner, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=inner.nprobe if effort is None else effort, **selection)
    return faiss.SearchParameters(**selection)


def effort_limit(index: "faiss.Index") -> int | None:
    """The highest effort: nlist of an index with lists, the rows of a graph; None for a type without effort."""
    faiss = load_faiss()
    inner = unwrap_transforms(index)
    if isinstance(inner, faiss.IndexHNSW):
        return inner.ntotal
    return inner.nlist if isinstance(inner, faiss.IndexIVF) else None


def set_search_effort(index: "faiss.Index", effort: int) -> None:
    """Search with this effort (nprobe, efSearch) from now on, if the type has any."""
    faiss = load_faiss()
    inner = unwrap_transforms(index)
    if isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = effort
        # it stops a search that has read efSearch nodes, and its candidates are no more than these: counting, for each
        # node, how many are nearer finds out nothing new, and takes a tenth of the time
        inner.hnsw.check_relative_distance = False
    elif isinstance(inner, faiss.IndexIVF):
        inner.nprobe = effort


# the first row by its codes is seldom the first indeed, so one result needs as many candidates as ten
_MIN_RERANKED = 10


def num_candidates(top: int, factor: int) -> int:
    """How many rows to take by their codes for `top` results: `factor` times as many, but never fewer than for ten.

    >>> num_candidates(1, 4), num_candidates(100, 4), num_candidates(100, 0)
    (40, 400, 100)
    """
    return max(top, _MIN_RERANKED) * factor if factor else top


# candidates are compared in blocks of this many numbers: 1 MB, which stays in a processor's cache
_RERANKED_VALUES = 262_144


def rerank(
    rows: Float[Array, "N D"] | UInt8[Array, "N B"],
    queries: Float32[Array, "Q D"],
    positions: Int64[Array, "Q C"],
    top: int,
    *,
    values_at_once: int = _RERANKED_VALUES,
) -> tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]:
    """The `top` of the candidates by exact cosine, best first, ties by position.

    rows: as stored, float16, so not quite of unit length; or their bytes, B = 2 D. positions: -1, and last, for no
    candidate. K is the smaller of `top` and C; a result without a candidate has position -1 and score -inf.
    """
    if len(queries) == 1:
        return _rerank_one(rows, queries[0], positions[0], top)
    values_per_query = positions.shape[1] * queries.shape[1]
    num_queries = max(1, values_at_once // max(1, values_per_query))
    if len(queries) <= num_queries:
        return _rerank(rows, queries, positions, top)
    scores: list[Float32[Array, "B K"]] = []
    best: list[Int64[Array, "B K"]] = []
    for first in range(0, len(queries), num_queries):
        block = slice(first, first + num_queries)
        block_scores, block_best = _rerank(rows, queries[block], positions[block], top)
        scores.append(block_scores)
        best.append(block_best)
    return np.concatenate(scores), np.concatenate(best)


def _take_rows(
    rows: Float[Array, "N D"] | UInt8[Array, "N B"], positions: Int64[Array, "*shape"]
) -> Float32[Array, "*shape D"]:
    # with mode="wrap" some row is read for position -1, whose score is overwritten
    near = rows.take(positions, axis=0, mode="wrap")
    return stored_to_float32(near.view(np.float16) if near.dtype == np.uint8 else near)


def _rerank_one(
    rows: Float[Array, "N D"] | UInt8[Array, "N B"],
    query: Float32[Array, " D"],
    positions: Int64[Array, " C"],
    top: int,
) -> tuple[Float32[Array, "1 K"], Int64[Array, "1 K"]]:
    """As `_rerank` in two thirds of its time, because one query at a time is the rule."""
    near = _take_rows(rows, positions)
    # row by row, as there: a matrix product may round equal rows differently by their position
    cosines = np.vecdot(near, query) / np.sqrt(np.vecdot(near, near))
    if len(positions) and positions.item(-1) < 0:
        cosines[positions < 0] = -np.inf
    best = np.lexsort((positions, -cosines))[:top]
    return cosines[best][None], positions[best][None]


def _rerank(
    rows: Float[Array, "N D"] | UInt8[Array, "N B"],
    queries: Float32[Array, "Q D"],
    positions: Int64[Array, "Q C"],
    top: int,
) -> tuple[Float32[Array, "Q K"], Int64[Array, "Q K"]]:
    near = _take_rows(rows, positions)
    cosines = np.vecdot(near, queries[:, None]) / np.sqrt(np.vecdot(near, near))
    if np.count_nonzero(positions[:, -1] < 0):
        cosines[positions < 0] = -np.inf
    best = np.lexsort((positions, -cosines), axis=1)[:, :top]
    return np.take_along_axis(cosines, best, axis=1), np.take_along_axis(positions, best, axis=1)
