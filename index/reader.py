"""One generation of an index folder, open for reading: its manifest, its catalogue and the living of its segments.

An open index: asked with unit vectors, answering with scores and catalogue entries, and kept up with its folder.
"""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.index.ann.index_type import CopyToGpu
from vlm.index.catalog import Catalogue, Entry
from vlm.index.embeddings import Modality, Origin, check_files
from vlm.index.layout import REBUILD_HINT, IndexDetails, Segment
from vlm.index.segments import ScoredRows, SegmentReader, SegmentView, nearest, open_array
from vlm.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from vlm.tensors import Array, Float, Float32, Int64

logger = logging.getLogger(__name__)

# how often a folder may change between reading its manifest and opening its files before that counts as a fault
_MAX_TRIES = 100

_Identity = tuple[str, tuple[tuple[str, FileRecord], ...]]
_ENTRIES_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexSnapshot:
    """What the folder held when its manifest was read; later changes and removed files do not touch it.

    selected: the segments with their living positions. dead: rows of the segments that are dead, sorted.
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
        """The generation's number."""
        return self.manifest.generation

    @cached_property
    def rows(self) -> Int64[Array, " N"]:
        """All living rows, rising."""
        return np.concatenate([np.zeros(0, np.int64), *(view.rows() for view in self.views)])

    def entries(self) -> Iterator[tuple[int, Origin]]:
        """Each living row with what it was made from, rising."""
        for first in range(0, len(self.rows), _ENTRIES_AT_ONCE):
            for entry in self.catalogue.entries(self.rows[first : first + _ENTRIES_AT_ONCE].tolist()):
                yield entry.row, entry

    def vectors(self, rows: Int64[Array, " N"]) -> Float32[Array, "N D"]:
        """The stored unit vectors of living or dead rows, in the order asked; all must be in its segments."""
        wanted, places = np.unique(rows, return_inverse=True)
        # segments lie in the order of their rows, which never overlap
        segments = [view.segment for view in self.views]
        blocks = [segment.vectors.take(segment.positions_of(wanted)) for segment in segments]
        return np.concatenate([np.zeros((0, self.details.space.dimension), np.float32), *blocks])[places]


def open_snapshot(folder: Path, *, before: IndexSnapshot | None = None) -> IndexSnapshot:
    """Open what the manifest names now; files that `before` holds open already are not opened again.

    Raises:
        UsageError: the folder is unfinished, of another kind, or of another format.
        VlmError: a file is missing or damaged, or segments and catalogue do not have the same rows.
    """
    for _ in range(_MAX_TRIES):
        manifest = read_manifest(folder, "index")
        try:
            return _open(folder, manifest, before)
        except (VlmError, FileNotFoundError):
            # a writer may have put away what the manifest named a moment ago
            if read_manifest(folder, "index") == manifest:
                raise
    raise VlmError(f"{folder} changed {_MAX_TRIES} times while it was being opened; try again.")


def _open(folder: Path, manifest: Manifest, before: IndexSnapshot | None) -> IndexSnapshot:
    details = IndexDetails.from_manifest(manifest, folder)
    check_files(folder, manifest.files, verify=False, cure=REBUILD_HINT)
    held = _open_segments_of(before)
    segments = [
        held.get(_identity(manifest.files, segment)) or SegmentReader(folder, segment, details.space.dimension)
        for segment in details.segments
    ]
    dead = _read_tombstones(folder, details, manifest)
    snapshot = IndexSnapshot(
        folder=folder,
        manifest=manifest,
        details=details,
        catalogue=_open_catalogue(folder / details.catalogue, manifest.generation, before),
        views=tuple(SegmentView(segment).excluding(dead) for segment in segments),
        dead=dead,
    )
    living, listed = sum(view.count for view in snapshot.views), len(snapshot.catalogue)
    if not living == listed == len(snapshot):
        raise VlmError(
            f"{folder} does not hold together: {living:,} living rows in its segments and {listed:,} in "
            f"{details.catalogue}, {len(snapshot):,} were written; {REBUILD_HINT}."
        )
    return snapshot


