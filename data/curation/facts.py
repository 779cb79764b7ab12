"""What is known of each sample: one Arrow table, as columns, and nothing that no rule asks for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from vlm.data.captions import TAGS
from vlm.data.likeness import THUMBNAIL_BYTES

DIGEST_BYTES = 16

compute: Any = pyarrow.compute
"""Arrow's functions; they are made when it is loaded, so that type checkers see none of them."""


class Need(StrEnum):
    """What a rule asks the scan to find out."""

    CAPTIONS = "captions"
    SIZE = "size"
    DIGEST = "digest"
    LOOK = "look"
    DECODED = "decoded"


CAPTION = pa.struct([("language", pa.string()), ("text", pa.large_string())])
COLUMNS: dict[str, tuple[pa.DataType, Need | None]] = {
    "key": (pa.large_string(), None),
    "reason": (pa.string(), None),
    "bytes": (pa.int64(), None),
    "captions": (pa.large_list(CAPTION), Need.CAPTIONS),
    "width": (pa.int32(), Need.SIZE),
    "height": (pa.int32(), Need.SIZE),
    "digest": (pa.binary(DIGEST_BYTES), Need.DIGEST),
    "hash": (pa.uint64(), Need.LOOK),
    "thumbnail": (pa.binary(THUMBNAIL_BYTES), Need.LOOK),
}
"""Columns of the table and what asks for each. reason: why the sample cannot be used, empty for a usable one.
width, height: upright, in pixels. digest: half of the SHA-256 of the encoded picture. captions: those of all languages,
and each tag as one of the language `tags`."""


def schema_for(needs: Iterable[Need]) -> pa.Schema:
    """The columns found out for these needs."""
    asked = set(needs)
    return pa.schema([(name, kind) for name, (kind, need) in COLUMNS.items() if need is None or need in asked])


@dataclass(frozen=True, kw_only=True)
class ScannedShard:
    """A tar that was scanned, the content it had, and its number of samples."""

    address: str
    fingerprint: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The samples of some shards, in the order of the tars; memory a sample: what `COLUMNS` says of what was asked.

    With captions and size that is the text and about 40 bytes; a look adds 1,160, a digest 16.
    """

    shards: tuple[ScannedShard, ...]
    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: where the samples of each shard begin."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)])

    @cached_property
    def is_usable(self) -> np.ndarray:
        """bool [N]: what nothing was found wrong with."""
        return compute.equal(self.table.column("reason"), "").to_numpy()

    @cached_property
    def areas(self) -> np.ndarray:
        """int64 [N]: pixels of each picture."""
        return self.numbers("width").astype(np.int64) * self.numbers("height")

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column [N]."""
        return self.table.column(column).to_numpy()

    def fixed(self, column: str) -> np.ndarray:
        """uint8 [N, bytes] of a column of fixed size."""
        array = self.table.column(column).combine_chunks()
        width = array.type.byte_width
        chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
        parts = [_fixed_bytes(chunk, width) for chunk in chunks]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros((0, width), np.uint8), *parts])

    def key(self, place: int) -> str:
        """The key of sample `place`."""
        return self.table.column("key")[place].as_py()

    def where(self, place: int) -> tuple[str, int]:
        """The tar of sample `place` and its number there."""
        shard = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.shards[shard].address, place - int(self.starts[shard])

    def captions(self, languages: Sequence[str] = ()) -> tuple[np.ndarray, pa.ChunkedArray, pa.ChunkedArray]:
        """Captions one after the other: place of their sample (int64), language, text.

        languages: only captions of these; empty takes all but tags.
        """
        nested = self.table.column("captions")
        places = compute.list_parent_indices(nested).to_numpy()
        flat = compute.list_flatten(nested)
        language, text = compute.struct_field(flat, "language"), compute.struct_field(flat, "text")
        is_asked = (
            compute.is_in(language, pa.array(languages, pa.string()))
            if languages
            else compute.not_equal(language, TAGS)
        )
        return places[is_asked.to_numpy()], language.filter(is_asked), text.filter(is_asked)


def _fixed_bytes(array: pa.Array, width: int) -> np.ndarray:
    data = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)
