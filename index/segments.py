"""Segments: the immutable pieces of an index, how they are written and how they are searched.

A segment is three files: the rows as float16, the FAISS index trained on them, and the catalogue's row number of each
position; a fourth names the rows that are equal in every bit, if there are any. `write_segment` writes them,
`SegmentReader` maps them, a `SegmentView` is a segment with the positions that a search may return (live and allowed by
the filter), and `nearest` searches all views of an index.

The search plan, which never returns fewer results than there are:

- FAISS searches a view without a filter by its own search parameters (nprobe, efSearch).
- A filter that leaves few rows is answered by comparing all of them. One that leaves many is a FAISS search that skips
  the other rows and reads more lists or nodes in turn, so that about as many rows are compared as without a filter.
- More than a hundred results read more lists or nodes too, which keeps their recall near that of a hundred. If they
  are more than a fiftieth of the rows, all rows are compared, because an approximate search would save nothing.
- A query for which FAISS finds too few rows is answered by comparing all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from pyroaring import BitMap

from vlm.console import progress
from vlm.errors import VlmError
from vlm.files import atomic_write
from vlm.index.ann.faiss_search import (
    CopyToGpu,
    effort_limit,
    find_gpu,
    load_faiss,
    make_search_function,
    map_index,
    num_candidates,
    rerank,
    search_parameters,
    set_search_effort,
    stored_to_float32,
    to_float32,
)
from vlm.index.ann.gpu import MAX_GPU_RESULTS, gpu_unsupported_reason
from vlm.index.ann.graph_links import link_answers
from vlm.index.ann.index_types import INDEX_TYPES, IndexType, TuningParams, fill_index
from vlm.index.duplicate_rows import DuplicateRows, find_duplicate_rows
from vlm.index.embeddings_folder import Embeddings, find_non_unit_rows, normalize_rows, open_vectors
from vlm.index.engine_base import ScoredRows
from vlm.index.index_files import REBUILD_HINT, FailPoint, Segment, no_failpoint, open_array, segment_file
from vlm.index.row_bitmaps import all_bits, bits_at, pack_bits, row_id_blocks, unpack_bits
from vlm.manifest import FileRecord, record_file
from vlm.tensor_types import Array, Bool, Float, Float16, Float32, Int64, UInt8

if TYPE_CHECKING:
    import faiss


AllowedRows = Int64[Array, " N"] | BitMap
"""Rows as an ascending array, or as a set, which takes an eighth of the memory or less."""

_ROWS_AT_ONCE = 65_536


class Vectors:
    """The float16 rows of a segment, memory-mapped; returned as float32 of exactly unit length, unless `is_rounded`."""

    def __init__(self, path: Path, rows: int, dimension: int) -> None:
        self.path = path
        self.stored = open_array(path, np.dtype(np.float16), (rows, dimension))

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def dimension(self) -> int:
        """D."""
        return self.stored.shape[1]

    def blocks(self, rows_at_once: int = _ROWS_AT_ONCE, *, is_rounded: bool = False) -> Iterator[Float32[Array, "N D"]]:
        """All rows in order, of unit length, or `is_rounded`, of the length that float16 gave them."""
        # not by the map: pages that are mapped count as memory of this process
        with self.path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            for first in range(0, len(self), rows_at_once):
                # not kept by a name of this generator, so that there are never two blocks
                yield _read_rows(file, (min(rows_at_once, len(self) - first), self.dimension), is_rounded=is_rounded)

    def take(self, positions: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The rows at the given positions."""
        # a run of neighbours is a slice of the mapped file, which costs no gather
        spans_a_run = len(positions) and positions[-1] - positions[0] == len(positions) - 1
        if spans_a_run and (np.diff(positions) == 1).all():
            return _units(self.stored[positions[0] : positions[-1] + 1])
        return _units(self.stored, positions)

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """`count` distinct rows (all of them if there are fewer), sampled uniformly, in row order."""
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))


# what is made of them on the way to unit vectors stays in a processor's cache
_CONVERTED_AT_ONCE = 4096


def _read_rows(file: BinaryIO, shape: tuple[int, int], *, is_rounded: bool) -> Float32[Array, "N D"]:
    """The next float16 rows of a file as float32, of unit length unless they stay rounded."""
    rows = np.empty(shape, np.float32)
    for first in range(0, len(rows), _CONVERTED_AT_ONCE):
        block = rows[first : first + _CONVERTED_AT_ONCE]
        stored = stored_to_float32(np.fromfile(file, np.float16, block.size).reshape(block.shape))
        block[:] = stored if is_rounded else normalize_rows(stored)
    return rows


