"""An index open for reading: a snapshot of one version of its folder, searched with unit vectors.

Every change of an index makes a new version, whose manifest replaces the one before. An `IndexSnapshot` is what one
manifest names: segments with their live rows, and the catalogue. It stays valid while later changes remove files,
because it has them open. An `Index` holds a snapshot, answers queries from it, and moves to the newest on `refresh`.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm.errors import VlmError
from vlm.index.ann.faiss_search import CopyToGpu
from vlm.index.ann.index_types import resolve_index_type
from vlm.index.catalog import Catalogue
from vlm.index.embeddings_folder import Origin
from vlm.index.engine_base import (
    EngineIndex,
    EngineSnapshot,
    FilteredRows,
    IndexInfo,
    RowSelection,
    ScoredRows,
    SegmentInfo,
    manifest_stamp,
)
from vlm.index.index_files import REBUILD_HINT, IndexDetails, Segment, open_array, read_link_queries, read_previous
from vlm.index.segments import SegmentReader, SegmentView, nearest
from vlm.manifest import FileRecord, Manifest, check_files, read_manifest
from vlm.tensor_types import Array, Float16, Float32, Int64

logger = logging.getLogger(__name__)


# how often a folder may change between reading its manifest and opening its files before that counts as a fault
_MAX_TRIES = 100

_ENTRIES_AT_ONCE = 10_000

_Identity = tuple[str, tuple[tuple[str, FileRecord], ...]]
"""Of a segment: its metadata, and its files with their checksums."""


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexSnapshot(EngineSnapshot):
    """One version of an index; later changes and removed files do not affect it.

    views: the segments with their live positions. dead: deleted rows that segments still hold, sorted.
    """

    folder: Path
    manifest: Manifest
    details: IndexDetails
    catalogue: Catalogue
    views: tuple[SegmentView, ...]
    dead: Int64[Array, " N"]

    def link_queries(self) -> Float16[Array, "Q D"] | None:
        """The queries whose answers its graph links (`index_files.read_link_queries`)."""
        return read_link_queries(self.folder, self.manifest, self.details.space.dimension)

    def _list_rows(self) -> Int64[Array, " N"]:
        # those of a single segment are mapped, unless some of them are deleted
        if len(self.views) == 1:
            return self.views[0].rows()
        return np.concatenate([np.zeros(0, np.int64), *(view.rows() for view in self.views)])

    def live(self, rows: Int64[Array, " N"]) -> Int64[Array, " M"]:
        """As of `EngineSnapshot`, without a list of all rows."""
        distinct = np.unique(rows)
        return np.concatenate([np.zeros(0, np.int64), *(view.those_of(distinct) for view in self.views)])

    def nearest(self, queries: Float32[Array, "Q D"], top: int, allowed_rows: RowSelection | None = None) -> ScoredRows:
        """As of `vlm.index.segments.nearest`."""
        assert not isinstance(allowed_rows, FilteredRows)
        return nearest(self.views, queries, top, allowed_rows)

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
    if not num_live == snapshot.catalogue.recorded_count() == len(snapshot):
        check_counts(snapshot)
    return snapshot


def check_counts(snapshot: IndexSnapshot) -> None:
    """Compare the numbers of rows in segments, catalogue and manifest; the catalogue's are counted.

    Raises:
        VlmError: they differ.
    """
    num_live = sum(view.count for view in snapshot.views)
    num_listed = len(snapshot.catalogue)
    if not num_live == num_listed == len(snapshot):
        raise VlmError(
            f"{snapshot.folder} is inconsistent: {num_live:,} live rows in its segments and {num_listed:,} in "
            f"{snapshot.details.catalogue}, {len(snapshot):,} were written; {REBUILD_HINT}."
        )


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


class Index(EngineIndex[IndexSnapshot]):
    """An index folder of FAISS open for reading: one version of it, until `refresh` moves to the newest."""

    def __init__(self, snapshot: IndexSnapshot, stamp: tuple[int, ...], gpu: CopyToGpu | None = None) -> None:
        super().__init__(snapshot, stamp)
        self._gpu = gpu

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
        stamp = manifest_stamp(folder)
        snapshot = open_snapshot(folder)
        for message in _copy_to_gpu(snapshot, gpu):
            logger.info(message)
        return cls(snapshot, stamp, gpu)

    @property
    def details(self) -> IndexDetails:
        """The manifest's details, typed."""
        return self.snapshot.details

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue of this version."""
        return self.snapshot.catalogue

    def _open_newest(self) -> None:
        newest = open_snapshot(self.folder, before=self.snapshot)
        _copy_to_gpu(newest, self._gpu)
        self.snapshot = newest

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
