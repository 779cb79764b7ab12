"""What the columns of another tool's table are for, and its values as plain ones."""

import datetime
import decimal
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.config import nearest
from vlm.data.samples import Captions
from vlm.errors import UsageError
from vlm.index.parts import Origin

ORIGIN = tuple(field.name for field in fields(Origin))
EMBEDDING = "embedding"
_UIDS = ("uid", "key", "image_path")
_CAPTIONS = ("caption", "captions", "text", "TEXT")
# pandas keeps its row labels under such a name
_LABELS = "__index_level_"


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Which columns are meant; empty: the first of the usual names that is there."""

    uid: str = ""
    caption: str = ""
    embedding: str = ""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of one table; empty where there is none.

    metadata: all others that can be kept. left_out: those that cannot: bytes, vectors beside those imported, and what
        has no name.
    is_ours: `vlm index export` wrote the table, so that a row says itself what it is.
    """

    uid: str
    caption: str
    embedding: str
    metadata: tuple[str, ...]
    left_out: tuple[str, ...]
    is_ours: bool

    @property
    def described(self) -> tuple[str, ...]:
        """All to be read but the embedding."""
        if self.is_ours:
            return ORIGIN
        return tuple(dict.fromkeys(name for name in (self.uid, self.caption, *self.metadata) if name))

    def as_wishes(self) -> Wishes:
        """The same choice for another table."""
        return Wishes(uid=self.uid, caption=self.caption, embedding=self.embedding)


def choose_columns(schema: pa.Schema, wishes: Wishes, path: Path, *, has_vectors: bool) -> Columns:
    """What the columns of the table `path` are for.

    has_vectors: the vectors are in a column of it.

    Raises:
        UsageError: a column wished for is not there or of a wrong type, or the vectors' column is not clear.
    """
    names = schema.names
    for name in (wishes.uid, wishes.caption, wishes.embedding if has_vectors else ""):
        if name and name not in names:
            raise UsageError(f"{path} has no column {name!r}; {nearest(name, names)}")
    is_ours = set(ORIGIN) <= set(names) and wishes.uid in ("", "uid") and wishes.caption in ("", "captions")
    uid = "uid" if is_ours else wishes.uid or next((name for name in _UIDS if name in names), "")
    caption = "captions" if is_ours else wishes.caption or next((name for name in _CAPTIONS if name in names), "")
    if uid and not _is_name(schema.field(uid).type):
        kind = schema.field(uid).type
        raise UsageError(f"The column {uid!r} of {path} holds {kind}; a uid is a text or a whole number.")
    vectors = [field.name for field in schema if _is_vector(field.type)] if has_vectors else []
    embedding = _choose_embedding(vectors, wishes.embedding, path) if has_vectors else ""
    # a row is found by its key and uid without their being metadata too
    special = {embedding, caption, uid if uid in ("uid", "key") else ""} - {""}
    others = [name for name in names if name not in special and not name.startswith(_LABELS)]
    left_out = [name for name in others if not name or name in vectors or _is_binary(schema.field(name).type)]
    return Columns(
        uid=uid,
        caption=caption,
        embedding=embedding,
        metadata=tuple(name for name in others if name not in left_out),
        left_out=tuple(left_out),
        is_ours=is_ours,
    )


def plain(value: Any) -> Any:
    """The value as JSON can hold it: times as ISO texts, numbers that are none as null.

    >>> plain({"at": datetime.date(2024, 5, 31), "box": (1, float("nan"))})
    {'at': '2024-05-31', 'box': [1, None]}
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating | decimal.Decimal):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(name): plain(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [plain(content) for content in value]
    return str(value)


def captions_of(value: Any) -> Captions:
    """A text, a list of texts, or either by language, as captions.

    >>> captions_of(["a dog", "a wet dog"]), captions_of({"de": "ein Hund"}), captions_of(None)
    ({'': ('a dog', 'a wet dog')}, {'de': ('ein Hund',)}, {})
    """
    by_language = value if isinstance(value, dict) else {"": value}
    captions: Captions = {}
    for language, texts in by_language.items():
        kept = tuple(str(text) for text in (texts if isinstance(texts, list) else [texts]) if text)
        if kept:
            captions[language] = kept
    return captions


def readable(batch: pa.RecordBatch, names: Sequence[str]) -> list[dict[str, Any]]:
    """The named columns of a batch, row by row; times finer than a microsecond are cut there."""
    arrays = [_to_microseconds(batch.column(name)) for name in names]
    return pa.table(arrays, names=list(names)).to_pylist() if arrays else [{} for _ in range(len(batch))]


def _to_microseconds(array: pa.Array) -> pa.Array:
    """Times as Python can hold them; all else as it is."""
    kind = array.type
    if pa.types.is_timestamp(kind):
        return array.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_time64(kind) or pa.types.is_duration(kind):
        return array.cast(pa.time64("us") if pa.types.is_time64(kind) else pa.duration("us"), safe=False)
    return array


def _choose_embedding(vectors: Sequence[str], wished: str, path: Path) -> str:
    if wished and wished not in vectors:
        raise UsageError(f"The column {wished!r} of {path} does not hold lists of floating-point numbers.")
    if not wished and EMBEDDING in vectors:
        return EMBEDDING
    if not wished and len(vectors) != 1:
        there = f"several: {', '.join(vectors)}; choose one by --embedding-column" if vectors else "none"
        raise UsageError(
            f"The vectors are to be a column with lists of floating-point numbers, and {path} has {there}."
        )
    return wished or vectors[0]


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_floating(kind.value_type)


def _is_name(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
