"""The rows of an index as a Parquet table for other tools, with or without their vectors."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm.files import replacing
from vlm.index.catalogue import Catalogue, Entry
from vlm.index.embeddings import unit_rows
from vlm.index.exchange.columns import EMBEDDING, ORIGIN
from vlm.index.float16 import to_float32
from vlm.index.search_plan import Selected
from vlm.json_text import json_text
from vlm.tensors import Array, Float, Int64

Precision = Literal["float16", "float32"]

_ROWS_AT_ONCE = 8192
_TYPES = {
    "shard": pa.dictionary(pa.int32(), pa.string()),
    "number": pa.int64(),
    "image_offset": pa.int64(),
    "image_size": pa.int64(),
    "caption_number": pa.int32(),
}
# what clip-retrieval's own back end shows of a row
_SHOWN = ("image_path", "caption", "url")


def write_rows(
    path: Path,
    catalogue: Catalogue,
    selected: Iterable[Selected],
    *,
    precision: Precision | None = None,
    for_clip_retrieval: bool = False,
) -> None:
    """Write a row for each that is selected, in their order, atomically.

    Columns are those of `Origin`, captions and metadata as JSON; with `precision` also `embedding`, the unit vector;
    for clip-retrieval also `image_path`, `caption` and `url`.
    """
    schema = pa.schema([(name, _TYPES.get(name, pa.string())) for name in ORIGIN])
    for name in _SHOWN if for_clip_retrieval else ():
        schema = schema.append(pa.field(name, pa.string()))
    if precision is not None:
        schema = schema.append(pa.field(EMBEDDING, pa.list_(pa.float16() if precision == "float16" else pa.float32())))
    with replacing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for rows, stored in stored_rows(selected):
            entries = catalogue.entries(rows.tolist())
            columns: dict[str, Any] = {name: [_value(entry, name) for entry in entries] for name in ORIGIN}
            if for_clip_retrieval:
                columns |= {name: [_shown(entry, name) for entry in entries] for name in _SHOWN}
            if precision is not None:
                columns[EMBEDDING] = _lists(as_asked(stored, precision))
            writer.write_table(pa.table(columns, schema=schema))


def stored_rows(selected: Iterable[Selected]) -> Iterator[tuple[Int64[Array, " N"], Float[Array, "N D"]]]:
    """The catalogue's rows and the vectors as they are stored, float16, block by block."""
    for one in selected:
        rows = one.rows()
        for first in range(0, one.count, _ROWS_AT_ONCE):
            places = slice(first, first + _ROWS_AT_ONCE)
            yield rows[places], one.segment.vectors.stored[one.positions[places]]


def as_asked(stored: Float[Array, "N D"], precision: Precision) -> Float[Array, "N D"]:
    """Stored vectors as they are, or as float32 of exactly unit length."""
    return unit_rows(to_float32(stored)) if precision == "float32" else np.asarray(stored)


def _value(entry: Entry, name: str) -> Any:
    value = getattr(entry, name)
    return json_text(value) if name in ("captions", "metadata") else value


def _shown(entry: Entry, name: str) -> str | None:
    if name == "caption":
        return next((text for texts in entry.captions.values() for text in texts), None)
    value = entry.metadata.get(name, entry.key if name == "image_path" else None)
    return None if value is None else str(value)


def _lists(vectors: Float[Array, "N D"]) -> pa.ListArray:
    offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
