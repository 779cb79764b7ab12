"""An index open for reading: a snapshot of one version of its folder, searched with unit vectors.

Every change of an index makes a new version, whose manifest replaces the one before. An `IndexSnapshot` is what one
manifest names: segments with their live rows, and the catalogue. It stays valid while later changes remove files,
because it has them open. An `Index` holds a snapshot, answers queries from it, and moves to the newest on `refresh`.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.index.ann.index_type_base import CopyToGpu
from vlm.index.ann.index_types import resolve_index_type
from vlm.index.catalog import Catalogue, Entry
from vlm.index.embeddings_folder import Modality, Origin, check_files
from vlm.index.index_files import REBUILD_HINT, IndexDetails, Segment, read_previous
from vlm.index.segments import ScoredRows, SegmentReader, SegmentView, nearest, open_array
from vlm.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from vlm.results import Result
from vlm.tensor_types import Array, Float, Float32, Int64

logger = logging.getLogger(__name__)

# how often a folder may change between reading its manifest and opening its files before that counts as a fault
_MAX_TRIES = 100

_ENTRIES_AT_ONCE = 10_000

_Identity = tuple[str, tuple[tuple[str, FileRecord], ...]]
"""Of a segment: its metadata, and its files with their checksums."""


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexSnapshot:
    """One version of an index; later changes and removed files do not affect it.

    views: the segments with their live positions. dead: deleted rows that segments still hold, sorted.
    """

    folder: Path
    manifest: Manifest
    details: IndexDetails
    catalogue: Catalogue
    views: tuple[SegmentView, ...]
    dead: Int64[Array, " N"]

    def __len__(self) -> int:
        return self.manifest.counts["rows"]

    @property
    def number(self) -> int:
        """The version's number, `generation` on disk."""
        return self.manifest.generation

    @cached_property
    def rows(self) -> Int64[Array, " N"]:
        """All live rows, ascending."""
        return np.concatenate([np.zeros(0, np.int64), *(view.rows() for view in self.views)])

    def entries(self) -> Iterator[tuple[int, Origin]]:
        """Each live row with what it was made from, ascending."""
        for first in range(0, len(self.rows), _ENTRIES_AT_ONCE):
            for entry in self.catalogue.entries(self.rows[first : first + _ENTRIES_AT_ONCE].tolist()):
                yield entry.row, entry

    def vectors(self, rows: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The stored unit vectors of live or deleted rows, in the given order; the segments must hold all of them."""
        sorted_rows, order = np.unique(rows, return_inverse=True)
        blocks = [np.zeros((0, self.details.space.dimension), np.float32)]
        # segments are in the order of their rows, which never overlap, so the blocks follow `sorted_rows`
        for view in self.views:
            blocks.append(view.segment.vectors.take(view.segment.positions_of(sorted_rows)))
        return np.concatenate(blocks)[order]


def open_snapshot(folder: Path, *, before: IndexSnapshot | None = None) -> IndexSnapshot:
    """Open the version that the manifest names now; files that `before` has open are not opened again.

    Raises:
        UsageError: the folder is unfinished, of another kind, or of another format.
        VlmError: a file is missing or damaged, or segments and catalogue do not have the same rows.
    """
    for _ in range(_MAX_TRIES):
        manifest = read_manifest(folder, "index")
        try:
            return _open_version(folder, manifest, before)
        except (VlmError, FileNotFoundError):
            # a writer may have removed what the manifest named a moment ago
            if read_manifest(folder, "index") == manifest:
                raise
    raise VlmError(f"{folder} changed {_MAX_TRIES} times while it was being opened; try again.")


def _open_version(folder: Path, manifest: Manifest, before: IndexSnapshot | None) -> IndexSnapshot:
    details = IndexDetails.from_manifest(manifest, folder)
    # sizes only, so that an index opens at once; `vlm index check` compares checksums
    check_files(folder, manifest.files, verify=False, cure=REBUILD_HINT)
    open_segments = _open_segments_of(before)
    segments = []
    for meta in details.segments:
        segment = open_segments.get(_identity(manifest.files, meta))
        segments.append(segment or SegmentReader(folder, meta, details.space.dimension))
    dead = _read_tombstones(folder, details, manifest)
    snapshot = IndexSnapshot(
        folder=folder,
        manifest=manifest,
        details=details,
        catalogue=_open_catalogue(folder / details.catalogue, manifest.generation, before),
        views=tuple(SegmentView(segment).excluding(dead) for segment in segments),
        dead=dead,
    )

    # the cheapest test that segments and catalogue are of the same version
    num_live = sum(view.count for view in snapshot.views)
    num_listed = len(snapshot.catalogue)
    if not num_live == num_listed == len(snapshot):
        raise VlmError(
            f"{folder} is inconsistent: {num_live:,} live rows in its segments and {num_listed:,} in "
            f"{details.catalogue}, {len(snapshot):,} were written; {REBUILD_HINT}."
        )
    return snapshot


def _open_segments_of(before: IndexSnapshot | None) -> Mapping[_Identity, SegmentReader]:
    if before is None:
        return {}
    segments: dict[_Identity, SegmentReader] = {}
    for view in before.views:
        segments[_identity(before.manifest.files, view.segment.meta)] = view.segment
    return segments


def _identity(files: Mapping[str, FileRecord], segment: Segment) -> _Identity:
    # with the metadata, because search parameters change without a change of files
    return repr(segment), tuple((name, files[name]) for name in segment.files)


def _open_catalogue(path: Path, generation: int, before: IndexSnapshot | None) -> Catalogue:
    if not path.is_file():
        raise VlmError(f"{path} is missing; {REBUILD_HINT}.")
    if before is not None and before.catalogue.path == path and before.catalogue.is_current():
        return before.catalogue.at(generation)
    return Catalogue(path, generation)


def _read_tombstones(folder: Path, details: IndexDetails, manifest: Manifest) -> Int64[Array, " N"]:
    if not details.tombstones:
        return np.zeros(0, np.int64)
    shape = (manifest.counts["dead"],)
    # a copy in memory: the next change removes the file
    return np.array(open_array(folder / details.tombstones, np.dtype(np.int64), shape))


# the squared length of a unit vector in float32 is no further from 1
_ROUNDING = 1e-6

RowSet = Int64[Array, " N"]
"""Row numbers, ascending."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One result: `score` is the cosine of query and row, in [-1, 1]."""

    score: float
    entry: Entry


@dataclass(frozen=True, kw_only=True)
class SegmentInfo:
    """One segment; `rows` are its live ones, `dead` its deleted ones."""

    number: int
    kind: str
    parameters: dict[str, int]
    rerank: int
    rows: int
    dead: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class IndexInfo(Result):
    """An index in numbers.

    kind, parameters: of the segment with most rows. dead: deleted rows that segments hold until `vlm index compact`.
    fresh: live rows outside that segment.
    kept_bytes: of files that are kept for a rollback to the version before alone.
    map_rows: rows that had a place when the map was made; 0 without a map.
    """

    folder: str
    kind: str
    parameters: dict[str, int]
    rows: int
    dead: int
    fresh: int
    dimension: int
    modality: Modality
    metric: str
    bytes: int
    kept_bytes: int
    generation: int
    model: str
    model_fingerprint: str
    embeddings_fingerprint: str
    num_shards: int
    map_rows: int
    made_by: str
    made_at: str
    segments: tuple[SegmentInfo, ...]
    evidence: dict[str, Any]


class Index:
    """An index folder open for reading: one version of it, until `refresh` moves to the newest."""

    def __init__(self, snapshot: IndexSnapshot, stamp: tuple[int, ...], gpu: CopyToGpu | None = None) -> None:
        self.snapshot = snapshot
        self._stamp = stamp
        self._gpu = gpu
        self._refresh_lock = threading.Lock()
        self._is_closed = False

    @classmethod
    def open(cls, folder: Path, *, gpu: CopyToGpu | None = None) -> "Index":
        """Open an index folder.

        gpu: holds copies of the segments it can search (`find_gpu`), which costs its memory and the copying, and pays
            off for many queries. Queries with a filter, and segments with deleted rows, stay on the CPU. FAISS lets
            one thread use a GPU at a time.

        Raises:
            UsageError: it is unfinished, of another kind, or of another format.
            VlmError: a file is missing or damaged, or segments and catalogue do not have the same rows.
        """
        # the stamp first: a change in between is then noticed by the next refresh
        stamp = _stamp(folder)
        snapshot = open_snapshot(folder)
        for message in _copy_to_gpu(snapshot, gpu):
            logger.info(message)
        return cls(snapshot, stamp, gpu)

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.snapshot.folder

    @property
    def manifest(self) -> Manifest:
        """The manifest of this version."""
        return self.snapshot.manifest

    @property
    def details(self) -> IndexDetails:
        """The manifest's details, typed."""
        return self.snapshot.details

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue of this version."""
        return self.snapshot.catalogue

    def __len__(self) -> int:
        return len(self.snapshot)

    def refresh(self) -> bool:
        """Move to the newest version, if there is a newer one; whether it moved.

        Costs one stat of the manifest while nothing has changed. Searches under way finish on the old version.

        Raises:
            UsageError: it is closed.
            VlmError: the folder is gone or damaged; the old version stays open.
        """
        self.require_open()
        # one thread opens the new version; the others wait and find it open
        with self._refresh_lock:
            stamp = _stamp(self.folder)
            if stamp == self._stamp:
                return False
            newest = open_snapshot(self.folder, before=self.snapshot)
            _copy_to_gpu(newest, self._gpu)
            has_moved = newest.manifest != self.manifest
            self.snapshot = newest
            self._stamp = stamp
            return has_moved

    def close(self) -> None:
        """Release the catalogue."""
        self._is_closed = True
        self.catalogue.close()

    def require_open(self) -> None:
        """Refuse what is asked after `close`.

        Raises:
            UsageError: it is closed.
        """
        if self._is_closed:
            raise UsageError(f"The index {self.folder} is closed; open it again, as with vlm.open_index.")

    def require_model(self, fingerprint: str, name: str) -> None:
        """Refuse a model whose vectors cannot be compared with those of this index.

        Raises:
            UsageError: its fingerprint is another.
        """
        space = self.details.space
        if fingerprint == space.fingerprint:
            return
        if name == space.model:
            raise UsageError(
                f"{name} has changed since it embedded {self.folder}: its fingerprint was {space.fingerprint} and is "
                f"now {fingerprint}. Put the old model back, or embed and index again."
            )
        raise UsageError(
            f"{self.folder} was embedded by {space.model} (fingerprint {space.fingerprint}); {name} is another model "
            f"(fingerprint {fingerprint}), and their vectors cannot be compared. Query with {space.model}, or embed "
            f"and index again with {name}."
        )

    def search(self, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSet | None = None) -> list[list[Hit]]:
        """The `top` rows nearest to each query, best first. Fewer only if there are fewer rows.

        Ties are ordered by row; which of several rows tied at the end are among the `top` is up to FAISS.

        allowed_rows: only these rows are returned (as from `Catalogue.where`), deleted ones never.

        Raises:
            UsageError: another dimension, a query that is zero or not finite, or top < 1.
        """
        snapshot = self.snapshot
        scores, rows = _nearest(snapshot, queries, top, allowed_rows)
        # several queries share results, whose entries are read once
        distinct_rows = np.unique(rows).tolist()
        entries = dict(zip(distinct_rows, snapshot.catalogue.entries(distinct_rows), strict=True))
        results = []
        for query_scores, query_rows in zip(scores.tolist(), rows.tolist(), strict=True):
            hits = zip(query_scores, query_rows, strict=True)
            results.append([Hit(score=score, entry=entries[row]) for score, row in hits])
        return results

    def nearest(self, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSet | None = None) -> ScoredRows:
        """As `search`, but scores and rows alone, without reading the catalogue."""
        return _nearest(self.snapshot, queries, top, allowed_rows)

    def info(self) -> IndexInfo:
        """The index in numbers, from the manifest and the segments."""
        manifest = self.manifest
        details = self.details
        space = details.space
        segments = tuple(_segment_info(view, manifest) for view in self.snapshot.views)
        largest = max(segments, key=lambda segment: segment.rows, default=None)
        catalogue_bytes = self.catalogue.path.stat().st_size
        return IndexInfo(
            folder=str(self.folder),
            kind=largest.kind if largest else resolve_index_type(details.kind, 0),
            parameters=largest.parameters if largest else {},
            rows=len(self),
            dead=manifest.counts["dead"],
            fresh=len(self) - (largest.rows if largest else 0),
            dimension=space.dimension,
            modality=space.modality,
            metric=details.metric,
            bytes=sum(record.bytes for record in manifest.files.values()) + catalogue_bytes,
            kept_bytes=_kept_bytes(self.folder, manifest, details),
            generation=manifest.generation,
            model=space.model,
            model_fingerprint=space.fingerprint,
            embeddings_fingerprint=manifest.inputs["embeddings"],
            num_shards=len(details.shards),
            map_rows=details.map.rows if details.map else 0,
            made_by=manifest.made_by,
            made_at=manifest.made_at,
            segments=segments,
            evidence=details.evidence,
        )


def _kept_bytes(folder: Path, manifest: Manifest, details: IndexDetails) -> int:
    previous = None
    # `vlm index check` and a rollback say what is wrong with it
    with suppress(VlmError):
        previous = read_previous(folder, manifest)
    if previous is None:
        return 0
    num_bytes = sum(record.bytes for name, record in previous.files.items() if name not in manifest.files)
    catalogue = folder / previous.details["catalogue"]
    if previous.details["catalogue"] != details.catalogue and catalogue.is_file():
        num_bytes += catalogue.stat().st_size
    return num_bytes


def _copy_to_gpu(snapshot: IndexSnapshot, gpu: CopyToGpu | None) -> list[str]:
    """Copy the segments that a GPU can search there; a message for each of the others."""
    if gpu is None:
        return []
    messages = []
    for view in snapshot.views:
        if reason := view.segment.copy_to_gpu(gpu):
            messages.append(f"Segment {view.segment.meta.number} is searched on the CPU: {reason}.")
    return messages


def _nearest(
    snapshot: IndexSnapshot, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSet | None
) -> ScoredRows:
    units = _normalize_queries(queries, top, snapshot.details.space.dimension)
    if allowed_rows is not None and not (np.diff(allowed_rows) > 0).all():
        raise UsageError("allowed_rows must be distinct and ascending, as from Catalogue.where.")
    scores, rows = nearest(snapshot.views, units, top, allowed_rows)
    # rounding may lead out of the range; in place, which takes half the time of a copy by clip
    np.minimum(scores, 1, out=scores)
    np.maximum(scores, -1, out=scores)
    return scores, rows


def _normalize_queries(queries: Float[Array, "Q D"], top: int, dimension: int) -> Float32[Array, "Q D"]:
    if top < 1:
        raise UsageError(f"top = {top} is out of range: ask for at least one result.")
    if queries.shape[1] != dimension:
        raise UsageError(f"Queries have {queries.shape[1]} dimensions, the rows of this index {dimension}.")
    vectors = queries.astype(np.float32, copy=False)
    squares = np.vecdot(vectors, vectors)
    # one query at a time is the rule, and for few numbers Python is faster than numpy
    squares_list = squares.tolist()
    if all([-_ROUNDING < square - 1 < _ROUNDING for square in squares_list]):
        return vectors
    # the comparison is false for NaN too
    if not all([0 < square < inf for square in squares_list]):
        wrong = int(np.argmin((squares > 0) & (squares < np.inf)))
        raise UsageError(f"Query {wrong} has length {np.sqrt(squares[wrong])}: it must be finite and not zero.")
    return vectors / np.sqrt(squares)[:, None]


def _segment_info(view: SegmentView, manifest: Manifest) -> SegmentInfo:
    meta = view.segment.meta
    return SegmentInfo(
        number=meta.number,
        kind=meta.kind,
        parameters=meta.parameters,
        rerank=meta.rerank,
        rows=view.count,
        dead=meta.rows - view.count,
        bytes=sum(manifest.files[name].bytes for name in meta.files),
    )


def _stamp(folder: Path) -> tuple[int, ...]:
    """What changes whenever the manifest is replaced; all zero if there is none."""
    try:
        stat = os.stat(folder / MANIFEST)
    except OSError:
        return (0, 0, 0, 0)
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size
