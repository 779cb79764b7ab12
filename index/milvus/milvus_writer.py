"""Changes of an index of Milvus: inserts, upserts, deletes, edits, compaction, each one new version, whole or not.

The order of a change: entities with the number of the next version, which no reader of this one sees; the number of
that version on those that it deletes; the manifest, which is the commit. If the process ends in between, or the server,
the next writer removes what the manifest does not know. Rows are never changed in place: an edit deletes a row and
inserts another with the same vector, so that readers of the old version go on seeing the old one.

One writer at a time: it holds a lock on a file of the index folder, which is why the writers of an index on a server
need a file system in common.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from vlm import __version__
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint, write_bytes
from vlm.index.catalog import LATEST
from vlm.index.catalog_edits import edited_metadata, metadata_edits
from vlm.index.embeddings_folder import Origin, normalize_rows
from vlm.index.engine_base import RowSelection, row_numbers
from vlm.index.index_files import VERSIONS, FailPoint, no_failpoint, version_file
from vlm.index.milvus.collection import FieldRegister, entity_of, entry_of, shard_term, vector_of
from vlm.index.milvus.milvus_reader import (
    MilvusDetails,
    MilvusSnapshot,
    open_milvus_snapshot,
    plain_details,
    visible_at,
)
from vlm.index.segments import check_lengths
from vlm.index.writer import CommitInfo, InsertBatch, lock_for_writing, rows_to_delete
from vlm.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from vlm.tensor_types import Array, Float, Float32, Int64

_ROWS_AT_ONCE = 1000
_NO_ROWS = np.zeros(0, np.int64)

NewRow = tuple[Origin, Float32[Array, " D"]]
"""What a row is made from, and its vector."""


def rows_of_batch(batch: InsertBatch) -> Iterator[NewRow]:
    """The rows of a batch, whose vectors are rounded as FAISS's rows are.

    Raises:
        VlmError: a vector is not of unit length, or there are more or fewer than origins.
    """
    origins = iter(batch.origins())
    num_rows = 0
    for vector in _rounded_vectors(batch.blocks()):
        origin = next(origins, None)
        if origin is None:
            break
        num_rows += 1
        yield origin, vector
    if num_rows != batch.count:
        raise VlmError(f"{num_rows:,} vectors came for {batch.count:,} rows; the embeddings are damaged: embed again.")


def _rounded_vectors(blocks: Iterable[Float[Array, "_ D"]]) -> Iterator[Float32[Array, " D"]]:
    first_row = 0
    for block in blocks:
        check_lengths(block, first_row)
        first_row += len(block)
        yield from normalize_rows(np.asarray(block, np.float16).astype(np.float32))


class MilvusWriter:
    """The one writer of an index folder of Milvus, until `close`; it first removes what an earlier one left unfinished.

    failpoint: called before each step that changes the collection or the folder.

    Raises:
        UsageError: there is another writer, or no index of this layout.
        VlmError: the index is damaged, or its server does not answer.
    """

    def __init__(self, folder: Path, *, failpoint: FailPoint = no_failpoint) -> None:
        # refuse what is not an index before a lock file appears in it
        MilvusDetails.from_manifest(read_manifest(folder, "index"), folder)
        self.folder = folder
        self._failpoint = failpoint
        self._lock = lock_for_writing(folder)
        self._needs_recovery = True
        try:
            self.snapshot = open_milvus_snapshot(folder)
            try:
                self._recover()
            except BaseException:
                self.snapshot.connection.close()
                raise
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "MilvusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock, and let go of the server."""
        self.snapshot.connection.close()
        self._lock.release()

    def describe(self) -> CommitInfo:
        """The present version, as a change that did nothing."""
        return self._commit_info(time.perf_counter())

    def add(self, batch: InsertBatch) -> CommitInfo:
        """Insert new rows.

        Raises:
            UsageError: they are of another model, a uid exists already, or Milvus does not take their metadata.
            VlmError: two of them have the same uid, or a vector is not of unit length.
        """
        return self._insert(batch, is_upsert=False)

    def update(self, batch: InsertBatch, *, allowed_rows: RowSelection | None = None) -> CommitInfo:
        """As `add`, but a row whose uid exists replaces the one that has it (upsert).

        allowed_rows: only these rows (as from `MilvusCatalogue.where`) are replaced; rows of other uids are left out.
        """
        return self._insert(batch, is_upsert=True, allowed_rows=allowed_rows)

    def delete(self, uids: Sequence[str]) -> CommitInfo:
        """Delete the rows of these uids.

        Raises:
            UsageError: one of them does not exist; nothing is deleted.
        """
        return self.delete_rows(rows_to_delete(self.snapshot, uids))

    def delete_rows(self, rows: RowSelection) -> CommitInfo:
        """Delete the live ones of these rows; without any, nothing changes."""
        started = time.perf_counter()
        deleted = np.intersect1d(row_numbers(rows), self.snapshot.rows, assume_unique=True)
        if len(deleted):
            with self._changing():
                self._commit("delete", (), deleted)
        return self._commit_info(started, removed=len(deleted))

    def compact(self, *, kind: str = "", tuning: Any = None, keep_previous: bool = True) -> CommitInfo:
        """Drop deleted rows from the collection; readers of older versions have to refresh.

        Raises:
            UsageError: another index type is asked for.
        """
        started = time.perf_counter()
        if kind and kind != self.snapshot.details.kind:
            raise UsageError(
                f"{self.folder} is an index of Milvus of the type {self.snapshot.details.kind}, and a collection that "
                f"is searched keeps its type: build another one with --index-type {kind}."
            )
        number = self.snapshot.number
        if self.snapshot.manifest.counts["dead"]:
            with self._changing():
                # committed first, so that no reader of an older version misses rows without being told
                self._commit("compact", (), _NO_ROWS, dead=0, oldest=number)
                self._failpoint("removing deleted rows")
                self._connection.delete(self._collection, f"died <= {number}")
        if not keep_previous:
            (self.folder / version_file(self.snapshot.number - 1)).unlink(missing_ok=True)
        return self._commit_info(started)

    def set_metadata(self, changes: Mapping[int, Mapping[str, Any]]) -> CommitInfo:
        """Change metadata of rows, whose vectors stay; where all rows have these values already, nothing changes.

        changes: by row the new values by name; a value of None removes the name, and other names stay.
        """
        started = time.perf_counter()
        rows = list(changes)
        edited: list[int] = []
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            edited += metadata_edits(self.snapshot.catalogue.entries(rows[first : first + _ROWS_AT_ONCE]), changes)
        if edited:
            with self._changing():

                def replaced() -> Iterator[NewRow]:
                    for origin, vector, row in self._stored(sorted(edited)):
                        metadata = edited_metadata(origin.metadata, changes[row])
                        yield replace(origin, metadata=metadata), vector

                self._commit("set", replaced(), np.array(sorted(edited), np.int64))
        return self._commit_info(started, edited=len(edited))

    def relocate(self, addresses: Mapping[str, str]) -> CommitInfo:
        """Say where shards or image files lie now; where nothing of the index moves, nothing changes.

        addresses: the new one by the old one; those that no row has are ignored.
        """
        started = time.perf_counter()
        moved = {old: new for old, new in addresses.items() if old != new}
        terms = ", ".join(f'"{shard_term(old)}"' for old in sorted(moved))
        rows = _NO_ROWS
        if moved:
            expression = f"{self.snapshot.visible()} and array_contains_any(terms, [{terms}])"
            rows = self._connection.rows(self._collection, expression)
        if len(rows):
            with self._changing():
                shards = tuple(dict.fromkeys(moved.get(shard, shard) for shard in self.snapshot.details.shards))
                stored = self._stored(rows.tolist())
                copies = ((replace(origin, shard=moved[origin.shard]), vector) for origin, vector, _ in stored)
                self._commit("relocate", copies, rows, shards=shards)
        return self._commit_info(started, edited=len(rows))

    def rollback(self) -> CommitInfo:
        """Bring the rows of the version before back, as a new version; rolled back twice, the last change is redone.

        Raises:
            UsageError: there is none, or a compaction has removed it.
        """
        started = time.perf_counter()
        now = self.snapshot.number
        if not (self.folder / version_file(now - 1)).is_file():
            why = "nothing has changed since it was built" if now == 1 else "its last change kept none"
            raise UsageError(f"{self.folder} has no version before {now} to roll back to: {why}.")
        previous = read_manifest(self.folder, "index", name=version_file(now - 1))
        details = MilvusDetails.from_manifest(previous, self.folder)
        before = previous.generation
        gained = self._connection.rows(self._collection, f"{visible_at(now)} and born > {before}")
        lost = self._connection.rows(self._collection, f"{visible_at(before)} and died <= {now}")
        with self._changing():
            # under new numbers: a row is in the versions from one to another, and these are in two spans of them
            copies = ((origin, vector) for origin, vector, _ in self._stored(lost.tolist()))
            self._commit("rollback", copies, gained, shards=details.shards, sources=details.sources)
        return self._commit_info(started)

    def set_map(self, rows: Int64[Array, " N"], places: Float32[Array, "N 2"], record: Any) -> NoReturn:
        """Refused: a map is a file of the index folder with a place for each row.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.folder} is an index of Milvus, and maps are made of FAISS indexes only.")

    @property
    def _connection(self) -> Any:
        return self.snapshot.connection

    @property
    def _collection(self) -> str:
        return self.snapshot.details.collection

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
            batch = batch.select(existing)
        if existing and not is_upsert:
            raise UsageError(
                f"{self.folder} has {next(iter(existing))!r} already ({len(existing):,} of the {batch.count:,} new "
                "rows exist); nothing was added: vlm index update replaces them."
            )
        if not batch.count:
            return self._commit_info(started, left_out=num_given)
        with self._changing():
            self._commit(
                "update" if is_upsert else "add",
                rows_of_batch(batch),
                np.sort(np.array(list(existing.values()), np.int64)),
                shards=tuple(dict.fromkeys((*details.shards, *batch.shards))),
                sources=tuple(dict.fromkeys((*details.sources, batch.source))),
            )
        return self._commit_info(
            started,
            added=batch.count - len(existing),
            replaced=len(existing),
            left_out=num_given - batch.count,
        )

    def _stored(self, rows: Sequence[int]) -> Iterator[tuple[Origin, Float32[Array, " D"], int]]:
        """What each of the rows was made from, its vector and its number."""
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[first : first + _ROWS_AT_ONCE]
            fields = ["row", "origin", "vector"]
            for entity in self._connection.fetch(self._collection, "row", block, fields, where="row >= 0"):
                yield entry_of(entity), vector_of(entity), entity["row"]

    def _commit(
        self,
        what: str,
        inserted: Iterable[NewRow],
        deleted: Int64[Array, " N"],
        *,
        dead: int | None = None,
        **details: Any,
    ) -> None:
        """Insert and delete rows as the next version.

        deleted: live rows, ascending. dead: deleted rows that are there still; by default those of before and these.
        details: what else of the index's details changes.
        """
        snapshot = self.snapshot
        number = snapshot.number + 1
        register = FieldRegister.of(snapshot.details.fields)
        digest = hashlib.sha256(deleted.tobytes())
        first = self._next_row()
        count = insert_rows(
            snapshot, inserted, register, first=first, version=number, digest=digest, failpoint=self._failpoint
        )
        self._failpoint("deletions")
        self._connection.set_field(self._collection, deleted.tolist(), "died", number)
        counts = snapshot.manifest.counts
        changed = replace(snapshot.details, **(details | {"fields": tuple(register.fields), "next_row": first + count}))
        manifest = replace(
            snapshot.manifest,
            fingerprint=compute_fingerprint(snapshot.manifest.fingerprint, what, digest.digest()),
            generation=number,
            counts={
                "rows": counts["rows"] + count - len(deleted),
                "dead": counts["dead"] + len(deleted) if dead is None else dead,
            },
            details=plain_details(changed),
            made_by=f"vlm {__version__}",
            # empty ones are filled in as the manifest is written
            made_at="",
            command="",
        )
        self._write_manifest(manifest)
        self.snapshot = open_milvus_snapshot(self.folder, snapshot.connection)

    def _write_manifest(self, manifest: Manifest) -> None:
        """Keep the manifest of this version for a rollback, and replace it: that is the commit."""
        path = self.folder / version_file(manifest.generation - 1)
        path.parent.mkdir(exist_ok=True)
        self._failpoint("record of the version before")
        write_bytes(path, (self.folder / MANIFEST).read_bytes())
        self._failpoint("manifest")
        write_manifest(self.folder, manifest)
        self._failpoint("manifest written")
        for other in (self.folder / VERSIONS).glob("*.json"):
            if other != path:
                other.unlink(missing_ok=True)

    def _next_row(self) -> int:
        """A row number that no entity has: recovery has removed those of unfinished changes."""
        return self.snapshot.details.next_row

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """If the block fails, what it did is undone: at once or, if that fails too, before the next change."""
        if self._needs_recovery:
            self._recover()
        self._needs_recovery = True
        try:
            yield
        except Exception:
            # it may fail for the same reason, as a server that is gone
            with contextlib.suppress(Exception):
                self._recover()
            raise
        self._needs_recovery = False

    def _recover(self) -> None:
        """Remove what a version that was not committed inserted, and bring back what it deleted.

        It may be interrupted and repeated; no reader sees what it removes.
        """
        self.snapshot = open_milvus_snapshot(self.folder, self.snapshot.connection)
        number = self.snapshot.number
        if self._connection.count(self._collection, f"born > {number}"):
            self._failpoint("removing unfinished rows")
            self._connection.delete(self._collection, f"born > {number}")
        deleted = self._connection.rows(self._collection, f"died > {number} and died < {LATEST}")
        if len(deleted):
            self._failpoint("bringing deleted rows back")
            self._connection.set_field(self._collection, deleted.tolist(), "died", LATEST)
        # what a compaction that was interrupted after its commit left behind
        oldest = self.snapshot.details.oldest
        if self._connection.count(self._collection, f"died <= {oldest}"):
            self._connection.delete(self._collection, f"died <= {oldest}")
        self._needs_recovery = False

    def _commit_info(
        self, started: float, *, added: int = 0, replaced: int = 0, removed: int = 0, edited: int = 0, left_out: int = 0
    ) -> CommitInfo:
        snapshot = self.snapshot
        return CommitInfo(
            generation=snapshot.number,
            rows=len(snapshot),
            segments=0,
            dead=snapshot.manifest.counts["dead"],
            added=added,
            replaced=replaced,
            removed=removed,
            edited=edited,
            left_out=left_out,
            seconds=time.perf_counter() - started,
        )


def insert_rows(
    snapshot: MilvusSnapshot,
    rows: Iterable[NewRow],
    register: FieldRegister,
    *,
    first: int,
    version: int,
    digest: Any,
    failpoint: FailPoint = no_failpoint,
) -> int:
    """Insert rows with the numbers from `first` on, which the version before does not see; how many there are.

    register: takes up their metadata fields. digest: takes in what they hold.
    """
    remaining = iter(rows)
    number = first
    while block := list(islice(remaining, _ROWS_AT_ONCE)):
        entities: list[dict[str, Any]] = []
        for origin, vector in block:
            entity = entity_of(number, origin, vector, register.facts(origin), born=version)
            digest.update(entity["origin"].encode() + vector.tobytes())
            entities.append(entity)
            number += 1
        failpoint(f"rows up to {number:,}")
        snapshot.connection.insert(snapshot.details.collection, entities)
    return number - first
