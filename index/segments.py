"""A segment of an index: written once, then open for searches by FAISS and for exact scans of its float16 rows.

The float16 rows of a segment: written in blocks, then memory-mapped for training, re-ranking and exact scans.

How a search is done: by FAISS with a selector, or by an exact scan; never with fewer answers than there are.

Of each segment those positions may answer that are living and that a filter chose. A filter that leaves few rows is
answered by comparing them all; one that leaves many, by a FAISS search that passes the others over and visits more
lists or nodes for it, so that as many rows are compared as without a filter. More than a
hundred answers visit more lists or nodes, so that their recall is about that of a hundred, and a fiftieth of the rows
or more are found by comparing them all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm.console import progress
from vlm.errors import VlmError
from vlm.files import atomic_write
from vlm.index.ann.faiss_search import (
    effort_limit,
    make_search_function,
    num_candidates,
    rerank,
    search_parameters,
    set_search_effort,
    to_float32,
)
from vlm.index.ann.gpu import MAX_GPU_RESULTS, find_gpu, gpu_unsupported_reason, make_add_function
from vlm.index.ann.index_type import CopyToGpu, TuningParams, load_faiss
from vlm.index.ann.index_types import INDEX_TYPES
from vlm.index.embeddings import Embeddings, normalize_rows, open_vectors
from vlm.index.layout import REBUILD_HINT, FailPoint, Segment, no_failpoint, segment_file
from vlm.manifest import FileRecord, record_file
from vlm.tensors import Array, Bool, Float, Float32, Int64, UInt8

if TYPE_CHECKING:
    import faiss


# float16 holds a unit vector's length to about 1e-3; what is further off was never normalised
_LENGTH_TOLERANCE = 0.01
_ROWS_AT_ONCE = 65_536


class Vectors:
    """Rows on disk, of unit length up to their rounding; they come back as float32 of exactly unit length."""

    def __init__(self, path: Path, rows: int, dimension: int) -> None:
        self.path = path
        self.stored = open_array(path, np.dtype(np.float16), (rows, dimension))

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def dimension(self) -> int:
        """D."""
        return self.stored.shape[1]

    def blocks(self, rows_at_once: int = _ROWS_AT_ONCE) -> Iterator[Float32[Array, "N D"]]:
        """All rows in order."""
        for first in range(0, len(self), rows_at_once):
            yield normalize_rows(to_float32(self.stored[first : first + rows_at_once]))

    def take(self, positions: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The rows at the given positions."""
        if len(positions) and positions[-1] - positions[0] == len(positions) - 1 and (np.diff(positions) == 1).all():
            return normalize_rows(to_float32(self.stored[positions[0] : positions[-1] + 1]))
        return normalize_rows(to_float32(self.stored[positions]))

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """`count` distinct rows (all of them if there are fewer), drawn evenly, in row order."""
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))


def write_vectors(
    path: Path, blocks: Iterable[Float[Array, "_ D"]], shape: tuple[int, int], *, failpoint: FailPoint = no_failpoint
) -> None:
    """Write blocks of unit vectors as one float16 matrix of a shape (N, D), atomically.

    Raises:
        VlmError: a row is not finite or not of unit length, or there are not N of them; nothing is written.
    """
    rows = 0
    with atomic_write(path) as file:
        meta = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, meta)
        for block in blocks:
            _check_lengths(block, rows)
            file.write(np.ascontiguousarray(block, np.float16).tobytes())
            rows += len(block)
        if rows != shape[0]:
            raise VlmError(f"{rows:,} vectors came for {shape[0]:,} rows; the embeddings are damaged: embed again.")
        failpoint(f"{path.name} before its rename")


def iter_stored_blocks(source: Embeddings) -> Iterator[Float[Array, "_ D"]]:
    """The rows of an embeddings folder as they are stored."""
    for part in source.parts:
        vectors = open_vectors(source.folder, part)
        for first in range(0, part.rows, _ROWS_AT_ONCE):
            yield vectors[first : first + _ROWS_AT_ONCE]


