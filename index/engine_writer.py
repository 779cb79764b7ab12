"""What the writers of both engines share: the rows to insert, the report of a change, the lock, and the changes alike.

Only one writer at a time: it holds a lock on a file of the folder, which the system frees when the process ends.
"""

import contextlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from vlm.errors import IndexBusy, UsageError, VlmError
from vlm.index.catalog_edits import metadata_edits
from vlm.index.embeddings_folder import Embeddings, EmbeddingSpace, Origin
from vlm.index.engine_base import EngineSnapshot, RowSelection, SnapshotT, row_numbers
from vlm.index.ids import with_uid_of
from vlm.index.index_files import FailPoint, MapRecord, no_failpoint
from vlm.index.segments import iter_stored_blocks
from vlm.results import Result
from vlm.tensor_types import Array, Bool, Float, Float32, Int64

logger = logging.getLogger(__name__)

_ENTRIES_AT_ONCE = 10_000

_Writer = TypeVar("_Writer")


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
        # within the batch: the catalogue knows only what is in the index already
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
            # blocks and origins are read again each time, as a batch may not fit into memory
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
    segments: of FAISS; Milvus keeps its own. dead: deleted rows that are held until `compact`.
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


class EngineWriter(ABC, Generic[SnapshotT]):
    """The one writer of an index folder, until `close`; each change is one new version, whole or not at all.

    It first rolls back what an earlier one left unfinished.

    snapshot: the version that is changed next. failpoint: called before each step that changes anything.

    Raises:
        UsageError: there is another writer, or no index of this layout and engine.
        VlmError: the index is damaged, or its server does not answer.
    """

    snapshot: SnapshotT

    def __init__(self, folder: Path, *, failpoint: FailPoint = no_failpoint) -> None:
        # refuse what is not an index before a lock file appears in it
        self._check_layout(folder)
        self.folder = folder
        self._failpoint = failpoint
        self._needs_rollback = False
        self._lock = lock_for_writing(folder)
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    @abstractmethod
    def _check_layout(self, folder: Path) -> None:
        """Refuse a folder whose manifest is not of this engine and layout."""

    @abstractmethod
    def _open(self) -> None:
        """Roll back what an earlier writer left unfinished, and set `snapshot`; called once, under the lock."""

    @abstractmethod
    def _roll_back(self) -> None:
        """Roll back what the manifest does not know, and open its version again; may be interrupted and repeated."""

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock, and what the catalogue has open."""
        self.snapshot.catalogue.close()
        self._lock.release()

    def describe(self) -> CommitInfo:
        """The present version, as a change that did nothing."""
        return self._commit_info(time.perf_counter())

    def add(self, batch: InsertBatch) -> CommitInfo:
        """Insert new rows.

        Raises:
            UsageError: they are of another model, a uid exists already, or the engine does not take their metadata.
            VlmError: two of them have the same uid, or a vector is not of unit length.
        """
        return self._insert(batch, is_upsert=False)

    def update(self, batch: InsertBatch, *, allowed_rows: RowSelection | None = None) -> CommitInfo:
        """As `add`, but a row whose uid exists replaces the one that has it (upsert).

        allowed_rows: only these rows (as from `EngineCatalogue.where`) are replaced; rows of other uids are left out.
        """
        return self._insert(batch, is_upsert=True, allowed_rows=allowed_rows)

    def _insert(self, batch: InsertBatch, *, is_upsert: bool, allowed_rows: RowSelection | None = None) -> CommitInfo:
        started = time.perf_counter()
        details = self.snapshot.details
        num_given = batch.count
        batch.check_compatible_space(details.space, self.folder)
        # all refusals come before anything is written
        existing = self.snapshot.catalogue.rows_by_uid(batch.uids())
        if allowed_rows is not None:
            allowed = set(row_numbers(allowed_rows).tolist())
            existing = {uid: row for uid, row in existing.items() if row in allowed}
            # an update limited by a filter replaces rows and inserts none
            batch = batch.select(existing)
        if existing and not is_upsert:
            raise UsageError(
                f"{self.folder} has {next(iter(existing))!r} already ({len(existing):,} of the {batch.count:,} new "
                "rows exist); nothing was added: vlm index update replaces them."
            )
        if not batch.count:
            return self._commit_info(started, left_out=num_given)
        with self._rolling_back_on_error():
            self._write_batch(
                batch,
                # an upsert deletes the old row and inserts a new one: row numbers are never used again
                np.sort(np.array(list(existing.values()), np.int64)),
                what="update" if is_upsert else "add",
                # without repeats, in the order of their first insert
                shards=tuple(dict.fromkeys((*details.shards, *batch.shards))),
                sources=tuple(dict.fromkeys((*details.sources, batch.source))),
            )
        return self._commit_info(
            started,
            added=batch.count - len(existing),
            replaced=len(existing),
            left_out=num_given - batch.count,
        )

    @abstractmethod
    def _write_batch(
        self,
        batch: InsertBatch,
        deleted_rows: Int64[Array, " N"],
        *,
        what: str,
        shards: tuple[str, ...],
        sources: tuple[str, ...],
    ) -> None:
        """Commit a version with the rows of a batch and without others.

        what: names the change, for the fingerprint. shards, sources: of the new version's details.
        """

    def delete(self, uids: Sequence[str]) -> CommitInfo:
        """Delete the rows of these uids.

        Raises:
            UsageError: one of them does not exist; nothing is deleted.
        """
        return self.delete_rows(rows_to_delete(self.snapshot, uids))

    def delete_rows(self, rows: RowSelection) -> CommitInfo:
        """Delete the live ones of these rows (as from `EngineCatalogue.where`); without any, nothing changes."""
        started = time.perf_counter()
        # rows that another change deleted meanwhile are not counted again
        deleted_rows = np.intersect1d(row_numbers(rows), self.snapshot.rows, assume_unique=True)
        if len(deleted_rows):
            with self._rolling_back_on_error():
                self._write_deletion(deleted_rows)
        return self._commit_info(started, removed=len(deleted_rows))

    @abstractmethod
    def _write_deletion(self, rows: Int64[Array, " N"]) -> None:
        """Commit a version without these live rows, ascending."""

    @abstractmethod
    def compact(self, *, kind: str = "", tuning: Any = None, keep_previous: bool = True) -> CommitInfo:
        """Drop deleted rows for good."""

    @abstractmethod
    def set_metadata(self, changes: Mapping[int, Mapping[str, Any]]) -> CommitInfo:
        """Change metadata of rows, whose vectors stay; where all rows have these values already, nothing changes.

        changes: by row the new values by name; a value of None removes the name, and other names stay.
        """

    def _metadata_edits(self, changes: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
        """The changes that change anything."""
        rows = list(changes)
        edits: dict[int, Mapping[str, Any]] = {}
        for first in range(0, len(rows), _ENTRIES_AT_ONCE):
            entries = self.snapshot.catalogue.entries(rows[first : first + _ENTRIES_AT_ONCE])
            edits |= metadata_edits(entries, changes)
        return edits

    @abstractmethod
    def relocate(self, addresses: Mapping[str, str]) -> CommitInfo:
        """Say where shards or image files lie now; where nothing of the index moves, nothing changes.

        addresses: the new one by the old one; those that no row has are ignored.
        """

    @abstractmethod
    def rollback(self) -> CommitInfo:
        """Bring the rows of the version before back, as a new version; rolled back twice, the last change is redone.

        Raises:
            UsageError: there is none, or a compaction has removed it. VlmError: its files are damaged.
        """

    def set_map(self, rows: Int64[Array, " N"], places: Float32[Array, "N 2"], record: MapRecord) -> CommitInfo:
        """Give rows (ascending) their places on a map, a file of the index folder.

        record: its file and its number of rows are filled in.

        Raises:
            UsageError: the engine keeps its rows elsewhere.
        """
        raise UsageError(f"A map needs the rows of a FAISS index; {self.folder} is of another engine.")

    @contextlib.contextmanager
    def _rolling_back_on_error(self) -> Iterator[None]:
        """If the block fails, its change is rolled back: at once or, if that fails too, before the next change."""
        # what the last change left behind, say on a full disk, must be gone before the next one begins
        if self._needs_rollback:
            self._roll_back()
            self._needs_rollback = False
        try:
            yield
        except BaseException:  # a keyboard interrupt too
            # set first: rolling back may fail for the same reason, as on a full disk or without a server
            self._needs_rollback = True
            try:
                self._roll_back()
            except Exception as error:
                logger.warning(
                    f"{self.folder}: the unfinished change stays until the next one rolls it back ({error})."
                )
            else:
                self._needs_rollback = False
            raise

    def _num_segments(self) -> int:
        return 0

    def _commit_info(
        self, started: float, *, added: int = 0, replaced: int = 0, removed: int = 0, edited: int = 0, left_out: int = 0
    ) -> CommitInfo:
        snapshot = self.snapshot
        return CommitInfo(
            generation=snapshot.number,
            rows=len(snapshot),
            segments=self._num_segments(),
            dead=snapshot.manifest.counts["dead"],
            added=added,
            replaced=replaced,
            removed=removed,
            edited=edited,
            left_out=left_out,
            seconds=time.perf_counter() - started,
        )
