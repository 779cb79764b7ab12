"""Looking into shards: what they hold, what is damaged, what is there twice."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlm.console import progress
from vlm.data.dedup import content_digest
from vlm.data.inspection.findings import BadRecord, Inspection
from vlm.data.inspection.sample_scan import ScanChunk, ScanOptions, scan_samples
from vlm.data.inspection.statistics import DatasetStats
from vlm.data.tar import ShardReader, open_index
from vlm.data.tokenizers import open_tokenizer
from vlm.errors import UsageError, VlmError

if TYPE_CHECKING:
    from vlm.data.selection import Selection


NEAR_LIMIT = 100_000
"""Samples up to which near duplicates are looked for: 1,160 bytes each, and all are compared."""

_CHUNK_SAMPLES = 64


def inspect_shards(
    shards: Sequence[str],
    *,
    sample: int | None = None,
    images: int = 48,
    workers: int = 0,
    selection: "Selection | None" = None,
    tokenizer: str = "",
    context_length: int | None = None,
    near_limit: int = NEAR_LIMIT,
) -> Inspection:
    """Read and decode the samples of shards, never stopping at a bad one.

    sample: look at no more than so many, evenly spread; None looks at all.
    pictures: how many to keep for the contact sheet, evenly spread.
    workers: processes that read and decode; the result is the same for any number.
    selection: look only at what it keeps.
    near_limit: look for near duplicates among no more samples than that.
    tokenizer: as `open_tokenizer` takes it, with its context length or another; counts the tokens of captions.

    Raises:
        UsageError: a number is out of range, there is no such tokenizer, or the selection is of other shards.
        VlmError: none of the shards can be read.
    """
    for name, value, least in (
        ("workers", workers, 0),
        ("images", images, 0),
        ("near_limit", near_limit, 0),
        ("sample", sample, 1),
        ("context_length", context_length, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} = {value} is outside its range; give {least} or more.")
    limit = open_tokenizer(tokenizer, context_length).context_length if tokenizer else None
    opened = _ShardLayout(shards)
    there = opened.chosen(selection)
    numbers = there[evenly_spaced(len(there), len(there) if sample is None else sample)]
    shown = frozenset(numbers[evenly_spaced(len(numbers), images)].tolist())
    stats = DatasetStats(limit)
    options = ScanOptions(tokenizer=tokenizer, with_signatures=len(numbers) <= near_limit)
    with progress(total=len(numbers), what="inspecting", unit="sample") as bar:
        for scans in scan_samples(opened.chunks(numbers, shown), options, workers=workers):
            for scan in scans:
                stats.add(scan)
            bar.update(len(scans))
    return _inspection(
        opened,
        stats,
        selected=None if selection is None else len(there),
        context_length=limit,
        near_duplicates=stats.near_duplicates() if options.with_signatures else None,
    )


def evenly_spaced(total: int, wanted: int) -> np.ndarray:
    """Up to `wanted` numbers below `total`, ascending, evenly apart."""
    wanted = min(wanted, total)
    return (np.arange(wanted, dtype=np.int64) * total) // max(wanted, 1)


class _ShardLayout:
    """The shards with what their indexes say; samples are numbered through over all shards.

    starts: number of the first sample of each shard, and the total. damaged: shards that end early or cannot be opened.

    Raises:
        VlmError: none can be opened.
    """

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = tuple(shards)
        self.starts = [0]
        self.image_bytes = 0
        self.damaged: list[BadRecord] = []
        is_any_read = False
        for shard in shards:
            try:
                index = open_index(shard)
            except VlmError as error:
                self.starts.append(self.starts[-1])
                self.damaged.append(BadRecord(shard=shard, key="", reason="unreadable", detail=str(error)))
                continue
            self.starts.append(self.starts[-1] + len(index))
            self.image_bytes += index.image_bytes()
            is_any_read = True
            if index.damage:
                self.damaged.append(BadRecord(shard=shard, key="", reason="ends early", detail=index.damage))
        if self.damaged and not is_any_read:
            others = f" The other {len(shards) - 1:,} cannot be read either." if len(shards) > 1 else ""
            raise VlmError(f"{self.damaged[0].detail}{others}")

    def chosen(self, selection: "Selection | None") -> np.ndarray:
        """The numbers of the samples a selection keeps, ascending."""
        if selection is None:
            return np.arange(self.starts[-1], dtype=np.int64)
        whole = [position for position in range(len(self.shards)) if self.starts[position] < self.starts[position + 1]]
        times = selection.times_of([self.shards[position] for position in whole])
        kept = [np.flatnonzero(of) + self.starts[position] for position, of in zip(whole, times, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *kept])

    def chunks(self, numbers: np.ndarray, shown: frozenset[int]) -> Iterator[ScanChunk]:
        """The samples to look at, in order, none of two shards in one portion."""
        for position, shard in enumerate(self.shards):
            first, last = self.starts[position : position + 2]
            inside = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, last)] - first
            for begin in range(0, len(inside), _CHUNK_SAMPLES):
                part = inside[begin : begin + _CHUNK_SAMPLES].tolist()
                kept = shown.intersection(first + number for number in part)
                yield ScanChunk(shard, first, tuple(part), kept)

    def texts(self, repeated: list[tuple[int, bytes, int]]) -> dict[str, int]:
        """The captions behind digests, read again, with how often they occur."""
        found: dict[str, int] = {}
        for number, digest, times in repeated:
            position = bisect_right(self.starts, number) - 1
            reader = ShardReader(self.shards[position])
            try:
                captions = reader.read(number - self.starts[position]).captions
            finally:
                reader.close()
            found |= {text: times for texts in captions.values() for text in texts if content_digest(text) == digest}
        return found


def _inspection(
    opened: _ShardLayout,
    stats: DatasetStats,
    *,
    selected: int | None,
    context_length: int | None,
    near_duplicates: int | None,
) -> Inspection:
    return Inspection(
        shards=len(opened.shards),
        samples=opened.starts[-1],
        selected=selected,
        image_bytes=opened.image_bytes,
        looked_at=stats.looked_at,
        damaged=tuple(opened.damaged),
        corrupt=tuple(stats.bad),
        reasons=dict(stats.reasons.most_common()),
        formats=dict(stats.formats.most_common()),
        traits=dict(stats.traits.most_common()),
        languages=stats.languages(),
        context_length=context_length,
        columns=stats.columns(),
        near_duplicates=near_duplicates,
        repeated_captions=opened.texts(stats.repeated_captions()),
        shown=tuple(stats.shown),
        duplicate_pictures=stats.duplicate_pictures,
        duplicate_keys=stats.duplicate_keys,
        widths=stats.widths,
        heights=stats.heights,
        aspects=stats.aspects,
        sizes=stats.sizes,
    )