def open_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a .npy file, memory-mapped.

    Raises:
        VlmError: it cannot be read, or is not of this type and shape.
    """
    try:
        # a mapping of no bytes is refused by the system
        found = np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise VlmError(f"{path} is damaged ({error}); {REBUILD_HINT}.") from error
    if found.dtype != dtype or found.shape != shape:
        raise VlmError(
            f"{path} is damaged: it holds {found.dtype} of shape {found.shape}, {dtype} of {shape} were written; "
            f"{REBUILD_HINT}."
        )
    # numpy asks and answers a memmap in Python, at microseconds each time
    return np.asarray(found)


def _check_lengths(block: Float[Array, "N D"], first: int) -> None:
    lengths = np.linalg.norm(to_float32(block), axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _LENGTH_TOLERANCE))
    if len(wrong):
        number = int(wrong[0])
        raise VlmError(
            f"Row {first + number:,} of the embeddings has length {lengths[number]:.4g} ({len(wrong):,} such rows in "
            "its block); 1 was expected: the embeddings are damaged or were never normalised. Embed again."
        )


# a bar is shown for work of some seconds only
_ROWS_WORTH_A_BAR = 50_000
# what is written in large pieces the system keeps, and maps, in pages of 2 MB: graphs are walked a tenth faster
_BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True, kw_only=True)
class WrittenSegment:
    """A segment that lies on disk, and the checksums of its files."""

    segment: Segment
    files: dict[str, FileRecord]


def write_segment(
    folder: Path,
    number: int,
    blocks: Iterable[Float[Array, "_ D"]],
    rows: Int64[Array, " N"],
    *,
    dimension: int,
    kind: str,
    tuning: TuningParams,
    failpoint: FailPoint = no_failpoint,
) -> WrittenSegment:
    """Write the three files of a segment, each atomically: the rows first, then the FAISS index trained on them.

    Args:
        blocks: unit vectors, as many as `rows`.
        rows: the catalogue's row of each, ascending.

    Raises:
        UsageError: the kind does not fit the rows.
        VlmError: a vector is not of unit length, or there are more or fewer than `rows`.
    """
    vectors_path, rows_path = folder / segment_file(number, "npy"), folder / segment_file(number, "rows.npy")
    vectors_path.parent.mkdir(exist_ok=True)
    failpoint(f"{vectors_path.name}")
    count = len(rows)
    write_vectors(vectors_path, blocks, (count, dimension), failpoint=failpoint)
    failpoint(f"{rows_path.name}")
    with atomic_write(rows_path) as file:
        np.save(file, rows, allow_pickle=False)
    vectors = Vectors(vectors_path, count, dimension)
    gpu = find_gpu()
    prepared = INDEX_TYPES[kind](vectors, tuning, gpu)
    _fill(vectors, make_add_function(prepared.index, gpu))
    segment = Segment(number=number, kind=kind, parameters=prepared.parameters, rows=count, rerank=prepared.rerank)
    failpoint(f"{segment.index_file}")
    faiss = load_faiss()
    with atomic_write(folder / segment.index_file) as file:
        faiss.write_index(prepared.index, faiss.PyCallbackIOWriter(file.write, _BYTES_AT_ONCE))
        failpoint(f"{segment.index_file} before its rename")
    return WrittenSegment(segment=segment, files={name: record_file(folder / name) for name in segment.files})


def _fill(vectors: Vectors, add: Callable[[Float32[Array, "N D"]], None]) -> None:
    if len(vectors) < _ROWS_WORTH_A_BAR:
        for block in vectors.blocks():
            add(block)
        return
    with progress(total=len(vectors), what="index", unit=" rows") as shown:
        for block in vectors.blocks():
            add(block)
            shown.update(len(block))


class SegmentReader:
    """A segment open for reading; its files may be unlinked meanwhile.

    ask: searches the FAISS index, here and among all rows. is_approximate: it visits some of the rows only.
    on_gpu: a copy of the FAISS index there, which answers where all rows may; None: there is none.
    """

    on_gpu: "faiss.Index | None" = None

    def __init__(self, folder: Path, meta: Segment, dimension: int) -> None:
        self.meta = meta
        self.rows: Int64[Array, " N"] = open_array(folder / meta.rows_file, np.dtype(np.int64), (meta.rows,))
        self.vectors = Vectors(folder / meta.vectors_file, meta.rows, dimension)
        self.index = _read_index(folder / meta.index_file, meta, dimension)
        self.faiss_search = make_search_function(self.index)
        self.is_approximate = INDEX_TYPES[meta.kind].effort is not None
        # that of a new index: rows rise, so the last tells that none is left out
        self._is_first = not meta.rows or self.rows.item(-1) == meta.rows - 1

    def __len__(self) -> int:
        return self.meta.rows

    def copy_to_gpu(self, copy: CopyToGpu) -> str:
        """Have a GPU answer where all rows may; if it cannot, why."""
        reason = gpu_unsupported_reason(self.index)
        if not reason and self.on_gpu is None:
            try:
                self.on_gpu = copy(self.index)
            except RuntimeError as error:  # of CUDA, mostly for want of memory
                reason = f"it cannot be copied there: {str(error).splitlines()[0]}"
        return reason

    def rows_at(self, positions: Int64[Array, "Q K"]) -> Int64[Array, "Q K"]:
        """The catalogue's rows of what is at these positions; of -1 any number."""
        return positions if self._is_first else self.rows.take(positions, mode="wrap")

    def positions_of(self, rows: Int64[Array, " M"]) -> Int64[Array, " K"]:
        """The positions of those of the sorted rows that are here, ascending."""
        if not len(self) or not len(rows):
            return np.zeros(0, np.int64)
        first, last = np.searchsorted(rows, [self.rows[0], self.rows[-1] + 1])
        wanted = rows[first:last]
        found = np.minimum(np.searchsorted(self.rows, wanted), len(self) - 1)
        return found[self.rows[found] == wanted].astype(np.int64)

    def effort(self, share: float) -> int | None:
        """Lists (IVF) or nodes (HNSW) that a search visits if only `share` of the rows may answer.

        They grow as the share shrinks, so that about as many rows are compared as without a filter. None: the kind has
        nothing to choose.
        """
        name, most = INDEX_TYPES[self.meta.kind].effort, effort_limit(self.index)
        if name is None or most is None:
            return None
        return min(most, ceil(self.meta.parameters[name] / share))