def _open_segments_of(before: IndexSnapshot | None) -> Mapping[_Identity, SegmentReader]:
    if before is None:
        return {}
    open_ones = (view.segment for view in before.views)
    return {_identity(before.manifest.files, segment.meta): segment for segment in open_ones}


def _identity(files: Mapping[str, FileRecord], segment: Segment) -> _Identity:
    """Of files and of how they are searched."""
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
    return np.array(open_array(folder / details.tombstones, np.dtype(np.int64), shape))


# the square of a unit vector's length in float32 is no further from 1
_ROUNDING = 1e-6

RowSet = Int64[Array, " N"]
"""Rows to search among: their numbers, rising."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer: `score` is the cosine of query and row, in [-1, 1]."""

    score: float
    entry: Entry


@dataclass(frozen=True, kw_only=True)
class SegmentInfo:
    """Facts about one segment; `rows` and `dead` are those in it that live and that do not."""

    number: int
    kind: str
    parameters: dict[str, int]
    rerank: int
    rows: int
    dead: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """Facts about an index, for people.

    kind, parameters: of the segment with most rows. dead: rows that searches leave out until `vlm index compact`.
    fresh: rows outside that segment.
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
    generation: int
    model: str
    model_fingerprint: str
    embeddings_fingerprint: str
    num_shards: int
    made_by: str
    made_at: str
    segments: tuple[SegmentInfo, ...]
    evidence: dict[str, Any]


class Index:
    """An index folder open for reading: one generation of it, until `refresh` moves on to the newest."""

    def __init__(self, snapshot: IndexSnapshot, stamp: tuple[int, ...], gpu: CopyToGpu | None = None) -> None:
        self.snapshot, self._stamp, self._gpu = snapshot, stamp, gpu
        self._refresh_lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, *, gpu: CopyToGpu | None = None) -> "Index":
        """Open an index folder.

        gpu: where copies of the segments it can search are held (`find_gpu`), which costs its memory and their way
            there, and pays for many questions. Questions with a filter, and of segments with dead rows, stay here.
            FAISS lets one thread ask a GPU at a time.

        Raises:
            UsageError: it is unfinished, of another kind, or of another format.
            VlmError: a file is missing or damaged, or segments and catalogue do not have the same rows.
        """
        stamp = _stamp(folder)
        snapshot = open_snapshot(folder)
        for reason in _copy_to_gpu(snapshot, gpu):
            logger.info(reason)
        return cls(snapshot, stamp, gpu)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.snapshot.folder

    @property
    def manifest(self) -> Manifest:
        """The manifest of this generation."""
        return self.snapshot.manifest

    @property
    def details(self) -> IndexDetails:
        """What the manifest says, typed."""
        return self.snapshot.details

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue as this generation sees it."""
        return self.snapshot.catalogue

    def __len__(self) -> int:
        return len(self.snapshot)

    def refresh(self) -> bool:
        """Move to the newest generation, if there is a newer one; whether it moved.

        Costs one look at the manifest's date while nothing has changed. Searches under way finish on the old
        generation.

        Raises:
            VlmError: the folder is gone or damaged; the old generation stays open.
        """
        with self._refresh_lock:
            stamp = _stamp(self.folder)
            if stamp == self._stamp:
                return False
            newest = open_snapshot(self.folder, before=self.snapshot)
            _copy_to_gpu(newest, self._gpu)
            moved = newest.manifest != self.manifest
            self.snapshot, self._stamp = newest, stamp
            return moved

    def close(self) -> None:
        """Release the catalogue."""
        self.catalogue.close()

    def require_model(self, fingerprint: str, name: str) -> None:
        """Refuse a model whose vectors do not belong to this index.

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
            f"(fingerprint {fingerprint}), and their vectors cannot be compared. Ask with {space.model}, or embed and "
            f"index again with {name}."
        )

    def search(self, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSet | None = None) -> list[list[Hit]]:
        """The `top` rows nearest to each query, best first. Fewer only if there are fewer rows.

        Ties are ordered by row; which of several equal rows at the cut are among the `top` is up to FAISS.

        among: only these rows may answer (as `Catalogue.where` gives them); dead ones never do.

        Raises:
            UsageError: another dimension, a query that is zero or not finite, or top < 1.
        """
        snapshot = self.snapshot
        scores, rows = _nearest(snapshot, queries, top, allowed_rows)
        wanted = np.unique(rows)
        entries = dict(zip(wanted.tolist(), snapshot.catalogue.entries(wanted.tolist()), strict=True))
        return [
            [Hit(score=score, entry=entries[row]) for score, row in zip(*line, strict=True)]
            for line in zip(scores.tolist(), rows.tolist(), strict=True)
        ]

    def nearest(self, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSet | None = None) -> ScoredRows:
        """As `search`, but scores and rows alone, without a look into the catalogue."""
        return _nearest(self.snapshot, queries, top, allowed_rows)

    def info(self) -> IndexInfo:
        """What manifest and segments say, in one place."""
        space, manifest, details = self.details.space, self.manifest, self.details
        segments = tuple(_segment_info(view, manifest) for view in self.snapshot.views)
        largest = max(segments, key=lambda segment: segment.rows, default=None)
        in_files = sum(record.bytes for record in manifest.files.values())
        return IndexInfo(
            folder=str(self.folder),
            kind=largest.kind if largest else details.kind,
            parameters=largest.parameters if largest else {},
            rows=len(self),
            dead=manifest.counts["dead"],
            fresh=len(self) - (largest.rows if largest else 0),
            dimension=space.dimension,
            modality=space.modality,
            metric=details.metric,
            bytes=in_files + self.catalogue.path.stat().st_size,
            generation=manifest.generation,
            model=space.model,
            model_fingerprint=space.fingerprint,
            embeddings_fingerprint=manifest.inputs["embeddings"],
            num_shards=len(details.shards),
            made_by=manifest.made_by,
            made_at=manifest.made_at,
            segments=segments,
            evidence=details.evidence,
        )


def _copy_to_gpu(snapshot: IndexSnapshot, gpu: CopyToGpu | None) -> list[str]:
    """Have the GPU, if there is one, answer for the segments it can; why it cannot for the others."""
    if gpu is None:
        return []
    tried = {one.segment.meta.number: one.segment.copy_to_gpu(gpu) for one in snapshot.views}
    return [f"Segment {number} is searched on the CPU: {reason}." for number, reason in tried.items() if reason]


def _nearest(
    snapshot: IndexSnapshot, queries: Float[Array, "Q D"], top: int, allowed_rows: RowSet | None
) -> ScoredRows:
    units = _normalize_queries(queries, top, snapshot.details.space.dimension)
    if allowed_rows is not None and not (np.diff(allowed_rows) > 0).all():
        raise UsageError("The rows to search among must rise, each given once, as Catalogue.where gives them.")
    return nearest(snapshot.views, units, top, allowed_rows)


def _normalize_queries(queries: Float[Array, "Q D"], top: int, dimension: int) -> Float32[Array, "Q D"]:
    if top < 1:
        raise UsageError(f"top = {top} does not fit: at least one answer must be asked for.")
    if queries.shape[1] != dimension:
        raise UsageError(f"Queries have {queries.shape[1]} dimensions, the rows of this index {dimension}.")
    wide = queries.astype(np.float32, copy=False)
    squares = np.vecdot(wide, wide)
    each = squares.tolist()
    # of few numbers, which is the rule, Python is quicker than numpy
    if all([-_ROUNDING < square - 1 < _ROUNDING for square in each]):
        return wide
    # not so of NaN
    if not all([0 < square < inf for square in each]):
        wrong = int(np.argmin((squares > 0) & (squares < np.inf)))
        raise UsageError(f"Query {wrong} has length {np.sqrt(squares[wrong])}: it must be finite and not zero.")
    return wide / np.sqrt(squares)[:, None]


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
        found = os.stat(folder / MANIFEST)
    except OSError:
        return (0, 0, 0, 0)
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