def _units(stored: Float16[Array, "N D"], positions: Int64[Array, " M"] | None = None) -> Float32[Array, "_ D"]:
    """The rows, or those at the positions, as float32 of unit length."""
    count = len(stored) if positions is None else len(positions)
    units = np.empty((count, stored.shape[1]), np.float32)
    for first in range(0, count, _CONVERTED_AT_ONCE):
        block = slice(first, first + _CONVERTED_AT_ONCE)
        units[block] = normalize_rows(stored_to_float32(stored[block if positions is None else positions[block]]))
    return units


def iter_stored_blocks(source: Embeddings) -> Iterator[Float[Array, "_ D"]]:
    """The rows of an embeddings folder in their stored precision."""
    for part in source.parts:
        vectors = open_vectors(source.folder, part)
        for first in range(0, part.rows, _ROWS_AT_ONCE):
            yield vectors[first : first + _ROWS_AT_ONCE]


# a progress bar is worth it from a few seconds of work on
_MIN_ROWS_FOR_PROGRESS = 50_000
# files written in large pieces are cached, and mapped, in pages of 2 MB: graph searches get a tenth faster
_WRITE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class WrittenSegment:
    """A segment on disk, and the checksums of its files."""

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
    link_queries: Float[Array, "Q D"] | None = None,
    failpoint: FailPoint = no_failpoint,
) -> WrittenSegment:
    """Write the files of a segment, each atomically: the rows first, then the FAISS index trained on them.

    Args:
        blocks: unit vectors, as many as `rows`.
        rows: the catalogue's row of each, ascending.
        link_queries: of unit length, whose answers a graph links (`graph_links.link_answers`); others ignore them.

    Raises:
        UsageError: the index type does not fit the rows.
        VlmError: a vector is not of unit length, or there are more or fewer than `rows`.
    """
    vectors_path = folder / segment_file(number, "npy")
    rows_path = folder / segment_file(number, "rows.npy")
    vectors_path.parent.mkdir(exist_ok=True)
    failpoint(f"{vectors_path.name}")
    write_vectors(vectors_path, blocks, (len(rows), dimension), failpoint=failpoint)
    failpoint(f"{rows_path.name}")
    with atomic_write(rows_path) as file:
        np.save(file, rows, allow_pickle=False)

    gpu = find_gpu()
    # training sees the rows as they are stored, rounded to float16; each step maps the file for itself, as the pages
    # that it reads count as memory until they are unmapped
    prepared = INDEX_TYPES[kind](Vectors(vectors_path, len(rows), dimension), tuning, gpu)
    duplicates = find_duplicate_rows(Vectors(vectors_path, len(rows), dimension).stored)
    _add_all(prepared.index, INDEX_TYPES[kind], Vectors(vectors_path, len(rows), dimension), gpu)
    if link_queries is not None and INDEX_TYPES[kind].is_graph:
        link_answers(prepared.index, link_queries, is_shown=len(rows) >= _MIN_ROWS_FOR_PROGRESS)
    segment = Segment(
        number=number,
        kind=kind,
        parameters=prepared.parameters,
        rows=len(rows),
        rerank=prepared.rerank,
        duplicates=len(duplicates),
    )
    if len(duplicates):
        failpoint(f"{segment.duplicates_file}")
        with atomic_write(folder / segment.duplicates_file) as file:
            np.save(file, duplicates, allow_pickle=False)
    failpoint(f"{segment.index_file}")
    faiss = load_faiss()
    with atomic_write(folder / segment.index_file) as file:
        faiss.write_index(prepared.index, faiss.PyCallbackIOWriter(file.write, _WRITE_BYTES))
        failpoint(f"{segment.index_file} before its rename")
    return WrittenSegment(segment=segment, files={name: record_file(folder / name) for name in segment.files})


def write_vectors(
    path: Path, blocks: Iterable[Float[Array, "_ D"]], shape: tuple[int, int], *, failpoint: FailPoint = no_failpoint
) -> None:
    """Write blocks of unit vectors as one float16 matrix of shape (N, D), atomically.

    Raises:
        VlmError: a row is not finite or not of unit length, or there are not N of them; nothing is written.
    """
    num_rows = 0
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for block in blocks:
            check_lengths(block, num_rows)
            file.write(np.ascontiguousarray(block, np.float16).tobytes())
            num_rows += len(block)
        if num_rows != shape[0]:
            raise VlmError(f"{num_rows:,} vectors came for {shape[0]:,} rows; the embeddings are damaged: embed again.")
        failpoint(f"{path.name} before its rename")


