"""Writing an index of Milvus: built from an embeddings folder, and changed, each change one new version, whole or not.

Built are first a new collection, then, last, the folder that names it. The order of a change: entities with the number
of the next version, which no reader of this one sees; the number of that version on those that it deletes; the
manifest, which is the commit. If the process ends in between, or the server, the next writer removes what the manifest
does not know. Rows are never changed in place: an edit deletes a row and inserts another with the same vector, so that
readers of the old version go on seeing the old one.

One writer at a time: it holds a lock on a file of the index folder, which is why the writers of an index on a server
need a file system in common.
"""

import contextlib
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm import __version__
from vlm.console import progress
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder, check_not_exists, compute_fingerprint, write_bytes
from vlm.index.ann.index_types import TuningParams, resolve_index_type
from vlm.index.build import BuildSummary
from vlm.index.catalog import LATEST
from vlm.index.catalog_edits import edited_metadata
from vlm.index.embeddings_folder import Embeddings, Origin, normalize_rows
from vlm.index.engine_writer import CommitInfo, EngineWriter, InsertBatch
from vlm.index.ids import UID_COLUMN, choose_uid_column
from vlm.index.index_files import FIRST_VERSION, VERSIONS, FailPoint, no_failpoint, version_file
from vlm.index.milvus.collection import (
    INDEX_TYPES,
    REFUSED_TYPES,
    FieldRegister,
    create_collection,
    entity_of,
    entry_of,
    shard_term,
    vector_of,
)
from vlm.index.milvus.connection import LOCAL_SUFFIX, MilvusAddress, MilvusConnection
from vlm.index.milvus.milvus_reader import (
    MilvusDetails,
    MilvusSnapshot,
    open_milvus_snapshot,
    vector_bytes,
    visible_at,
)
from vlm.index.segments import check_lengths
from vlm.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from vlm.tensor_types import Array, Float, Float32, Int64

logger = logging.getLogger(__name__)


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


