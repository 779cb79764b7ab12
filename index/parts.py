"""One part of an embeddings folder: a matrix, a Parquet table whose row i says what matrix row i is, and a marker."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm.data.samples import Captions
from vlm.errors import VlmError
from vlm.files import replacing, sha256_of, write_text
from vlm.index.codes import CODE_FILES, Code, encode
from vlm.json_text import json_text
from vlm.manifest import FileRecord, record_file
from vlm.tensors import Array, Float

PARTS = "parts"
_ROWS_AT_ONCE = 8192
_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("key", pa.string()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("number", pa.int64()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("caption_number", pa.int32()),
        ("captions", pa.string()),
        ("metadata", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an embedding was made from.

    uid: its name, unique in the folder (`uids.py`). key: of the sample.
    shard, number: the tar's address and the sample's place in it, from 0.
    image_offset, image_size: the byte range of the encoded picture in the tar.
    caption_number: which of the sample's captions was embedded, from 0; None for a picture's embedding.
    captions: all captions of a picture, or the one that was embedded.
    """

    uid: str
    key: str
    shard: str
    number: int
    image_offset: int
    image_size: int
    caption_number: int | None
    captions: Captions
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class IncidentRecord:
    """A sample that has no embedding, and why: one line of `incidents.jsonl`."""

    part: str
    shard: str
    number: int
    key: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How vectors are kept. codes: short forms beside them (`codes.py`)."""

    store: Literal["float16", "float32"] = "float16"
    codes: tuple[Code, ...] = ()


FLOAT16 = Storage()


@dataclass(frozen=True, kw_only=True)
class Part:
    """One finished part: its shard, how many rows it has, how many samples were bad, its files with checksums."""

    name: str
    shard: str
    rows: int
    bad: int
    files: dict[str, FileRecord]

    def to_line(self) -> str:
        """As one line of `parts.jsonl`."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_line(cls, line: str) -> "Part":
        """The inverse of `to_line`."""
        return cls.from_values(json.loads(line))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "Part":
        """From plain values, as JSON gives them."""
        files = {name: FileRecord(**record) for name, record in values["files"].items()}
        return cls(**(values | {"files": files}))  # pyright: ignore[reportArgumentType]


class Marked(NamedTuple):
    """What the marker of a part says."""

    part: Part
    incidents: list[IncidentRecord]


def part_name(number: int) -> str:
    """The name of the part of shard `number`.

    >>> part_name(3)
    'part-00003'
    """
    return f"part-{number:05d}"


def write_part(
    folder: Path,
    name: str,
    vectors: Float[Array, "N D"],
    origins: Sequence[Origin],
    *,
    shard: str,
    bad: int,
    storage: Storage = FLOAT16,
) -> Part:
    """Write the files of a part, each atomically."""
    stored = {"npy": vectors.astype(storage.store)}
    for code in storage.codes:
        stored |= zip(CODE_FILES[code], encode(vectors, code), strict=True)
    paths = {suffix: folder / PARTS / f"{name}.{suffix}" for suffix in (*stored, "parquet")}
    for suffix, array in stored.items():
        with replacing(paths[suffix]) as file:
            np.save(file, array, allow_pickle=False)
    with replacing(paths["parquet"]) as file:
        pq.write_table(_table(origins), file, compression="zstd")
    files = {f"{PARTS}/{path.name}": record_file(path) for path in paths.values()}
    return Part(name=name, shard=shard, rows=len(origins), bad=bad, files=files)


def mark_done(folder: Path, part: Part, incidents: Sequence[IncidentRecord]) -> None:
    """Write the marker of a part, after its files; from then on it survives any crash."""
    values = asdict(part) | {"incidents": [asdict(incident) for incident in incidents]}
    write_text(_marker(folder, part.name), json.dumps(values, ensure_ascii=False) + "\n")


def read_marker(folder: Path, name: str, *, verify: bool = False) -> Marked | None:
    """What the marker of a part says; None where there is none, or the files are not those it names.

    verify: compare checksums too, not the sizes alone.
    """
    try:
        values = json.loads(_marker(folder, name).read_text(encoding="utf-8"))
        incidents = [IncidentRecord(**incident) for incident in values.pop("incidents")]
        part = Part.from_values(values)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for file, record in part.files.items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != record.bytes:
            return None
        if verify and sha256_of(path) != record.sha256:
            return None
    return Marked(part, incidents)


def open_vectors(folder: Path, part: Part) -> Float[Array, "N D"]:
    """The matrix of a part as it is stored, memory-mapped.

    Raises:
        VlmError: it is damaged or has another number of rows than its line says.
    """
    vectors = _open_array(folder, part, "npy")
    if vectors.ndim != 2:
        raise VlmError(
            f"{part.name}.npy of {folder} has shape {vectors.shape}, two axes were written; run the same vlm embed "
            "again."
        )
    return vectors


def open_codes(folder: Path, part: Part, code: Code) -> tuple[Array, ...]:
    """The arrays of a code, memory-mapped: of int8 the numbers [N, D] and a scale for each row (`codes.from_int8`);
    of binary the bytes [N, D / 8 rounded up].

    Raises:
        VlmError: the folder was embedded without, or they are damaged.
    """
    return tuple(_open_array(folder, part, suffix) for suffix in CODE_FILES[code])


def _open_array(folder: Path, part: Part, suffix: str) -> Array:
    path = folder / PARTS / f"{part.name}.{suffix}"
    try:
        found = np.load(path, mmap_mode="r" if part.rows else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VlmError(f"{path} cannot be read ({error}); run the same vlm embed again.") from error
    if len(found) != part.rows:
        raise VlmError(f"{path} has {len(found):,} rows, {part.rows:,} were written; run the same vlm embed again.")
    return found


def _marker(folder: Path, name: str) -> Path:
    return folder / PARTS / f"{name}.json"


def read_origins(folder: Path, part: Part) -> Iterator[Origin]:
    """The rows of a part's table, in the order of its matrix.

    Raises:
        VlmError: it is damaged or has another number of rows than its line says.
    """
    path = folder / PARTS / f"{part.name}.parquet"
    try:
        table = pq.ParquetFile(path)
        if table.metadata.num_rows != part.rows:
            raise VlmError(
                f"{path} has {table.metadata.num_rows:,} rows, the matrix {part.rows:,}; run the same vlm embed again."
            )
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                row["captions"] = captions_from_json(row["captions"])
                row["metadata"] = json.loads(row["metadata"])
                yield Origin(**row)
    except (pa.ArrowInvalid, OSError) as error:
        raise VlmError(f"{path} cannot be read ({error}); run the same vlm embed again.") from error


def captions_from_json(text: str) -> Captions:
    """Captions as they are kept in the Parquet table and the catalogue."""
    return {language: tuple(texts) for language, texts in json.loads(text).items()}


def _table(origins: Sequence[Origin]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [getattr(origin, name) for origin in origins] for name in _SCHEMA.names}
    columns["captions"] = [json_text(origin.captions) for origin in origins]
    columns["metadata"] = [json_text(origin.metadata) for origin in origins]
    return pa.table(columns, schema=_SCHEMA)