def _read_index(path: Path, meta: Segment, dimension: int) -> "faiss.Index":
    """Memory-mapped where this build of FAISS can."""
    faiss = load_faiss()
    if not path.is_file():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    try:
        index = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
    except RuntimeError as error:
        raise VlmError(f"{path} is damaged ({error}); {REBUILD_HINT}.") from error
    if index.ntotal != meta.rows or index.d != dimension:
        raise VlmError(
            f"{path} holds {index.ntotal:,} rows of {index.d} dimensions, {meta.rows:,} of {dimension} were "
            f"written; {REBUILD_HINT}."
        )
    if name := INDEX_TYPES[meta.kind].effort:
        set_search_effort(index, meta.parameters[name])
    return index


EXACT_ROWS = 10_000
EXACT_FRACTION = 0.02
DEEP = 100
_SCAN_ROWS_AT_ONCE = 16_384
_QUERIES_AT_ONCE = 1024
_NO_ROW = -1

ScoredRows = tuple[Float32[Array, "Q _"], Int64[Array, "Q _"]]
"""Cosines, best first, and rows; where there are fewer, the score is -inf and the row -1."""


@dataclass(frozen=True, eq=False)
class SegmentView:
    """A segment and the positions of it that may answer; `mask` None: all of them."""

    segment: SegmentReader
    mask: Bool[Array, " N"] | None = None

    @cached_property
    def count(self) -> int:
        """How many may answer."""
        return len(self.segment) if self.mask is None else int(np.count_nonzero(self.mask))

    @cached_property
    def positions(self) -> Int64[Array, " M"]:
        """Those that may answer, ascending."""
        return np.arange(len(self.segment)) if self.mask is None else np.flatnonzero(self.mask)

    @cached_property
    def bitmap(self) -> UInt8[Array, " _"]:
        """The mask, a bit a position, as FAISS reads it."""
        assert self.mask is not None
        return np.packbits(self.mask, bitorder="little")

    def rows(self) -> Int64[Array, " M"]:
        """The catalogue's rows of those that may answer, ascending."""
        return self.segment.rows[self.positions] if self.mask is not None else np.asarray(self.segment.rows)

    def excluding(self, rows: Int64[Array, " M"]) -> "SegmentView":
        """Less the given rows, which are sorted."""
        dead = self.segment.positions_of(rows)
        if not len(dead):
            return self
        mask = np.ones(len(self.segment), bool) if self.mask is None else self.mask.copy()
        mask[dead] = False
        return replace(self, mask=mask)

    def restricted_to(self, rows: Int64[Array, " M"]) -> "SegmentView":
        """Of these only the given rows, which are sorted."""
        chosen, mask = self.segment.positions_of(rows), np.zeros(len(self.segment), bool)
        mask[chosen] = True if self.mask is None else self.mask[chosen]
        return replace(self, mask=mask)

    def search(self, queries: Float32[Array, "Q D"], top: int) -> ScoredRows:
        """The nearest by FAISS, re-ranked where its scores are not exact; by a scan where it finds too few, or where
        so many are asked for that nothing would be saved."""
        segment, top = self.segment, min(top, self.count)
        if self.uses_exact_scan(top):
            return self.scan(queries, top)
        more, deeper = segment.meta.rerank, sqrt(top / DEEP) if top > DEEP else 1.0
        candidates = min(num_candidates(top, more), self.count) if more else top
        scores, positions = self._search_faiss(queries, candidates, deeper)
        if more:
            scores, positions = rerank(segment.vectors.stored, queries, positions, top)
        rows = segment.rows_at(positions)
        if _NO_ROW in (last := positions[:, -1]).tolist():  # nobody stands last
            is_short = last == _NO_ROW
            scores[is_short], rows[is_short] = self.scan(queries[is_short], top)
        # re-ranked ones are in order
        return _sort_by_score(scores, rows, top) if not more and _has_ties(scores) else (scores, rows)

    def uses_exact_scan(self, top: int) -> bool:
        """Whether so many are found by comparing all, whatever the segment's effort."""
        return top > DEEP and self.segment.is_approximate and top > EXACT_FRACTION * self.count

    def scan(self, queries: Float32[Array, "Q D"], top: int) -> ScoredRows:
        """The nearest by comparing all that may answer, with the stored rows."""
        found = [_empty_result(queries)]
        for first in range(0, self.count, _SCAN_ROWS_AT_ONCE):
            positions = self.positions[first : first + _SCAN_ROWS_AT_ONCE]
            scores = queries @ self.segment.vectors.take(positions).T
            rows = np.broadcast_to(self.segment.rows[positions], scores.shape)
            found = [merge([*found, _best(scores, rows, top)], top)]
        return found[0]

    def _search_faiss(self, queries: Float32[Array, "Q D"], top: int, deeper: float) -> ScoredRows:
        """deeper: by this factor more lists or nodes than the segment's own effort; a GPU keeps to its own."""
        if self.mask is None:
            on_gpu = self.segment.on_gpu if top <= MAX_GPU_RESULTS else None
            if on_gpu is not None:
                return on_gpu.search(queries, top)
            if deeper == 1 or not self.segment.is_approximate:
                return self.segment.faiss_search(queries, top)
        selector = None if self.mask is None else load_faiss().IDSelectorBitmap(self.bitmap)
        effort = self.segment.effort(self.count / len(self.segment) / deeper)
        parameters = search_parameters(self.segment.index, selector=selector, effort=effort)
        return self.segment.index.search(queries, top, params=parameters)