class MilvusWriter(EngineWriter[MilvusSnapshot]):
    """The one writer of an index folder of Milvus, until `close`; it first removes what an earlier one left unfinished.

    failpoint: called before each step that changes the collection or the folder.
    """

    def _check_layout(self, folder: Path) -> None:
        MilvusDetails.from_manifest(read_manifest(folder, "index"), folder)

    def _open(self) -> None:
        self.snapshot = open_milvus_snapshot(self.folder)
        try:
            self._roll_back()
        except BaseException:
            self.snapshot.connection.close()
            raise

    def _write_deletion(self, rows: Int64[Array, " N"]) -> None:
        self._commit("delete", (), rows)

    def _write_batch(
        self,
        batch: InsertBatch,
        deleted_rows: Int64[Array, " N"],
        *,
        what: str,
        shards: tuple[str, ...],
        sources: tuple[str, ...],
    ) -> None:
        self._commit(what, rows_of_batch(batch), deleted_rows, shards=shards, sources=sources)

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
            with self._rolling_back_on_error():
                # committed first, so that no reader of an older version misses rows without being told
                self._commit("compact", (), _NO_ROWS, dead=0, oldest=number)
                self._failpoint("removing deleted rows")
                self._connection.delete(self._collection, f"died <= {number}")
        if not keep_previous:
            (self.folder / version_file(self.snapshot.number - 1)).unlink(missing_ok=True)
        return self._commit_info(started)

    def set_metadata(self, changes: Mapping[int, Mapping[str, Any]]) -> CommitInfo:
        """As of `EngineWriter.set_metadata`."""
        started = time.perf_counter()
        edited = sorted(self._metadata_edits(changes))
        if edited:
            with self._rolling_back_on_error():

                def replaced() -> Iterator[NewRow]:
                    for origin, vector, row in self._stored(edited):
                        metadata = edited_metadata(origin.metadata, changes[row])
                        yield replace(origin, metadata=metadata), vector

                self._commit("set", replaced(), np.array(edited, np.int64))
        return self._commit_info(started, edited=len(edited))

    def relocate(self, addresses: Mapping[str, str]) -> CommitInfo:
        """As of `EngineWriter.relocate`."""
        started = time.perf_counter()
        moved = {old: new for old, new in addresses.items() if old != new}
        terms = ", ".join(f'"{shard_term(old)}"' for old in sorted(moved))
        rows = _NO_ROWS
        if moved:
            expression = f"{self.snapshot.visible()} and array_contains_any(terms, [{terms}])"
            rows = self._connection.rows(self._collection, expression)
        if len(rows):
            with self._rolling_back_on_error():
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
        with self._rolling_back_on_error():
            # under new numbers: a row is in the versions from one to another, and these are in two spans of them
            copies = ((origin, vector) for origin, vector, _ in self._stored(lost.tolist()))
            self._commit("rollback", copies, gained, shards=details.shards, sources=details.sources)
        return self._commit_info(started)

    @property
    def _connection(self) -> Any:
        return self.snapshot.connection

    @property
    def _collection(self) -> str:
        return self.snapshot.details.collection

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
        # that no entity has: those of unfinished changes were removed
        first = snapshot.details.next_row
        count = insert_rows(
            self._connection,
            self._collection,
            inserted,
            register,
            first=first,
            version=number,
            digest=digest,
            failpoint=self._failpoint,
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
            details=asdict(changed),
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

    def _roll_back(self) -> None:
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
            self._failpoint("removing compacted rows")
            self._connection.delete(self._collection, f"died <= {oldest}")


def insert_rows(
    connection: MilvusConnection,
    collection: str,
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
        connection.insert(collection, entities)
    return number - first


DEFAULT_ADDRESS = f"milvus{LOCAL_SUFFIX}"
"""A file of milvus-lite in the index folder."""

# defaults of Milvus for M and efConstruction, named so that the manifest has them
_HNSW_LINKS = 16
_HNSW_EF_CONSTRUCTION = 200
_HNSW_EF_SEARCH = 64
# from so many rows on a progress bar is worth it
_MIN_ROWS_FOR_PROGRESS = 10_000


def build_milvus_index(
    embeddings: Path,
    out: Path,
    *,
    address: str = "",
    kind: str = "auto",
    tuning: TuningParams | None = None,
    uid_column: str | None = None,
) -> BuildSummary:
    """Build an index of a finished embeddings folder, whose checksums are verified, in a collection of its own.

    address: of a server, http(s)://HOST:PORT, or of a local file that ends in .db, for milvus-lite; empty for such a
    file in the index folder. kind: flat, ivf, ivfsq, hnsw, or auto. uid_column: as of `choose_uid_column`.

    The index folder is renamed to its place after the last row, so that an interrupted build leaves no index; a
    collection that was begun on a server is dropped, unless the process is killed.

    Raises:
        UsageError: `out` exists, the embeddings are unfinished, the address or the index type does not fit, or Milvus
            does not take the metadata of a row.
        VlmError: the embeddings are damaged, the server does not answer, or the disk is full.
    """
    started = time.perf_counter()
    check_not_exists(out)
    place = MilvusAddress.parse(address or DEFAULT_ADDRESS)
    if address and place.is_local:
        # as the manifest names it, wherever a command runs
        place = MilvusAddress(str(Path(address).expanduser().absolute()))
    source = Embeddings.open(embeddings, verify=True)
    resolved_kind = _resolve_kind(kind, len(source))
    parameters = _index_parameters(resolved_kind, len(source), tuning or TuningParams())
    column = choose_uid_column(source.origins, uid_column)
    details = MilvusDetails(
        space=source.space,
        next_row=len(source),
        shards=tuple(source.manifest.details["shards"]),
        address=place.text,
        collection=_collection_name(out),
        kind=resolved_kind,
        parameters=parameters,
        fields=(),
        sources=(source.manifest.fingerprint,),
    )
    batch = InsertBatch.from_folder(embeddings, uid_column=column)
    # two rows of one uid are refused before anything is written
    for _ in batch.uids():
        pass
    try:
        with atomic_folder(out) as folder, _new_collection(place, folder, details) as connection:
            manifest = _fill(connection, details, batch, source, column)
            write_manifest(folder, manifest)
    except OSError as error:
        raise VlmError(f"{out} cannot be written: {error}; nothing was kept.") from error
    return BuildSummary(
        folder=str(out),
        kind=resolved_kind,
        parameters=parameters,
        rows=len(source),
        dimension=source.dimension,
        bytes=vector_bytes(len(source), source.dimension),
        seconds=time.perf_counter() - started,
    )


def _resolve_kind(kind: str, rows: int) -> str:
    if kind in REFUSED_TYPES:
        raise UsageError(
            f"--index-type {kind} is not built by the engine milvus: {REFUSED_TYPES[kind]}. Use one of "
            f"{', '.join(INDEX_TYPES)}."
        )
    resolved = resolve_index_type(kind, rows)
    return resolved if resolved in INDEX_TYPES else "hnsw"


def _index_parameters(kind: str, rows: int, tuning: TuningParams) -> dict[str, int]:
    """The parameters of Milvus by its own names, which are FAISS's."""
    if tuning.rerank is not None:
        raise UsageError("--refine-factor is of FAISS's quantized types; omit it for the engine milvus.")
    if kind == "hnsw":
        return {
            "M": tuning.links or _HNSW_LINKS,
            "efConstruction": tuning.ef_construction or _HNSW_EF_CONSTRUCTION,
            "efSearch": tuning.ef_search or _HNSW_EF_SEARCH,
        }
    if kind == "flat":
        return {}
    # four times the square root of the rows, as Milvus's own guide has it
    nlist = tuning.nlist or max(1, min(65_536, round(4 * rows**0.5)))
    return {"nlist": nlist, "nprobe": min(nlist, tuning.nprobe or max(1, nlist // 16))}


def _collection_name(out: Path) -> str:
    """A name of its own, since several indexes may share a server: of the folder, for those who list it."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", out.name)[:60]
    return f"vlm_{name}_{secrets.token_hex(6)}"


@contextlib.contextmanager
def _new_collection(place: MilvusAddress, folder: Path, details: MilvusDetails) -> Iterator[MilvusConnection]:
    """A collection that is dropped if the block fails."""
    connection = MilvusConnection(place, folder)
    try:
        # Milvus takes what a search needs apart from what is built
        built = {name: value for name, value in details.parameters.items() if name not in ("efSearch", "nprobe")}
        create_collection(
            connection,
            details.collection,
            dimension=details.space.dimension,
            kind=details.kind,
            parameters=built,
        )
        yield connection
    except BaseException:  # a keyboard interrupt too
        try:
            connection.drop(details.collection)
        except Exception as error:
            logger.warning(f"The collection that was begun stays at {connection.uri}; drop it by hand ({error}).")
        raise
    finally:
        # before the folder is renamed: milvus-lite has its files open under the old name
        connection.close()


def _fill(
    connection: MilvusConnection, details: MilvusDetails, batch: InsertBatch, source: Embeddings, uid_column: str
) -> Manifest:
    """Insert the rows; the manifest of the first version."""
    register = FieldRegister()
    digest = hashlib.sha256()

    rows = _with_progress(rows_of_batch(batch), batch.count)
    insert_rows(connection, details.collection, rows, register, first=0, version=FIRST_VERSION, digest=digest)
    connection.flush(details.collection)
    return Manifest(
        kind="index",
        fingerprint=compute_fingerprint(source.manifest.fingerprint, "milvus", details.kind, digest.digest()),
        generation=FIRST_VERSION,
        counts={"rows": len(source), "dead": 0},
        configuration={
            "embeddings": str(source.folder.absolute()),
            "kind": details.kind,
            UID_COLUMN: uid_column,
            **details.parameters,
        },
        inputs={"model": source.space.fingerprint, "embeddings": source.manifest.fingerprint},
        details=asdict(replace(details, fields=tuple(register.fields))),
    )


def _with_progress(rows: Iterable[NewRow], count: int) -> Iterator[NewRow]:
    if count < _MIN_ROWS_FOR_PROGRESS:
        yield from rows
        return
    with progress(total=count, what="index", unit=" rows") as bar:
        for row in rows:
            yield row
            bar.update(1)


_ROWS_AT_ONCE = 1000
_NO_ROWS = np.zeros(0, np.int64)
