"""Changes of an index folder: inserts, upserts, deletes, edits, compaction, each one new version, whole or not at all.

The order of a change: files under new names; the catalogue's transaction, whose rows no reader of the old version
sees (edits of rows that stay go to a copy of the catalogue); the manifest, which is the commit; then files that neither
it nor the version before names are removed. Readers continue. If the process is killed in between, the next
writer rolls back what the manifest does not know.

A version is prepared, committed, and rolled back if it was not. A commit keeps the version before: its manifest as
`versions/G.json`, and the files it names, until the next commit. `rollback` brings its rows back as a new version, so
that readers only ever move forward.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vlm import __version__
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write, compute_fingerprint, write_bytes
from vlm.index.ann.index_types import TuningParams, fall_back_to_flat, resolve_index_type, search_params_dict
from vlm.index.catalog import (
    copy_catalogue,
    edited_copy,
    has_uncommitted_changes,
    max_row,
    restore_rows,
    roll_back_catalogue,
    update_catalogue,
)
from vlm.index.catalog_edits import edit_addresses, edit_metadata
from vlm.index.embeddings_folder import Origin
from vlm.index.engine_writer import CommitInfo, EngineWriter, InsertBatch
from vlm.index.index_files import (
    LINK_QUERIES,
    MAPS,
    SEGMENTS,
    TOMBSTONES,
    VERSIONS,
    FailPoint,
    IndexDetails,
    MapRecord,
    catalogue_file,
    map_file,
    no_failpoint,
    read_previous,
    tombstones_file,
    version_file,
)
from vlm.index.reader import IndexSnapshot, open_snapshot
from vlm.index.row_map import write_map
from vlm.index.segments import SegmentReader, SegmentView, WrittenSegment, write_segment
from vlm.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    check_files,
    read_manifest,
    record_file,
    sorted_checksums,
    write_manifest,
)
from vlm.tensor_types import Array, Float, Float32, Int64


def drop_dead_segments(
    segments: Iterable[SegmentReader], dead: Int64[Array, " N"]
) -> tuple[list[SegmentReader], Int64[Array, " M"]]:
    """The segments that hold a live row, and the deleted rows (sorted) that these hold."""
    live_segments = []
    remaining_dead = [np.zeros(0, np.int64)]
    for segment in segments:
        positions = segment.positions_of(dead)
        # one without a live row would only be opened and skipped
        if len(positions) < len(segment):
            live_segments.append(segment)
            remaining_dead.append(segment.rows[positions])
    return live_segments, np.concatenate(remaining_dead)


def roll_back_unfinished(folder: Path, *, failpoint: FailPoint = no_failpoint) -> None:
    """Roll a folder back to its manifest's version; only for the holder of the writer's lock.

    It may be killed and repeated. Readers notice nothing, for no manifest names what is removed.

    Raises:
        VlmError: the catalogue is damaged or the disk is full.
    """
    manifest = read_manifest(folder, "index")
    details = IndexDetails.from_manifest(manifest, folder)
    if has_uncommitted_changes(folder / details.catalogue, generation=manifest.generation):
        failpoint("rolling back the catalogue")
        roll_back_catalogue(folder / details.catalogue, generation=manifest.generation)
    remove_orphans(folder, manifest, details, failpoint=failpoint)


def remove_orphans(
    folder: Path, manifest: Manifest, details: IndexDetails, *, failpoint: FailPoint = no_failpoint
) -> None:
    """Remove the strays; a reader that has one open keeps it."""
    for path in strays(folder, manifest, details):
        failpoint(f"removing {path.name}")
        path.unlink(missing_ok=True)


def discard_previous(folder: Path, manifest: Manifest, details: IndexDetails, *, failpoint: FailPoint) -> None:
    """Remove the version before, which cannot be rolled back to then."""
    failpoint("discarding the version before")
    # first: without it the files are strays, which the next writer removes if this one is killed
    (folder / version_file(manifest.generation - 1)).unlink(missing_ok=True)
    remove_orphans(folder, manifest, details, failpoint=failpoint)


def strays(folder: Path, manifest: Manifest, details: IndexDetails) -> list[Path]:
    """Files that neither the manifest nor the version before names: older ones, and those that were not committed."""
    # SQLite needs the journal of the current catalogue to roll it back
    known = {folder / name for name in (*manifest.files, details.catalogue, f"{details.catalogue}-journal")}
    # a damaged record of the version before cannot be rolled back to, so what it names is of no use
    with suppress(VlmError):
        if previous := read_previous(folder, manifest):
            names = (*previous.files, previous.details["catalogue"], version_file(previous.generation))
            known.update(map(folder.joinpath, names))
    patterns = (
        f"{SEGMENTS}/*",
        f"{TOMBSTONES}/*",
        f"{VERSIONS}/*",
        f"{MAPS}/*",
        "catalogue-*",
        ".manifest.json.*.part",
    )
    matches: set[Path] = set()
    for pattern in patterns:
        matches.update(folder.glob(pattern))
    return sorted(matches - known)


@dataclass(frozen=True, kw_only=True, eq=False)
class PendingVersion:
    """The next version, before its commit.

    manifest: complete but for the record of the tombstones' file. dead: deleted rows its segments hold, sorted.
    """

    manifest: Manifest
    details: IndexDetails
    dead: Int64[Array, " N"]

    @property
    def number(self) -> int:
        """The version's number."""
        return self.manifest.generation


