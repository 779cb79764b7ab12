"""The sample table: what curation knows of each sample, as Arrow columns, and the scan of shards that fills it.

Only the columns that some filter requires are scanned: reading the size of an image takes microseconds, its signature
milliseconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from vlm.console import progress
from vlm.data.decode import open_image, to_rgb, upright_size
from vlm.data.dedup import DIGEST_BYTES, THUMBNAIL_BYTES, image_signature
from vlm.data.samples import TAGS, Sample, parse_tags
from vlm.data.shard_workers import scan_shards
from vlm.data.shards import absolute_shard, count_samples
from vlm.data.tar import ShardReader, open_index
from vlm.errors import BadSample, UsageError
from vlm.files import content_digest
from vlm.ray_engine import RayCluster

compute: Any = pyarrow.compute
"""Arrow's functions; they are made when it is loaded, so type checkers do not know them."""


class RequiredColumn(StrEnum):
    """What a filter may require of the scan; it fills one or more columns."""

    CAPTIONS = "captions"
    SIZE = "size"
    DIGEST = "digest"
    SIGNATURE = "look"
    DECODED = "decoded"


CAPTION = pa.struct([("language", pa.string()), ("text", pa.large_string())])
COLUMNS: dict[str, tuple[pa.DataType, RequiredColumn | None]] = {
    # large: offsets of 32 bits end at 2 GiB of text in a column
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
"""Columns of the table and what requires each. reason: why the sample cannot be used, empty for a usable one.
width, height: upright, in pixels. digest: of the encoded image. captions: those of all languages, and each tag as one
of the language `tags`."""


def schema_for(required_columns: Iterable[RequiredColumn]) -> pa.Schema:
    """The columns that are scanned for these requirements."""
    always_and_required = {None, *required_columns}
    fields: list[tuple[str, pa.DataType]] = []
    for name, (kind, required) in COLUMNS.items():
        if required in always_and_required:
            fields.append((name, kind))
    return pa.schema(fields)


@dataclass(frozen=True, kw_only=True)
class ScannedShard:
    """A tar that was scanned, the content it had, and its number of samples."""

    url: str
    fingerprint: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """The samples of some shards, in the order of the tars.

    Memory of a sample with captions and size: the text and about 40 bytes; a signature adds 1,160, a digest 16.
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
        """bool [N]: the samples nothing was found wrong with."""
        return compute.equal(self.table.column("reason"), "").to_numpy()

    @cached_property
    def areas(self) -> np.ndarray:
        """int64 [N]: pixels of each image."""
        return self.numbers("width").astype(np.int64) * self.numbers("height")

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column [N]."""
        return self.table.column(column).to_numpy()

    def fixed(self, column: str) -> np.ndarray:
        """uint8 [N, bytes] of a column of fixed size."""
        # Arrow would make a Python object of each value; its buffer holds them side by side
        array = self.table.column(column).combine_chunks()
        width = array.type.byte_width
        chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
        parts = [_fixed_bytes(chunk, width) for chunk in chunks]
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros((0, width), np.uint8), *parts])

    def digests(self) -> np.ndarray:
        """Digests [N] of the encoded images, each one opaque value of 16 bytes, which numpy can sort and compare."""
        return np.ascontiguousarray(self.fixed("digest")).view(f"V{DIGEST_BYTES}").reshape(-1)

    def signatures(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Perceptual hashes [M] and thumbnails [M, bytes] of the samples at these positions."""
        return self.numbers("hash")[positions], self.fixed("thumbnail")[positions]

    def key(self, position: int) -> str:
        """The key of the sample at a position."""
        return self.table.column("key")[position].as_py()

    def where(self, position: int) -> tuple[str, int]:
        """The tar of the sample at a position, and its number there."""
        # to the right: a position equal to a start is the first sample of that shard
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return self.shards[shard].url, position - int(self.starts[shard])

    def captions(self, languages: Sequence[str] = ()) -> tuple[np.ndarray, pa.ChunkedArray, pa.ChunkedArray]:
        """Captions one after the other: position of their sample (int64), language, text.

        languages: only captions of these; empty takes all but tags.
        """
        nested = self.table.column("captions")
        positions = compute.list_parent_indices(nested).to_numpy()
        flat = compute.list_flatten(nested)
        language = compute.struct_field(flat, "language")
        text = compute.struct_field(flat, "text")
        if languages:
            is_requested = compute.is_in(language, pa.array(languages, pa.string()))
        else:
            is_requested = compute.not_equal(language, TAGS)
        return positions[is_requested.to_numpy()], language.filter(is_requested), text.filter(is_requested)


def _fixed_bytes(array: pa.Array, width: int) -> np.ndarray:
    data = np.frombuffer(array.buffers()[1] or b"", dtype=np.uint8)
    # a slice of an Arrow array shares the buffer of the whole, from its offset on
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


_SAMPLES_PER_CHUNK = 512
"""Enough to make the transfer between processes cheap, few enough to keep all of them busy with a small shard."""
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


class _Chunk(NamedTuple):
    """Samples `first` to `last` - 1 of a tar."""

    shard: str
    first: int
    last: int


def scan(
    shards: Sequence[str],
    required_columns: Iterable[RequiredColumn],
    *,
    workers: int = 1,
    allow_damage: bool = False,
    cluster: RayCluster | None = None,
) -> SampleTable:
    """Fill the required columns for every sample, in the order of the tars.

    A sample that cannot be used, as far as it was looked into, keeps its row, with the reason. The result does not
    depend on `workers` (1 works in this process), nor on a Ray `cluster` that does the work instead.

    Raises:
        UsageError: two of the shards have the same fingerprint.
        VlmError: a shard is damaged (unless allowed) or empty, or a worker was killed.
    """
    counts = count_samples(list(shards), allow_damage=allow_damage)
    scanned: list[ScannedShard] = []
    chunks: list[_Chunk] = []
    for shard, count in zip(shards, counts, strict=True):
        # the content as it is scanned: a selection must not fit a tar that was replaced later
        scanned.append(ScannedShard(url=shard, fingerprint=open_index(shard).fingerprint, samples=count))
        for first in range(0, count, _SAMPLES_PER_CHUNK):
            # other machines have another working folder
            address = shard if cluster is None else absolute_shard(shard)
            chunks.append(_Chunk(address, first, min(first + _SAMPLES_PER_CHUNK, count)))
    _check_distinct_shards(scanned)

    required = frozenset(required_columns)
    num_processes = min(workers, len(chunks))
    # one process would only add the transfer
    workers = num_processes if num_processes > 1 else 0
    batches: list[pa.RecordBatch] = []
    with progress(total=sum(counts), what="scanning", unit="sample") as shown:
        for batch in scan_shards(partial(_make_scan, required), chunks, workers=workers, cluster=cluster):
            batches.append(batch)
            shown.update(batch.num_rows)
    return SampleTable(shards=tuple(scanned), table=pa.Table.from_batches(batches, schema_for(required)))


def _check_distinct_shards(shards: list[ScannedShard]) -> None:
    first_with: dict[str, str] = {}
    for shard in shards:
        if shard.fingerprint in first_with:
            raise UsageError(
                f"{first_with[shard.fingerprint]} and {shard.url} have the same keys and sizes, so they count as "
                "the same tar; give it once (vlm curate … --weight 2 sees its samples twice). If they differ after "
                "all, curate each alone."
            )
        first_with[shard.fingerprint] = shard.url


def _make_scan(required: frozenset[RequiredColumn]) -> "partial[pa.RecordBatch]":
    return partial(_scan_chunk, required)


def _scan_chunk(required: frozenset[RequiredColumn], reader: ShardReader, chunk: _Chunk) -> pa.RecordBatch:
    rows = [_row(reader, number, required) for number in range(chunk.first, chunk.last)]
    return pa.RecordBatch.from_pylist(rows, schema=schema_for(required))


def _row(reader: ShardReader, number: int, required: frozenset[RequiredColumn]) -> dict[str, Any]:
    # the index has the key even where the sample cannot be read
    row = _EMPTY_ROW | {"key": reader.index[number].key}
    try:
        sample = reader.read(number)
        row["bytes"] = len(sample.image)
        if RequiredColumn.CAPTIONS in required:
            row["captions"] = _captions(sample)
        if RequiredColumn.DIGEST in required:
            row["digest"] = content_digest(sample.image)
        if RequiredColumn.SIZE in required:
            row["width"], row["height"] = upright_size(open_image(sample.image))
        if RequiredColumn.SIGNATURE in required:
            signature = image_signature(sample.image)
            row["hash"] = signature.hash
            row["thumbnail"] = signature.thumbnail.tobytes()
        if RequiredColumn.DECODED in required:
            # for its errors alone: damage behind the header shows only when every pixel is decoded
            to_rgb(open_image(sample.image))
    except BadSample as error:
        row["reason"] = error.reason
    return row


def _captions(sample: Sample) -> list[dict[str, str]]:
    captions: list[dict[str, str]] = []
    for language, texts in sample.captions.items():
        for text in texts:
            captions.append({"language": language, "text": text})
    for tag in parse_tags(sample.metadata):
        captions.append({"language": TAGS, "text": tag})
    return captions
