"""Build an index of Milvus from an embeddings folder: a new collection, and the folder that names it, last."""

import contextlib
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from vlm.console import progress
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder, check_not_exists, compute_fingerprint
from vlm.index.ann.index_types import TuningParams, resolve_index_type
from vlm.index.build import BuildSummary
from vlm.index.embeddings_folder import Embeddings
from vlm.index.engine_writer import InsertBatch
from vlm.index.ids import UID_COLUMN, choose_uid_column
from vlm.index.index_files import FIRST_VERSION
from vlm.index.milvus.collection import (
    INDEX_TYPES,
    REFUSED_TYPES,
    FieldRegister,
    create_collection,
)
from vlm.index.milvus.connection import LOCAL_SUFFIX, MilvusAddress, MilvusConnection
from vlm.index.milvus.milvus_reader import MilvusDetails, vector_bytes
from vlm.index.milvus.milvus_writer import NewRow, insert_rows, rows_of_batch
from vlm.manifest import Manifest, write_manifest

logger = logging.getLogger(__name__)

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
