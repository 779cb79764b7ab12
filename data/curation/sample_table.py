"""What is known of each sample: one Arrow table, as columns, and nothing that no rule asks for.

One pass over shards, by several processes, that finds out what the rules ask for.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from vlm.console import progress
from vlm.data.decode import open_image, to_rgb, upright_size
from vlm.data.dedup import THUMBNAIL_BYTES, image_signature
from vlm.data.samples import TAGS, Sample, parse_tags
from vlm.data.shards import count_samples
from vlm.data.tar import ShardReader, open_index
from vlm.errors import BadSample, UsageError, VlmError

DIGEST_BYTES = 16

compute: Any = pyarrow.compute
"""Arrow's functions; they are made when it is loaded, so that type checkers see none of them."""


class RequiredColumn(StrEnum):
    """What a rule asks the scan to find out."""

    CAPTIONS = "captions"
    SIZE = "size"
    DIGEST = "digest"
    SIGNATURE = "look"
    DECODED = "decoded"


CAPTION = pa.struct([("language", pa.string()), ("text", pa.large_string())])
COLUMNS: dict[str, tuple[pa.DataType, RequiredColumn | None]] = {
    "key": (pa.large_string(), None),
    "reason": (pa.string(), None),
    "bytes": (pa.int64(), None),
    "captions": (pa.large_list(CAPTION), RequiredColumn.CAPTIONS),
    "width": (pa.int32(), RequiredColumn.SIZE),
    "height": (pa.int32(), RequiredColumn.SIZE),
    "digest": (pa.binary(DIGEST_BYTES), RequiredColumn.DIGEST),
    "hash": (pa.uint64(), RequiredColumn.SIGNATURE),
    "thumbnail": (pa.binary(THUMBNAIL_BYTES), RequiredColumn.SIGNATURE),
}
"""Columns of the table and what asks for each. reason: why the sample cannot be used, empty for a usable one.
width, height: upright, in pixels. digest: half of the SHA-256 of the encoded picture. captions: those of all languages,
and each tag as one of the language `tags`."""


def schema_for(required_columns: Iterable[RequiredColumn]) -> pa.Schema:
    """The columns found out for these needs."""
    requested = set(required_columns)
    return pa.schema(
        [(name, kind) for name, (kind, required) in COLUMNS.items() if required is None or required in requested]
    )


@dataclass(frozen=True, kw_only=True)
class ScannedShard:
    """A tar that was scanned, the content it had, and its number of samples."""

    url: str
    fingerprint: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class SampleTable:
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

    def key(self, position: int) -> str:
        """The key of sample `place`."""
        return self.table.column("key")[position].as_py()

    def where(self, position: int) -> tuple[str, int]:
        """The tar of sample `place` and its number there."""
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.shards[shard].url, position - int(self.starts[shard])

    def captions(self, languages: Sequence[str] = ()) -> tuple[np.ndarray, pa.ChunkedArray, pa.ChunkedArray]:
        """Captions one after the other: place of their sample (int64), language, text.

        languages: only captions of these; empty takes all but tags.
        """
        nested = self.table.column("captions")
        positions = compute.list_parent_indices(nested).to_numpy()
        flat = compute.list_flatten(nested)
        language, text = compute.struct_field(flat, "language"), compute.struct_field(flat, "text")
        is_asked = (
            compute.is_in(language, pa.array(languages, pa.string()))
            if languages
            else compute.not_equal(language, TAGS)
        )
        return positions[is_asked.to_numpy()], language.filter(is_asked), text.filter(is_asked)


def _fixed_bytes(array: pa.Array, width: int) -> np.ndarray:
    data = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


_SAMPLES_PER_TASK = 512
_EMPTY_ROW: dict[str, Any] = {
    "reason": "",
    "bytes": 0,
    "captions": [],
    "width": 0,
    "height": 0,
    "digest": bytes(DIGEST_BYTES),
    "hash": 0,
    "thumbnail": bytes(THUMBNAIL_BYTES),
}


