"""One part of an embeddings folder: a float16 matrix and a Parquet table whose row i says what matrix row i is."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm.data.samples import Captions
from vlm.errors import VlmError
from vlm.files import replacing
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
        values = json.loads(line)
        values["files"] = {name: FileRecord(**record) for name, record in values["files"].items()}
        return cls(**values)


def write_part(
    folder: Path, name: str, vectors: Float[Array, "N D"], origins: Sequence[Origin], *, shard: str, bad: int
) -> Part:
    """Write the two files of a part, each atomically; vectors are stored as float16."""
    matrix, table = folder / PARTS / f"{name}.npy", folder / PARTS / f"{name}.parquet"
    with replacing(matrix) as file:
        np.save(file, vectors.astype(np.float16), allow_pickle=False)
    with replacing(table) as file:
        pq.write_table(_table(origins), file, compression="zstd")
    files = {f"{PARTS}/{path.name}": record_file(path) for path in (matrix, table)}
    return Part(name=name, shard=shard, rows=len(origins), bad=bad, files=files)


def open_vectors(folder: Path, part: Part) -> Float[Array, "N D"]:
    """The float16 matrix of a part, memory-mapped.

    Raises:
        VlmError: it is damaged or has another number of rows than its line says.
    """
    path = folder / PARTS / f"{part.name}.npy"
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VlmError(f"{path} cannot be read ({error}); remove {folder} and embed again.") from error
    if vectors.ndim != 2 or len(vectors) != part.rows:
        raise VlmError(f"{path} has shape {vectors.shape}, {part.rows:,} rows were written; embed again.")
    return vectors


def read_origins(folder: Path, part: Part) -> Iterator[Origin]:
    """The rows of a part's table, in the order of its matrix.

    Raises:
        VlmError: it is damaged or has another number of rows than its line says.
    """
    path = folder / PARTS / f"{part.name}.parquet"
    try:
        table = pq.ParquetFile(path)
        if table.metadata.num_rows != part.rows:
            raise VlmError(f"{path} has {table.metadata.num_rows:,} rows, the matrix {part.rows:,}; embed again.")
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                row["captions"] = captions_from_json(row["captions"])
                row["metadata"] = json.loads(row["metadata"])
                yield Origin(**row)
    except (pa.ArrowInvalid, OSError) as error:
        raise VlmError(f"{path} cannot be read ({error}); remove {folder} and embed again.") from error


def to_json(value: Captions | dict[str, Any]) -> str:
    """Captions or metadata as they are kept in the Parquet table and the catalogue."""
    return json.dumps(value, ensure_ascii=False)


def captions_from_json(text: str) -> Captions:
    """The inverse of `to_json` for captions."""
    return {language: tuple(texts) for language, texts in json.loads(text).items()}


def _table(origins: Sequence[Origin]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [getattr(origin, name) for origin in origins] for name in _SCHEMA.names}
    columns["captions"] = [to_json(origin.captions) for origin in origins]
    columns["metadata"] = [to_json(origin.metadata) for origin in origins]
    return pa.table(columns, schema=_SCHEMA)