def check_lengths(block: Float[Array, "N D"], first_row: int) -> None:
    """Refuse embeddings that are no unit vectors; first_row: the number of the first of them, for the message.

    Raises:
        VlmError: a row is not finite or not of unit length.
    """
    wrong, lengths = find_non_unit_rows(to_float32(block))
    if len(wrong):
        raise VlmError(
            f"Row {first_row + wrong[0]:,} of the embeddings has length {lengths[0]:.4g} ({len(wrong):,} such rows in "
            "its block); 1 was expected: the embeddings are damaged or were never normalised. Embed again."
        )


def _add_all(index: "faiss.Index", kind: IndexType, vectors: Vectors, gpu: CopyToGpu | None) -> None:
    is_long = len(vectors) >= _MIN_ROWS_FOR_PROGRESS
    # float16 rows made unit vectors and rounded again would not always be the same float16 rows
    blocks = partial(vectors.blocks, is_rounded=kind.keeps_float16)
    with progress(total=len(vectors), what="index", unit=" rows", is_shown=is_long) as bar:
        for count in fill_index(index, blocks, len(vectors), gpu):
            bar.update(count)


class SegmentReader:
    """A segment open for reading; its files may be unlinked meanwhile.

    faiss_search: searches the CPU index. is_approximate: a search reads only some of the rows.
    on_gpu: a copy of the FAISS index there, which answers searches without a filter; None: there is none.
    """

    on_gpu: "faiss.Index | None" = None

    def __init__(self, folder: Path, meta: Segment, dimension: int) -> None:
        self.meta = meta
        self.rows: Int64[Array, " N"] = open_array(folder / meta.rows_file, np.dtype(np.int64), (meta.rows,))
        self.vectors = Vectors(folder / meta.vectors_file, meta.rows, dimension)
        self.duplicates: DuplicateRows | None = None
        if meta.duplicates:
            table = open_array(folder / meta.duplicates_file, np.dtype(np.int64), (meta.duplicates, 2))
            self.duplicates = DuplicateRows(table)
        self._path = folder / meta.index_file
        self.index = _read_index(self._path, meta, dimension, has_array_lists=INDEX_TYPES[meta.kind].has_array_lists)
        self.faiss_search = make_search_function(self.index)
        self.is_approximate = INDEX_TYPES[meta.kind].effort is not None
        # in a new index position and row are the same: rows ascend from 0, so the last one proves it
        self._rows_are_positions = not meta.rows or self.rows.item(-1) == meta.rows - 1

    def __len__(self) -> int:
        return self.meta.rows

    def copy_to_gpu(self, copy: CopyToGpu) -> str:
        """Let a GPU answer searches without a filter; the reason if it cannot, else empty."""
        reason = gpu_unsupported_reason(self.index)
        if not reason and self.on_gpu is None:
            try:
                self.on_gpu = copy(self.index_in_memory())
            # CUDA is mostly out of memory; the file may be gone since a later change
            except (RuntimeError, FileNotFoundError) as error:
                reason = f"it cannot be copied there: {str(error).splitlines()[0]}"
        return reason

    def index_in_memory(self) -> "faiss.Index":
        """The FAISS index with its lists in memory, as FAISS copies and writes them."""
        is_in_memory = not INDEX_TYPES[self.meta.kind].has_array_lists
        return self.index if is_in_memory else _read_index(self._path, self.meta, self.index.d, has_array_lists=False)

    def rows_at(self, positions: Int64[Array, "Q K"]) -> Int64[Array, "Q K"]:
        """The catalogue's rows at these positions; for position -1 any number."""
        return positions if self._rows_are_positions else self.rows.take(positions, mode="wrap")

    def positions_of_rows(self, rows: Int64[Array, "*shape"]) -> Int64[Array, "*shape"]:
        """The positions of these rows, all of which are in this segment."""
        return rows if self._rows_are_positions else np.searchsorted(self.rows, rows)

    def positions_of(self, rows: Int64[Array, " M"]) -> Int64[Array, " K"]:
        """The positions of those of the sorted rows that are in this segment, ascending."""
        if not len(self) or not len(rows):
            return np.zeros(0, np.int64)
        # segments never overlap, so most of the rows are cut off before the search
        first, last = np.searchsorted(rows, [self.rows[0], self.rows[-1] + 1])
        in_range = rows[first:last]
        # without a gap, as in every segment until rows of it are deleted and it is written again
        if self.rows[-1] - self.rows[0] == len(self) - 1:
            return in_range - self.rows[0]
        positions = np.minimum(np.searchsorted(self.rows, in_range), len(self) - 1)
        return positions[self.rows[positions] == in_range].astype(np.int64)

    def effort(self, share: float) -> int | None:
        """nprobe or efSearch of a search that may return only `share` of the rows.

        It grows as the share shrinks, so that about as many rows are compared as without a filter. None: this index
        type has no such parameter.
        """
        name = INDEX_TYPES[self.meta.kind].effort
        limit = effort_limit(self.index)
        if name is None or limit is None:
            return None
        return min(limit, ceil(self.meta.parameters[name] / share))