def nearest(
    views: Sequence[SegmentView],
    queries: Float32[Array, "Q D"],
    top: int,
    allowed_rows: Int64[Array, " N"] | None = None,
) -> ScoredRows:
    """The `top` nearest of all that are selected, or of the rows `among` them (sorted).

    There are fewer columns only if there are fewer rows.
    """
    if len(queries) > _QUERIES_AT_ONCE:
        starts = range(0, len(queries), _QUERIES_AT_ONCE)
        answers = [nearest(views, queries[first : first + _QUERIES_AT_ONCE], top, allowed_rows) for first in starts]
        return np.concatenate([scores for scores, _ in answers]), np.concatenate([rows for _, rows in answers])
    if allowed_rows is None:
        if len(views) == 1 and views[0].count:
            return views[0].search(queries, top)
        return merge([one.search(queries, top) for one in views if one.count] or [_empty_result(queries)], top)
    chosen = [one.restricted_to(allowed_rows) for one in views]
    total = sum(one.count for one in chosen)
    is_small = total <= max(EXACT_ROWS, EXACT_FRACTION * sum(one.count for one in views))
    found = [one.scan(queries, top) if is_small else one.search(queries, top) for one in chosen if one.count]
    return merge(found or [_empty_result(queries)], top)


def merge(answers: Sequence[ScoredRows], top: int) -> ScoredRows:
    """The best `top` of several lists of answers to the same queries, each in order; ties by row."""
    if len(answers) == 1:
        return answers[0]
    scores = np.concatenate([scores for scores, _ in answers], axis=1)
    return _sort_by_score(scores, np.concatenate([rows for _, rows in answers], axis=1), top)


def _has_ties(scores: Float32[Array, "Q K"]) -> bool:
    """Whether a line, falling, has equal scores; of one line, which is the rule, Python is quicker than numpy."""
    if len(scores) == 1:
        line = scores[0].tolist()
        return len(set(line)) < len(line)
    return bool((scores[:, 1:] == scores[:, :-1]).any())


def _sort_by_score(scores: Float32[Array, "Q K"], rows: Int64[Array, "Q K"], top: int) -> ScoredRows:
    order, line = np.lexsort((rows, -scores), axis=1)[:, :top], np.arange(len(scores))[:, None]
    return scores[line, order], rows[line, order]


def _empty_result(queries: Float32[Array, "Q D"]) -> ScoredRows:
    return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)


def _best(scores: Float32[Array, "Q N"], rows: Int64[Array, "Q N"], top: int) -> ScoredRows:
    """The `top` highest of each line, in no order."""
    if scores.shape[1] <= top:
        return scores, rows
    chosen = np.argpartition(-scores, top - 1, axis=1)[:, :top]
    return np.take_along_axis(scores, chosen, axis=1), np.take_along_axis(rows, chosen, axis=1)