def prepare_version(
    snapshot: IndexSnapshot,
    *,
    what: str,
    keep: int,
    written: WrittenSegment | None,
    deleted_rows: Int64[Array, " N"],
    **details: Any,
) -> PendingVersion:
    """The version after a snapshot.

    Args:
        what: the kind of change, part of the fingerprint.
        keep: how many of the first segments stay; the others were merged into the new one, or are gone.
        written: the new segment, which comes last.
        deleted_rows: rows that this change deletes, sorted.
        details: what else of the index's details changes.
    """
    kept_segments, dead = drop_dead_segments(
        [view.segment for view in snapshot.views[:keep]], np.union1d(snapshot.dead, deleted_rows)
    )
    segments = [segment.meta for segment in kept_segments]
    files: dict[str, FileRecord] = {}
    for segment in segments:
        for name in segment.files:
            files[name] = snapshot.manifest.files[name]
    next_segment = snapshot.details.next_segment
    if written:
        segments.append(written.segment)
        files |= written.files
        next_segment = written.segment.number + 1
    # rows keep their numbers, so the map fits every later version; a row that it lacks is placed when it is read
    if current_map := snapshot.details.map:
        files[current_map.file] = snapshot.manifest.files[current_map.file]
    if LINK_QUERIES in snapshot.manifest.files:
        files[LINK_QUERIES] = snapshot.manifest.files[LINK_QUERIES]

    number = snapshot.number + 1
    # tombstones are rewritten each time: a reader of the old version still has the old file
    changed = replace(
        snapshot.details,
        segments=tuple(segments),
        next_segment=next_segment,
        tombstones=tombstones_file(number) if len(dead) else "",
        **details,
    )
    # the fingerprint chains all changes since the build, so equal fingerprints mean equal contents
    manifest = replace(
        snapshot.manifest,
        fingerprint=compute_fingerprint(snapshot.manifest.fingerprint, what, dead.tobytes(), *sorted_checksums(files)),
        generation=number,
        counts={"rows": sum(segment.rows for segment in segments) - len(dead), "dead": len(dead)},
        files=files,
        details=asdict(changed),
        made_by=f"vlm {__version__}",
        # empty ones are filled in as the manifest is written
        made_at="",
        command="",
    )
    return PendingVersion(manifest=manifest, details=changed, dead=dead)


def with_search_params(pending: PendingVersion, *, effort: int | None, rerank: int) -> PendingVersion:
    """The same with other search parameters of its largest segment, which a compaction will use too."""
    segments = list(pending.details.segments)
    number = max(range(len(segments)), key=lambda number: segments[number].rows)
    # the others came with later changes and are flat, which has no parameters
    largest = segments[number]
    search_params = search_params_dict(largest.kind, effort=effort, rerank=rerank)
    segments[number] = replace(largest, parameters=largest.parameters | search_params, rerank=rerank)
    changed = replace(pending.details, segments=tuple(segments), tuning=pending.details.tuning | search_params)
    return replace(pending, details=changed, manifest=replace(pending.manifest, details=asdict(changed)))