def _read_index(path: Path, meta: Segment, dimension: int, *, has_array_lists: bool) -> "faiss.Index":
    """The FAISS index, memory-mapped as of `map_index`."""
    if not path.is_file():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    try:
        index = map_index(str(path), has_array_lists=has_array_lists)
    except RuntimeError as error:
        raise VlmError(f"{path} is damaged ({error}); {REBUILD_HINT}.") from error
    if index.ntotal != meta.rows or index.d != dimension:
        raise VlmError(
            f"{path} holds {index.ntotal:,} rows of {index.d} dimensions, {meta.rows:,} of {dimension} were "
            f"written; {REBUILD_HINT}."
        )
    # the manifest decides, not the file: `IndexWriter.set_search_params` changes the manifest only
    if name := INDEX_TYPES[meta.kind].effort:
        set_search_effort(index, meta.parameters[name])
    return index


EXACT_ROWS = 10_000
"""Rows that are always compared one by one: at 512 dimensions that takes about a millisecond."""

_EXACT_SHARE = 0.02
# more results than this need more effort for the same recall
_DEEP_RESULTS = 100
_SCAN_ROWS = 16_384
# a multiple of 8
_BITS_AT_ONCE = 98_304
_MAX_QUERIES = 1024
_NO_ROW = -1
# factor by which a search goes deeper where it cuts off rows of equal score
_DEEPER = 4