class _ScanTask(NamedTuple):
    """Some samples of a tar, as one task of one process."""

    url: str
    first: int
    last: int
    required_columns: frozenset[RequiredColumn]


def scan(
    shards: Sequence[str], required_columns: Iterable[RequiredColumn], *, workers: int = 1, allow_damage: bool = False
) -> SampleTable:
    """Find out what is needed of every sample, in the order of the tars.

    A sample that cannot be used as far as was looked keeps its place, with the reason. The result does not depend
    on `workers` (1 works in this process).

    Raises:
        UsageError: two of the shards have the same fingerprint.
        VlmError: a shard is damaged (unless allowed) or empty, or a worker was killed.
    """
    counts = count_samples(list(shards), allow_damage=allow_damage)
    scanned = [
        ScannedShard(url=shard, fingerprint=open_index(shard).fingerprint, samples=count)
        for shard, count in zip(shards, counts, strict=True)
    ]
    _check_distinct_shards(scanned)
    requested = frozenset(required_columns)
    pieces = [
        _ScanTask(shard.url, first, min(first + _SAMPLES_PER_TASK, shard.samples), requested)
        for shard in scanned
        for first in range(0, shard.samples, _SAMPLES_PER_TASK)
    ]
    batches: list[pa.RecordBatch] = []
    with progress(total=sum(counts), what="scanning", unit="sample") as shown:
        for batch in _run(pieces, workers=workers):
            batches.append(batch)
            shown.update(batch.num_rows)
    return SampleTable(shards=tuple(scanned), table=pa.Table.from_batches(batches, schema_for(requested)))


def _check_distinct_shards(shards: list[ScannedShard]) -> None:
    first: dict[str, str] = {}
    for shard in shards:
        if shard.fingerprint in first:
            raise UsageError(
                f"{first[shard.fingerprint]} and {shard.url} have the same keys and sizes, so they are taken for "
                "the same tar; give it once (vlm curate … --weight 2 sees its samples twice). Where they differ after "
                "all, curate each alone."
            )
        first[shard.fingerprint] = shard.url


def _run(pieces: list[_ScanTask], *, workers: int) -> Iterator[pa.RecordBatch]:
    if workers <= 1 or len(pieces) == 1:
        yield from map(_scan_task, pieces)
        return
    with ProcessPoolExecutor(min(workers, len(pieces)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(_scan_task, pieces)
        except BrokenProcessPool as error:
            raise VlmError(
                f"A scanning process was killed, most often for want of memory ({workers} of them ran); "
                "repeat with fewer --workers."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _scan_task(piece: _ScanTask) -> pa.RecordBatch:
    reader = ShardReader(piece.url)
    try:
        rows = [_row(reader, number, piece.required_columns) for number in range(piece.first, piece.last)]
    finally:
        reader.close()
    return pa.RecordBatch.from_pylist(rows, schema=schema_for(piece.required_columns))


def _row(reader: ShardReader, number: int, required_columns: frozenset[RequiredColumn]) -> dict[str, Any]:
    row = _EMPTY_ROW | {"key": reader.index[number].key}
    try:
        sample = reader.read(number)
        row["bytes"] = len(sample.image)
        if RequiredColumn.CAPTIONS in required_columns:
            row["captions"] = _captions(sample)
        if RequiredColumn.DIGEST in required_columns:
            row["digest"] = hashlib.sha256(sample.image).digest()[:DIGEST_BYTES]
        if RequiredColumn.SIZE in required_columns:
            row["width"], row["height"] = upright_size(open_image(sample.image))
        if RequiredColumn.SIGNATURE in required_columns:
            signature = image_signature(sample.image)
            row["hash"], row["thumbnail"] = signature.hash, signature.thumbnail.tobytes()
        if RequiredColumn.DECODED in required_columns:
            to_rgb(open_image(sample.image))
    except BadSample as error:
        row["reason"] = error.reason
    return row


def _captions(sample: Sample) -> list[dict[str, str]]:
    found = [{"language": language, "text": text} for language, texts in sample.captions.items() for text in texts]
    return found + [{"language": TAGS, "text": tag} for tag in parse_tags(sample.metadata)]