def with_map(pending: PendingVersion, record: MapRecord, file: FileRecord) -> PendingVersion:
    """The same with another map, or its first."""
    files = {name: other for name, other in pending.manifest.files.items() if not name.startswith(f"{MAPS}/")}
    changed = replace(pending.details, map=record)
    manifest = replace(
        pending.manifest,
        fingerprint=compute_fingerprint(pending.manifest.fingerprint, file.sha256),
        files=files | {record.file: file},
        details=asdict(changed),
    )
    return replace(pending, details=changed, manifest=manifest)


def version_to_restore(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of the version before, whose files are checked.

    Raises:
        UsageError: it was not kept. VlmError: it is damaged.
    """
    previous = read_previous(folder, manifest)
    if previous is None:
        why = "nothing has changed since it was built" if manifest.generation == 1 else "its last change kept none"
        raise UsageError(f"{folder} has no version before {manifest.generation} to roll back to: {why}.")
    # before anything changes: a damaged version must not replace one that works
    check_files(folder, previous.files, verify=True, cure="that version cannot be restored")
    if not (folder / previous.details["catalogue"]).is_file():
        raise VlmError(f"{folder / previous.details['catalogue']} is missing; that version cannot be restored.")
    return previous


def restored_version(snapshot: IndexSnapshot, previous: Manifest, *, next_row: int) -> PendingVersion:
    """The version after a snapshot, with the rows of an earlier one; its catalogue is still to be written.

    next_row: a row number that was never used.
    """
    number = snapshot.number + 1
    earlier = IndexDetails.from_manifest(previous, snapshot.folder)
    dead = np.zeros(0, np.int64)
    files = dict(previous.files)
    # under the name of the new version, as each version has its own
    if earlier.tombstones:
        dead = np.load(snapshot.folder / earlier.tombstones, allow_pickle=False)
        del files[earlier.tombstones]
    changed = replace(
        earlier,
        catalogue=catalogue_file(number),
        tombstones=tombstones_file(number) if len(dead) else "",
        next_row=next_row,
        # goes on counting: the version that is undone is kept, and its files lie under their numbers
        next_segment=snapshot.details.next_segment,
    )
    manifest = replace(
        previous,
        fingerprint=compute_fingerprint(snapshot.manifest.fingerprint, "rollback", previous.fingerprint),
        generation=number,
        files=files,
        details=asdict(changed),
        made_by=f"vlm {__version__}",
        made_at="",
        command="",
    )
    return PendingVersion(manifest=manifest, details=changed, dead=dead)


def commit(
    folder: Path,
    pending: PendingVersion,
    update_catalogue: Callable[[], None],
    *,
    keep_previous: bool = True,
    failpoint: FailPoint,
) -> None:
    """Write the tombstones, change the catalogue, and replace the manifest: only the last of these commits.

    keep_previous: keep the version before for a rollback, until the next commit.
    """
    files = dict(pending.manifest.files)
    # an orphan until the manifest names it: a crash before that leaves nothing to undo
    if len(pending.dead):
        path = folder / pending.details.tombstones
        path.parent.mkdir(exist_ok=True)
        failpoint("tombstones")
        with atomic_write(path) as file:
            np.save(file, pending.dead, allow_pickle=False)
            failpoint("tombstones before their rename")
        files[pending.details.tombstones] = record_file(path)
    failpoint("catalogue")
    update_catalogue()
    # a stray until the new manifest is there, because it is not of the version before the present one
    if keep_previous:
        path = folder / version_file(pending.number - 1)
        path.parent.mkdir(exist_ok=True)
        failpoint("record of the version before")
        write_bytes(path, (folder / MANIFEST).read_bytes())
    # from here on the change counts
    failpoint("manifest")
    write_manifest(folder, replace(pending.manifest, files=files))
    failpoint("manifest written")


_ROWS_AT_ONCE = 65_536


def num_segments_to_merge(views: Sequence[SegmentView], new_rows: int) -> int:
    """The compaction policy: how many of the last segments are merged with new rows.

    They are the flat ones, as long as a segment has no more rows than the merged ones behind it. A row is then written
    about log2(N) times, and about log2(N) segments are open at once, as in a binary counter (the log-structured merge
    tree of O'Neil et al. 1996, with a factor of 2).
    """
    num_segments = 0
    merged_rows = new_rows
    for view in reversed(views):
        # one that was trained is merged only by a compaction, which retrains it
        if view.segment.meta.kind != "flat" or view.count > merged_rows:
            break
        num_segments += 1
        merged_rows += view.count
    return num_segments


def iter_live_blocks(view: SegmentView) -> Iterator[Float[Array, "_ D"]]:
    """The rows of a view in their stored float16."""
    for positions in view.position_blocks(_ROWS_AT_ONCE):
        yield view.segment.vectors.stored[positions]


_NO_ROWS = np.zeros(0, np.int64)


class IndexWriter(EngineWriter[IndexSnapshot]):
    """The one writer of an index folder of FAISS, until `close`; new rows become a flat segment.

    Small flat segments before it are merged with it.
    """

    def _check_layout(self, folder: Path) -> None:
        IndexDetails.from_manifest(read_manifest(folder, "index"), folder)

    def _open(self) -> None:
        roll_back_unfinished(self.folder, failpoint=self._failpoint)
        self.snapshot = open_snapshot(self.folder)

    def _roll_back(self) -> None:
        roll_back_unfinished(self.folder, failpoint=self._failpoint)
        self.snapshot = open_snapshot(self.folder, before=self.snapshot)

    def _write_deletion(self, rows: Int64[Array, " N"]) -> None:
        snapshot = self.snapshot
        pending = prepare_version(snapshot, what="delete", keep=len(snapshot.views), written=None, deleted_rows=rows)
        self._commit(pending, lambda: self._change_catalogue(pending, rows))

    def compact(self, *, kind: str = "", tuning: TuningParams | None = None, keep_previous: bool = True) -> CommitInfo:
        """Merge all segments into one, retrain it, and drop deleted rows from it and from the catalogue.

        kind, tuning: as for `build_index`; left out, those the index was built with, or flat where they no longer fit.
        keep_previous: keep the version before for a rollback; without, its files are removed at once.

        Raises:
            UsageError: there is no such index type, or it does not fit the rows.
        """
        started = time.perf_counter()
        snapshot = self.snapshot
        # a compact index is not written again: it would cost a training and give the same
        if not kind and tuning is None and self._is_compact():
            if not keep_previous:
                discard_previous(self.folder, snapshot.manifest, snapshot.details, failpoint=self._failpoint)
            return self._commit_info(started)
        with self._rolling_back_on_error():
            # a new catalogue file, because readers of the old version have the old one open
            used_tuning = tuning or TuningParams(**snapshot.details.tuning)
            written = self._write_compacted(kind, used_tuning) if len(snapshot) else None
            pending = prepare_version(
                snapshot,
                what="compact",
                keep=0,
                written=written,
                deleted_rows=_NO_ROWS,
                kind=kind or snapshot.details.kind,
                tuning=asdict(tuning) if tuning else snapshot.details.tuning,
                catalogue=catalogue_file(snapshot.number + 1),
                next_row=self._next_row(),
            )
            self._commit(pending, lambda: self._rewrite_catalogue(pending), keep_previous=keep_previous)
        return self._commit_info(started)

    def set_metadata(self, changes: Mapping[int, Mapping[str, Any]]) -> CommitInfo:
        """As of `EngineWriter.set_metadata`."""
        # only what differs: setting the same again makes no version
        edits = self._metadata_edits(changes)
        return self._edit("set", len(edits), lambda database: edit_metadata(database, edits))

    def relocate(self, addresses: Mapping[str, str]) -> CommitInfo:
        """Say where shards or image files lie now; where nothing of the index moves, nothing changes.

        addresses: the new one by the old one; those that no row has are ignored.
        """
        # the details may name shards of which no row is left, and rows may be image files, which no list names
        present = {*self.snapshot.details.shards, *self.snapshot.catalogue.addresses()}
        moved = {old: new for old, new in addresses.items() if old != new and old in present}
        shards = tuple(dict.fromkeys(moved.get(shard, shard) for shard in self.snapshot.details.shards))
        return self._edit("relocate", len(moved), lambda database: edit_addresses(database, moved), shards=shards)

    def rollback(self) -> CommitInfo:
        """Bring the rows of the version before back, as a new version; rolled back twice, the last change is redone.

        The version before is kept until the next change, but not by a compaction that was told so.

        Raises:
            UsageError: there is none. VlmError: its files are damaged.
        """
        started = time.perf_counter()
        previous = version_to_restore(self.folder, self.snapshot.manifest)
        with self._rolling_back_on_error():
            # forward, not back: readers only ever look for a higher number
            pending = restored_version(self.snapshot, previous, next_row=self._next_row())
            source = self.folder / previous.details["catalogue"]

            def write_catalogue() -> None:
                path = self.folder / pending.details.catalogue
                with edited_copy(source, path, generation=pending.number) as database:
                    restore_rows(database, generation=previous.generation)

            self._commit(pending, write_catalogue)
        return self._commit_info(started)

    def _edit(self, what: str, size: int, edit: Callable[[sqlite3.Connection], int], **details: Any) -> CommitInfo:
        """A version with the same segments and an edited catalogue, in a new file for the sake of open readers.

        size: of the edit; one of nothing changes nothing. edit: gives the number of changed rows. details: as of
        `prepare_version`.
        """
        started = time.perf_counter()
        snapshot = self.snapshot
        num_edited = 0
        if size:
            with self._rolling_back_on_error():
                pending = prepare_version(
                    snapshot,
                    what=what,
                    keep=len(snapshot.views),
                    written=None,
                    deleted_rows=_NO_ROWS,
                    catalogue=catalogue_file(snapshot.number + 1),
                    **details,
                )

                def write_catalogue() -> None:
                    nonlocal num_edited
                    path = self.folder / pending.details.catalogue
                    with edited_copy(snapshot.catalogue.path, path, generation=pending.number) as database:
                        num_edited = edit(database)
                        self._failpoint(f"{pending.details.catalogue} before its commit")

                self._commit(pending, write_catalogue)
        return self._commit_info(started, edited=num_edited)

    def set_map(self, rows: Int64[Array, " N"], places: Float32[Array, "N 2"], record: MapRecord) -> CommitInfo:
        """Give rows (ascending) their places on a map; a map of before is kept for a rollback.

        record: its file and its number of rows are filled in.
        """
        started = time.perf_counter()
        snapshot = self.snapshot
        with self._rolling_back_on_error():
            pending = prepare_version(
                snapshot, what="map", keep=len(snapshot.views), written=None, deleted_rows=_NO_ROWS
            )
            record = replace(record, file=map_file(pending.number), rows=len(rows))
            self._failpoint("map")
            file = write_map(self.folder / record.file, rows, places)
            pending = with_map(pending, record, file)
            self._commit(pending, lambda: self._change_catalogue(pending, _NO_ROWS))
        return self._commit_info(started)

    def set_search_params(self, *, effort: int | None, rerank: int) -> CommitInfo:
        """Search the largest segment with another effort (nprobe, efSearch) and reranking factor from now on."""
        started = time.perf_counter()
        snapshot = self.snapshot
        with self._rolling_back_on_error():
            pending = prepare_version(
                snapshot, what="search", keep=len(snapshot.views), written=None, deleted_rows=_NO_ROWS
            )
            pending = with_search_params(pending, effort=effort, rerank=rerank)
            self._commit(pending, lambda: self._change_catalogue(pending, _NO_ROWS))
        return self._commit_info(started)

    def _is_compact(self) -> bool:
        """Whether there is at most one segment, of the index's type, and no deleted row in it or the catalogue."""
        snapshot = self.snapshot
        if len(snapshot.views) > 1 or len(snapshot.dead) or snapshot.catalogue.count_hidden():
            return False
        kind = resolve_index_type(snapshot.details.kind, len(snapshot))
        return all(view.segment.meta.kind == kind for view in snapshot.views)

    def _next_row(self) -> int:
        """A row number that was never used, not even by a change that was rolled back."""
        # a change that was killed may have left rows in the catalogue, which are hidden and not yet gone
        return max(self.snapshot.details.next_row, max_row(self.snapshot.catalogue.path) + 1)

    def _write_batch(
        self,
        batch: InsertBatch,
        deleted_rows: Int64[Array, " N"],
        *,
        what: str,
        shards: tuple[str, ...],
        sources: tuple[str, ...],
    ) -> None:
        snapshot = self.snapshot
        # numbers are never used twice, so that a reader of an old version cannot mistake one row for another
        first = self._next_row()
        keep = len(snapshot.views) - num_segments_to_merge(snapshot.views, batch.count)
        written = self._write_merged(batch, keep, deleted_rows, first)
        pending = prepare_version(
            snapshot,
            what=what,
            keep=keep,
            written=written,
            deleted_rows=deleted_rows,
            next_row=first + batch.count,
            shards=shards,
            sources=sources,
        )
        self._commit(pending, lambda: self._change_catalogue(pending, deleted_rows, enumerate(batch.origins(), first)))

    def _write_merged(
        self, batch: InsertBatch, keep: int, deleted_rows: Int64[Array, " N"], first: int
    ) -> WrittenSegment:
        """The segment of new rows, merged with the live rows of the segments from `keep` on."""
        merged = [view.excluding(deleted_rows) for view in self.snapshot.views[keep:]]
        new_rows = np.arange(first, first + batch.count)
        rows = np.concatenate([*(view.rows() for view in merged), new_rows])
        blocks = chain(*map(iter_live_blocks, merged), batch.blocks())
        return self._write_segment(blocks, rows, "flat", TuningParams())

    def _write_compacted(self, kind: str, tuning: TuningParams) -> WrittenSegment:
        """The segment of all live rows. kind: the type asked for; empty: the index's, or flat if that does not fit."""
        snapshot = self.snapshot

        def write(kind: str, tuning: TuningParams) -> WrittenSegment:
            blocks = chain(*map(iter_live_blocks, snapshot.views))
            return self._write_segment(blocks, snapshot.rows, kind, tuning, snapshot.link_queries())

        if kind:
            return write(resolve_index_type(kind, len(snapshot)), tuning)
        return fall_back_to_flat(write, snapshot.details.kind, len(snapshot), tuning)

    def _write_segment(
        self,
        blocks: Iterable[Float[Array, "_ D"]],
        rows: Int64[Array, " N"],
        kind: str,
        tuning: TuningParams,
        link_queries: Float[Array, "Q D"] | None = None,
    ) -> WrittenSegment:
        details = self.snapshot.details
        return write_segment(
            self.folder,
            details.next_segment,
            blocks,
            rows,
            dimension=details.space.dimension,
            kind=kind,
            tuning=tuning,
            link_queries=link_queries,
            failpoint=self._failpoint,
        )

    def _change_catalogue(
        self, pending: PendingVersion, deleted_rows: Int64[Array, " N"], inserted: Iterable[tuple[int, Origin]] = ()
    ) -> None:
        path = self.folder / pending.details.catalogue
        update_catalogue(
            path, generation=pending.number, inserted=inserted, deleted=deleted_rows, failpoint=self._failpoint
        )

    def _rewrite_catalogue(self, pending: PendingVersion) -> None:
        path = self.folder / pending.details.catalogue
        snapshot = self.snapshot
        copy_catalogue(snapshot.catalogue.path, path, snapshot.rows, seen=snapshot.number, generation=pending.number)

    def _commit(self, pending: PendingVersion, change: Callable[[], None], *, keep_previous: bool = True) -> None:
        commit(self.folder, pending, change, keep_previous=keep_previous, failpoint=self._failpoint)
        self.snapshot = open_snapshot(self.folder, before=self.snapshot)
        # readers of the old version keep what they have open
        remove_orphans(self.folder, self.snapshot.manifest, self.snapshot.details, failpoint=self._failpoint)

    def _num_segments(self) -> int:
        return len(self.snapshot.views)