@dataclass(frozen=True, eq=False)
class SegmentView:
    """A segment and the positions in it that a search may return: a bit each, as FAISS reads them; None: all."""

    segment: SegmentReader
    bits: UInt8[Array, " _"] | None = None

    @cached_property
    def count(self) -> int:
        """Number of rows that may be returned."""
        return len(self.segment) if self.bits is None else int(np.bitwise_count(self.bits).sum())

    def allows(self, positions: Int64[Array, " N"]) -> Bool[Array, " N"]:
        """Which of these positions may be returned."""
        return np.ones(len(positions), bool) if self.bits is None else bits_at(self.bits, positions)

    def position_blocks(self, positions_at_once: int) -> Iterator[Int64[Array, " _"]]:
        """Positions that may be returned, ascending, in blocks of one size; the last may be shorter."""
        # eight bytes for each of many rows, which would stay in the heap
        pending = np.zeros(0, np.int64)
        for first in range(0, len(self.segment), _BITS_AT_ONCE):
            last = min(first + _BITS_AT_ONCE, len(self.segment))
            if self.bits is None:
                found = np.arange(first, last)
            else:
                found = first + np.flatnonzero(unpack_bits(self.bits, first, last))
            pending = np.concatenate([pending, found])
            while len(pending) >= positions_at_once:
                yield pending[:positions_at_once]
                pending = pending[positions_at_once:]
        if len(pending):
            yield pending

    def rows(self) -> Int64[Array, " M"]:
        """The catalogue's rows that may be returned, ascending."""
        rows = self.segment.rows
        return rows if self.bits is None else rows[unpack_bits(self.bits, 0, len(rows))]

    def those_of(self, rows: Int64[Array, " N"]) -> Int64[Array, " M"]:
        """Those of the sorted rows that may be returned."""
        positions = self.segment.positions_of(rows)
        return self.segment.rows[positions[self.allows(positions)]]

    def excluding(self, rows: Int64[Array, " M"]) -> "SegmentView":
        """This view without the given rows, which are sorted."""
        excluded = self.segment.positions_of(rows)
        if not len(excluded):
            return self
        bits = all_bits(len(self.segment)) if self.bits is None else self.bits
        return replace(self, bits=bits & ~pack_bits((excluded,), len(self.segment)))

    def restricted_to(self, rows: AllowedRows) -> "SegmentView":
        """The given rows of this view; an array of them is sorted."""
        blocks = row_id_blocks(rows) if isinstance(rows, BitMap) else (rows,)
        bits = pack_bits(map(self.segment.positions_of, blocks), len(self.segment))
        # a row that was deleted stays excluded, whatever the filter says
        return replace(self, bits=bits if self.bits is None else bits & self.bits)

    def search(self, queries: Float32[Array, "Q D"], top: int) -> ScoredRows:
        """The nearest rows by FAISS, reranked where its scores are not exact, or by a scan (see the module)."""
        # FAISS would fill the rest with -1, which the search below takes for rows it failed to find
        top = min(top, self.count)
        if self.uses_exact_scan(top):
            return self.scan(queries, top)
        # one row more than asked for tells whether rows of equal score were cut off
        depth = min(top + 1, self.count)
        scores, rows = self._search_faiss_rows(queries, depth, effort_for=top)
        while depth < self.count and self._cuts_equals(scores, rows, top):
            depth = min(_DEEPER * depth, self.count)
            scores, rows = self._search_faiss_rows(queries, depth, effort_for=top)
        return scores[:, :top], rows[:, :top]

    def _cuts_equals(self, scores: Float32[Array, "Q K"], rows: Int64[Array, "Q K"], top: int) -> bool:
        """Whether rows that are not there may rank before the last of the `top`, because their score is equal."""
        is_cut = scores[:, top - 1] == scores[:, -1]
        # most often not, and for one query Python is faster than numpy
        if True not in is_cut.tolist():
            return False
        duplicates = self.segment.duplicates
        if duplicates is None:
            return True
        # all equals of a row that occurs more than once are there already
        last = self.segment.positions_of_rows(rows[is_cut][:, [top - 1, -1]])
        leaders = duplicates.leaders_of(last)
        return bool(((leaders[:, 0] < 0) | (leaders[:, 0] != leaders[:, 1])).any())

    def _search_faiss_rows(self, queries: Float32[Array, "Q D"], top: int, *, effort_for: int) -> ScoredRows:
        """The `top` rows that FAISS finds with the effort for so many results."""
        # twice the results need about √2 times the effort for the same recall
        depth = sqrt(effort_for / _DEEP_RESULTS) if effort_for > _DEEP_RESULTS else 1.0
        segment = self.segment
        is_reranked = segment.meta.rerank > 0
        if is_reranked:
            candidates = min(num_candidates(effort_for, segment.meta.rerank), self.count)
            _, positions = self._search_faiss(queries, max(candidates, top), depth)
            scores, positions = rerank(segment.vectors.stored, queries, positions, top)
        else:
            scores, positions = self._search_faiss(queries, top, depth)
        if segment.duplicates is not None:
            scores, positions = segment.duplicates.complete(scores, positions, self.allows)
        rows = segment.rows_at(positions)

        # FAISS fills up with -1, so the last result tells whether it found enough
        last_positions = positions[:, -1]
        if _NO_ROW in last_positions.tolist():
            is_short = last_positions == _NO_ROW
            scores[is_short], rows[is_short] = self.scan(queries[is_short], top)

        # reranked results are ordered by row within ties already
        if not is_reranked and _has_ties(scores):
            return _sort_by_score(scores, rows, top)
        return scores, rows

    def uses_exact_scan(self, top: int) -> bool:
        """Whether `top` results are so many that all rows are compared, whatever the search parameters."""
        return top > _DEEP_RESULTS and self.segment.is_approximate and top > _EXACT_SHARE * self.count

    def scan(self, queries: Float32[Array, "Q D"], top: int) -> ScoredRows:
        """The nearest rows by comparing all of this view with the queries."""
        best = _empty_result(queries)
        for positions in self.position_blocks(_SCAN_ROWS):
            # block by block, so that the scores of all queries and rows never exist at once
            scores = queries @ self.segment.vectors.take(positions).T
            rows = np.broadcast_to(self.segment.rows[positions], scores.shape)
            best = merge([best, _top_of_block(scores, rows, top)], top)
        if self.segment.duplicates is None:
            return best
        positions = self.segment.positions_of_rows(best[1])
        scores, positions = self.segment.duplicates.complete(best[0], positions, self.allows)
        return scores, self.segment.rows_at(positions)

    def _search_faiss(self, queries: Float32[Array, "Q D"], top: int, depth: float) -> ScoredRows:
        """Scores and positions. depth: factor on the segment's own effort; a GPU keeps its own."""
        segment = self.segment
        if self.bits is None:
            if segment.on_gpu is not None and top <= MAX_GPU_RESULTS:
                return segment.on_gpu.search(queries, top)
            if depth == 1 or not segment.is_approximate:
                return segment.faiss_search(queries, top)
        # excluded rows are skipped, so more lists or nodes are read for as many comparisons
        selector = None if self.bits is None else load_faiss().IDSelectorBitmap(self.bits)
        # both corrections multiply: fewer rows allowed, and more results wanted
        effort = segment.effort(self.count / len(segment) / depth)
        parameters = search_parameters(segment.index, selector=selector, effort=effort)
        return segment.faiss_search(queries, top, parameters)


