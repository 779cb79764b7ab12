"""Changes of an index folder: inserts, upserts, deletes, edits, compaction, each one new version, whole or not at all.

The order of a change: files under new names; the catalogue's transaction, whose rows no reader of the old version
sees (edits of rows that stay go to a copy of the catalogue); the manifest, which is the commit; then files that neither
it nor the version before names are removed. Readers continue. If the process is killed in between, the next
writer rolls back what the manifest does not know.

Only one writer at a time: it holds a lock on a file of the folder, which the system frees when the process ends.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, compress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from vlm.errors import IndexBusy, UsageError, VlmError
from vlm.index.ann.index_type_base import TuningParams
from vlm.index.ann.index_types import fall_back_to_flat, resolve_index_type
from vlm.index.catalog import copy_catalogue, edited_copy, max_row, restore_rows, update_catalogue
from vlm.index.catalog_edits import edit_addresses, edit_metadata, metadata_edits
from vlm.index.embeddings_folder import Embeddings, EmbeddingSpace, Origin
from vlm.index.engine_base import EngineSnapshot
from vlm.index.ids import with_uid_of
from vlm.index.index_files import FailPoint, IndexDetails, MapRecord, catalogue_file, map_file, no_failpoint
from vlm.index.reader import open_snapshot
from vlm.index.row_map import write_map
from vlm.index.segments import SegmentView, WrittenSegment, iter_stored_blocks, write_segment
from vlm.index.versions import (
    PendingVersion,
    commit,
    discard_previous,
    prepare_version,
    remove_orphans,
    restored_version,
    roll_back_unfinished,
    version_to_restore,
    with_map,
    with_search_params,
)
from vlm.manifest import read_manifest
from vlm.results import Result
from vlm.tensor_types import Array, Bool, Float, Float32, Int64


@dataclass(frozen=True, kw_only=True)
class InsertBatch:
    """Rows to insert: as many vectors as origins, in the same order; both can be iterated several times.

    source: fingerprint of where they are from. shards: addresses of their tars.
    """

    space: EmbeddingSpace
    count: int
    source: str
    shards: tuple[str, ...]
    blocks: Callable[[], Iterable[Float[Array, "_ D"]]]
    origins: Callable[[], Iterable[Origin]]

    @classmethod
    def from_folder(cls, folder: Path, *, uid_column: str = "") -> "InsertBatch":
        """The rows of a finished embeddings folder, whose checksums are verified.

        uid_column: metadata that gives rows their uids (`ids.with_uid_of`).

        Raises:
            UsageError: it is unfinished or of another kind.
            VlmError: it is damaged.
        """
        source = Embeddings.open(folder, verify=True)
        return cls(
            space=source.space,
            count=len(source),
            source=source.manifest.fingerprint,
            shards=tuple(source.manifest.details["shards"]),
            blocks=lambda: iter_stored_blocks(source),
            origins=lambda: (with_uid_of(origin, uid_column) for origin in source.origins()),
        )

    def uids(self) -> Iterator[str]:
        """The uid of each row.

        Raises:
            VlmError: two rows have the same.
        """
        seen: set[str] = set()
        for origin in self.origins():
            if origin.uid in seen:
                raise VlmError(f"Two of the new rows have the same uid {origin.uid!r}; embed again with distinct keys.")
            seen.add(origin.uid)
            yield origin.uid

    def select(self, uids: Container[str]) -> "InsertBatch":
        """The rows of these uids."""
        is_selected = np.fromiter((origin.uid in uids for origin in self.origins()), bool, self.count)
        return replace(
            self,
            count=int(is_selected.sum()),
            blocks=lambda: _filter_blocks(self.blocks(), is_selected),
            origins=lambda: compress(self.origins(), is_selected),
        )

    def check_compatible_space(self, space: EmbeddingSpace, folder: Path) -> None:
        """Refuse rows that cannot be compared with those of an index.

        Raises:
            UsageError: they are of another model, modality or dimension.
        """
        if self.space.fingerprint != space.fingerprint:
            raise UsageError(
                f"{folder} was embedded by {space.model} (fingerprint {space.fingerprint}), the new rows by "
                f"{self.space.model} (fingerprint {self.space.fingerprint}), and their vectors cannot be compared. "
                f"Embed the new shards with {space.model}."
            )
        if (self.space.modality, self.space.dimension) != (space.modality, space.dimension):
            raise UsageError(
                f"{folder} holds {space.modality} embeddings of {space.dimension} dimensions, the new rows are "
                f"{self.space.modality} embeddings of {self.space.dimension}; make an index of their own of them."
            )


def _filter_blocks(
    blocks: Iterable[Float[Array, "_ D"]], is_selected: Bool[Array, " N"]
) -> Iterator[Float[Array, "_ D"]]:
    # the mask is over all rows, a block over some of them
    first = 0
    for block in blocks:
        yield block[is_selected[first : first + len(block)]]
        first += len(block)


@dataclass(frozen=True, kw_only=True)
class CommitInfo(Result):
    """What a change did: the version it made, and how many rows there are now.

    added: new rows. replaced: new rows whose uid existed. removed: deleted rows.
    edited: rows whose metadata or image address changed.
    left_out: rows of an update that was limited by a filter, whose uid no selected row has.
    dead: deleted rows that segments hold until `compact`.
    """

    generation: int
    rows: int
    segments: int
    dead: int
    added: int = 0
    replaced: int = 0
    removed: int = 0
    edited: int = 0
    left_out: int = 0
    seconds: float = 0.0


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
    for first in range(0, view.count, _ROWS_AT_ONCE):
        yield view.segment.vectors.stored[view.positions[first : first + _ROWS_AT_ONCE]]


LOCK = "writer.lock"


def lock_for_writing(folder: Path) -> FileLock:
    """The writer's lock, held; its file names the process that holds it, and stays when it is released.

    Raises:
        IndexBusy: another writer holds it.
    """
    path = folder / LOCK
    # any thread may close the writer
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        owner = path.read_text(encoding="utf-8", errors="replace").strip()
        raise IndexBusy(
            f"{folder} is being changed by another process ({owner or 'unknown'}); wait until it has finished, or end "
            "it: its unfinished change is then rolled back."
        ) from error
    # for that message only: the lock is the system's, so the number of a process that is gone does no harm
    path.write_text(f"{os.getpid()}\n", encoding="utf-8")
    return lock


_NO_ROWS = np.zeros(0, np.int64)


def rows_to_delete(snapshot: EngineSnapshot, uids: Sequence[str]) -> Int64[Array, " N"]:
    """The rows of these uids, ascending.

    Raises:
        UsageError: one of them does not exist.
    """
    rows = snapshot.catalogue.rows_by_uid(uids)
    unknown = [uid for uid in uids if uid not in rows]
    if unknown:
        raise UsageError(
            f"{snapshot.folder} has no {unknown[0]!r} ({len(unknown):,} of {len(uids):,} uids are missing); nothing "
            "was deleted: leave them out."
        )
    # unique, because a uid may be named twice
    return np.unique(np.array(list(rows.values()), np.int64))


class IndexWriter:
    """The one writer of an index folder, until `close`; it first rolls back what an earlier one left unfinished.

    failpoint: called before each step that changes the folder.

    Raises:
        UsageError: there is another writer, or no index of this layout.
        VlmError: the index is damaged.
    """

    def __init__(self, folder: Path, *, failpoint: FailPoint = no_failpoint) -> None:
        # refuse what is not an index before a lock file appears in it
        IndexDetails.from_manifest(read_manifest(folder, "index"), folder)
        self.folder = folder
        self._failpoint = failpoint
        self._needs_rollback = False
        self._lock = lock_for_writing(folder)
        try:
            roll_back_unfinished(folder, failpoint=failpoint)
            self.snapshot = open_snapshot(folder)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock and the files."""
        self.snapshot.catalogue.close()
        self._lock.release()

    def describe(self) -> CommitInfo:
        """The present version, as a change that did nothing."""
        return self._commit_info(time.perf_counter())

    def add(self, batch: InsertBatch) -> CommitInfo:
        """Insert new rows as a flat segment; small flat ones before it are merged with it.

        Raises:
            UsageError: they are of another model, or a uid exists already.
            VlmError: two of them have the same uid, or a vector is not of unit length.
        """
        return self._insert(batch, is_upsert=False)

    def update(self, batch: InsertBatch, *, allowed_rows: Int64[Array, " N"] | None = None) -> CommitInfo:
        """As `add`, but a row whose uid exists replaces the one that has it (upsert).

        allowed_rows: only these rows (as from `Catalogue.where`) are replaced; new rows of other uids are left out.
        """
        return self._insert(batch, is_upsert=True, allowed_rows=allowed_rows)

    def delete(self, uids: Sequence[str]) -> CommitInfo:
        """Delete the rows of these uids.

        Raises:
            UsageError: one of them does not exist; nothing is deleted.
        """
        return self.delete_rows(rows_to_delete(self.snapshot, uids))

    def delete_rows(self, rows: Int64[Array, " N"]) -> CommitInfo:
        """Delete the live ones of these rows (sorted, as from `Catalogue.where`); without any, nothing changes."""
        started = time.perf_counter()
        snapshot = self.snapshot
        deleted_rows = np.intersect1d(rows, snapshot.rows, assume_unique=True)
        if len(deleted_rows):
            with self._rolling_back_on_error():
                pending = prepare_version(
                    snapshot, what="delete", keep=len(snapshot.views), written=None, deleted_rows=deleted_rows
                )
                self._commit(pending, lambda: self._change_catalogue(pending, deleted_rows))
        return self._commit_info(started, removed=len(deleted_rows))

    def compact(self, *, kind: str = "", tuning: TuningParams | None = None, keep_previous: bool = True) -> CommitInfo:
        """Merge all segments into one, retrain it, and drop deleted rows from it and from the catalogue.

        kind, tuning: as for `build_index`; left out, those the index was built with, or flat where they no longer fit.
        keep_previous: keep the version before for a rollback; without, its files are removed at once.

        Raises:
            UsageError: there is no such index type, or it does not fit the rows.
        """
        started = time.perf_counter()
        snapshot = self.snapshot
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
        """Change metadata of rows, whose vectors stay; where all rows have these values already, nothing changes.

        changes: by row the new values by name; a value of None removes the name, and other names stay.
        """
        rows = list(changes)
        edits: dict[int, Mapping[str, Any]] = {}
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            entries = self.snapshot.catalogue.entries(rows[first : first + _ROWS_AT_ONCE])
            edits |= metadata_edits(entries, changes)
        return self._edit("set", len(edits), lambda database: edit_metadata(database, edits))

    def relocate(self, addresses: Mapping[str, str]) -> CommitInfo:
        """Say where shards or image files lie now; where nothing of the index moves, nothing changes.

        addresses: the new one by the old one; those that no row has are ignored.
        """
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
            pending = restored_version(self.snapshot, previous, next_row=self._next_row())
            source = self.folder / previous.details["catalogue"]

            def write_catalogue() -> None:
                with edited_copy(source, self.folder / pending.details.catalogue) as database:
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
                    with edited_copy(snapshot.catalogue.path, self.folder / pending.details.catalogue) as database:
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
        return max(self.snapshot.details.next_row, max_row(self.snapshot.catalogue.path) + 1)

    def _insert(
        self, batch: InsertBatch, *, is_upsert: bool, allowed_rows: Int64[Array, " N"] | None = None
    ) -> CommitInfo:
        started = time.perf_counter()
        snapshot = self.snapshot
        num_given = batch.count
        batch.check_compatible_space(snapshot.details.space, self.folder)
        # all refusals come before anything is written
        existing = snapshot.catalogue.rows_by_uid(batch.uids())
        if allowed_rows is not None:
            allowed = set(allowed_rows.tolist())
            existing = {uid: row for uid, row in existing.items() if row in allowed}
            batch = batch.select(existing)
        if existing and not is_upsert:
            raise UsageError(
                f"{self.folder} has {next(iter(existing))!r} already ({len(existing):,} of the {batch.count:,} new "
                "rows exist); nothing was added: vlm index update replaces them."
            )
        if not batch.count:
            return self._commit_info(started, left_out=num_given)

        deleted_rows = np.sort(np.array(list(existing.values()), np.int64))
        with self._rolling_back_on_error():
            # an upsert deletes the old row and inserts a new one: row numbers are never used again
            first = self._next_row()
            keep = len(snapshot.views) - num_segments_to_merge(snapshot.views, batch.count)
            written = self._write_merged(batch, keep, deleted_rows, first)
            pending = prepare_version(
                snapshot,
                what="update" if is_upsert else "add",
                keep=keep,
                written=written,
                deleted_rows=deleted_rows,
                next_row=first + batch.count,
                # without repeats, in the order of their first insert
                shards=tuple(dict.fromkeys((*snapshot.details.shards, *batch.shards))),
                sources=tuple(dict.fromkeys((*snapshot.details.sources, batch.source))),
            )
            self._commit(
                pending, lambda: self._change_catalogue(pending, deleted_rows, enumerate(batch.origins(), first))
            )
        return self._commit_info(
            started,
            added=batch.count - len(existing),
            replaced=len(existing),
            left_out=num_given - batch.count,
        )

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
            return self._write_segment(blocks, snapshot.rows, kind, tuning)

        if kind:
            return write(resolve_index_type(kind, len(snapshot)), tuning)
        return fall_back_to_flat(write, snapshot.details.kind, len(snapshot), tuning)

    def _write_segment(
        self, blocks: Iterable[Float[Array, "_ D"]], rows: Int64[Array, " N"], kind: str, tuning: TuningParams
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

    @contextlib.contextmanager
    def _rolling_back_on_error(self) -> Iterator[None]:
        """If the block fails, its change is rolled back: at once or, if that fails too, before the next change."""
        if self._needs_rollback:
            self._roll_back()
        try:
            yield
        except BaseException:  # a keyboard interrupt too
            # set first: rolling back may fail for the same reason, as on a full disk
            self._needs_rollback = True
            with contextlib.suppress(Exception):
                self._roll_back()
            raise

    def _roll_back(self) -> None:
        roll_back_unfinished(self.folder, failpoint=self._failpoint)
        self.snapshot = open_snapshot(self.folder, before=self.snapshot)
        self._needs_rollback = False

    def _commit_info(
        self, started: float, *, added: int = 0, replaced: int = 0, removed: int = 0, edited: int = 0, left_out: int = 0
    ) -> CommitInfo:
        snapshot = self.snapshot
        return CommitInfo(
            generation=snapshot.number,
            rows=len(snapshot),
            segments=len(snapshot.views),
            dead=len(snapshot.dead),
            added=added,
            replaced=replaced,
            removed=removed,
            edited=edited,
            left_out=left_out,
            seconds=time.perf_counter() - started,
        )
