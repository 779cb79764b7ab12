"""One pass over shards, by several processes, that finds out what the rules ask for."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

import pyarrow as pa

from vlm.console import progress
from vlm.data.captions import TAGS, tags_of
from vlm.data.curation.facts import DIGEST_BYTES, Facts, Need, ScannedShard, schema_for
from vlm.data.decode import open_picture, to_rgb, upright_size
from vlm.data.likeness import THUMBNAIL_BYTES, look_of
from vlm.data.samples import Sample
from vlm.data.shard_reader import ShardReader
from vlm.data.shards import count_samples
from vlm.data.tar_index import open_index
from vlm.errors import BadSample, UsageError, VlmError

_SAMPLES_AT_ONCE = 512
_BLANK: dict[str, Any] = {
    "reason": "",
    "bytes": 0,
    "captions": [],
    "width": 0,
    "height": 0,
    "digest": bytes(DIGEST_BYTES),
    "hash": 0,
    "thumbnail": bytes(THUMBNAIL_BYTES),
}


class _Piece(NamedTuple):
    """Some samples of a tar, as one task of one process."""

    address: str
    first: int
    last: int
    needs: frozenset[Need]


def scan(shards: Sequence[str], needs: Iterable[Need], *, workers: int = 1, allow_damage: bool = False) -> Facts:
    """Find out what is needed of every sample, in the order of the tars.

    A sample that cannot be used as far as was looked keeps its place, with the reason. The result does not depend
    on `workers` (1 works in this process).

    Raises:
        UsageError: two of the shards have the same fingerprint.
        VlmError: a shard is damaged (unless allowed) or empty, or a worker was killed.
    """
    counts = count_samples(list(shards), allow_damage=allow_damage)
    scanned = [
        ScannedShard(address=shard, fingerprint=open_index(shard).fingerprint, samples=count)
        for shard, count in zip(shards, counts, strict=True)
    ]
    _refuse_twins(scanned)
    asked = frozenset(needs)
    pieces = [
        _Piece(shard.address, first, min(first + _SAMPLES_AT_ONCE, shard.samples), asked)
        for shard in scanned
        for first in range(0, shard.samples, _SAMPLES_AT_ONCE)
    ]
    batches: list[pa.RecordBatch] = []
    with progress(total=sum(counts), what="scanning", unit="sample") as shown:
        for batch in _run(pieces, workers=workers):
            batches.append(batch)
            shown.update(batch.num_rows)
    return Facts(shards=tuple(scanned), table=pa.Table.from_batches(batches, schema_for(asked)))


def _refuse_twins(shards: list[ScannedShard]) -> None:
    first: dict[str, str] = {}
    for shard in shards:
        if shard.fingerprint in first:
            raise UsageError(
                f"{first[shard.fingerprint]} and {shard.address} have the same keys and sizes, so they are taken for "
                "the same tar; give it once (vlm curate … --weight 2 sees its samples twice). Where they differ after "
                "all, curate each alone."
            )
        first[shard.fingerprint] = shard.address


def _run(pieces: list[_Piece], *, workers: int) -> Iterator[pa.RecordBatch]:
    if workers <= 1 or len(pieces) == 1:
        yield from map(_look_at, pieces)
        return
    with ProcessPoolExecutor(min(workers, len(pieces)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(_look_at, pieces)
        except BrokenProcessPool as error:
            raise VlmError(
                f"A scanning process was killed, most often for want of memory ({workers} of them ran); "
                "repeat with fewer --workers."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _look_at(piece: _Piece) -> pa.RecordBatch:
    reader = ShardReader(piece.address)
    try:
        rows = [_row(reader, number, piece.needs) for number in range(piece.first, piece.last)]
    finally:
        reader.close()
    return pa.RecordBatch.from_pylist(rows, schema=schema_for(piece.needs))


def _row(reader: ShardReader, number: int, needs: frozenset[Need]) -> dict[str, Any]:
    row = _BLANK | {"key": reader.index[number].key}
    try:
        sample = reader.read(number)
        row["bytes"] = len(sample.image)
        if Need.CAPTIONS in needs:
            row["captions"] = _captions(sample)
        if Need.DIGEST in needs:
            row["digest"] = hashlib.sha256(sample.image).digest()[:DIGEST_BYTES]
        if Need.SIZE in needs:
            row["width"], row["height"] = upright_size(open_picture(sample.image))
        if Need.LOOK in needs:
            look = look_of(sample.image)
            row["hash"], row["thumbnail"] = look.hash, look.thumbnail.tobytes()
        if Need.DECODED in needs:
            to_rgb(open_picture(sample.image))
    except BadSample as error:
        row["reason"] = error.reason
    return row


def _captions(sample: Sample) -> list[dict[str, str]]:
    found = [{"language": language, "text": text} for language, texts in sample.captions.items() for text in texts]
    return found + [{"language": TAGS, "text": tag} for tag in tags_of(sample.metadata)]