def nearest(
    views: Sequence[SegmentView],
    queries: Float32[Array, "Q D"],
    top: int,
    allowed_rows: AllowedRows | None = None,
    *,
    exact_rows: int = EXACT_ROWS,
) -> ScoredRows:
    """The `top` nearest rows of all views, or of their `allowed_rows`; ties by row.

    There are fewer columns only if there are fewer rows.

    exact_rows: a filter that leaves no more rows than this, or a fiftieth of them, is answered by an exact scan.
    """
    # bounds the memory of scans and reranking
    if len(queries) > _MAX_QUERIES:
        blocks: list[ScoredRows] = []
        # blocks give what one call gives: queries do not influence each other
        for first in range(0, len(queries), _MAX_QUERIES):
            block = queries[first : first + _MAX_QUERIES]
            blocks.append(nearest(views, block, top, allowed_rows, exact_rows=exact_rows))
        scores, rows = zip(*blocks, strict=True)
        return np.concatenate(scores), np.concatenate(rows)

    if allowed_rows is None:
        # the common case, one segment, is spared the merge
        if len(views) == 1 and views[0].count:
            return views[0].search(queries, top)
        return merge([view.search(queries, top) for view in views if view.count] or [_empty_result(queries)], top)

    # all segments are answered in the same way, so that their scores are equally exact
    total = sum(view.count for view in views)
    allowed_views = [view.restricted_to(allowed_rows) for view in views]
    num_allowed = sum(view.count for view in allowed_views)
    is_exact = num_allowed <= max(exact_rows, _EXACT_SHARE * total)
    results = []
    for view in allowed_views:
        if view.count:
            results.append(view.scan(queries, top) if is_exact else view.search(queries, top))
    return merge(results or [_empty_result(queries)], top)


def merge(results: Sequence[ScoredRows], top: int) -> ScoredRows:
    """The best `top` of several results of the same queries; ties by row."""
    if len(results) == 1:
        return results[0]
    scores, rows = zip(*results, strict=True)
    return _sort_by_score(np.concatenate(scores, axis=1), np.concatenate(rows, axis=1), top)


def _has_ties(scores: Float32[Array, "Q K"]) -> bool:
    """Whether a query has two equal scores; scores descend, so these are neighbours."""
    # one query at a time is the rule, and for it Python is faster than numpy
    if len(scores) == 1:
        line = scores[0].tolist()
        return len(set(line)) < len(line)
    return bool((scores[:, 1:] == scores[:, :-1]).any())


def _sort_by_score(scores: Float32[Array, "Q K"], rows: Int64[Array, "Q K"], top: int) -> ScoredRows:
    # the last key is the primary one: by score, then by row
    order = np.lexsort((rows, -scores), axis=1)[:, :top]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _empty_result(queries: Float32[Array, "Q D"]) -> ScoredRows:
    return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)


def _top_of_block(scores: Float32[Array, "Q N"], rows: Int64[Array, "Q N"], top: int) -> ScoredRows:
    """The `top` highest scores of each query, unordered; of equal ones those of the lowest rows."""
    if scores.shape[1] <= top:
        return scores, rows
    lowest = np.partition(scores, -top, axis=1)[:, [-top]]
    # a score of at least the lowest of them may be one too many, where several are equal to it
    if np.count_nonzero(scores >= lowest) > top * len(scores):
        return _sort_by_score(scores, rows, top)
    highest = np.argpartition(-scores, top - 1, axis=1)[:, :top]
    return np.take_along_axis(scores, highest, axis=1), np.take_along_axis(rows, highest, axis=1)
