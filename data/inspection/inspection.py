"""Inspecting shards: what they hold, what is damaged, what occurs twice."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from vlm.console import progress
from vlm.data.inspection.findings import BadRecord, Inspection
from vlm.data.inspection.statistics import DatasetStats, SampleScanner, ScanChunk, ScanOptions
from vlm.data.shard_workers import scan_shards
from vlm.data.shards import track_indexing
from vlm.data.tar import ShardReader, open_index
from vlm.data.tokenizers import open_tokenizer
from vlm.errors import UsageError, VlmError
from vlm.files import content_digest
from vlm.storage import url_basename

if TYPE_CHECKING:
    from vlm.data.selection import Selection


NEAR_LIMIT = 100_000
"""Samples up to which near-duplicates are searched: 1,160 bytes each, and all are compared."""

_MAX_UNUSED = 20
_CHUNK_SAMPLES = 64
"""Few, since each is decoded, tokenized and hashed, and a chunk's thumbnails wait in memory for their turn."""


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

    sample: read at most so many, evenly spaced; None reads all.
    images: how many to keep for the contact sheet, evenly spaced.
    workers: processes that read and decode; the result is the same for any number.
    selection: read only what it keeps.
    near_limit: search near-duplicates among at most so many samples; among more, not at all.
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
    # opened here as well, so that a wrong name ends the command before any shard is read
    limit = open_tokenizer(tokenizer, context_length).context_length if tokenizer else None
    layout = _ShardLayout(shards)
    selected = layout.selected_numbers(selection)
    numbers = selected[evenly_spaced(len(selected), len(selected) if sample is None else sample)]
    # of those that are read, so that the sheet shows nothing the statistics do not cover
    on_sheet = frozenset(numbers[evenly_spaced(len(numbers), images)].tolist())

    stats = DatasetStats(limit)
    options = ScanOptions(tokenizer=tokenizer, with_signatures=len(numbers) <= near_limit)
    make_scan = partial(SampleScanner, options)
    with progress(total=len(numbers), what="inspecting", unit="sample") as bar:
        for scans in scan_shards(make_scan, layout.chunks(numbers, on_sheet), workers=workers):
            for scan in scans:
                stats.add(scan)
            bar.update(len(scans))
    return _inspection(
        layout,
        stats,
        selected=None if selection is None else len(selected),
        context_length=limit,
        near_duplicates=stats.near_duplicates() if options.with_signatures else None,
    )


def evenly_spaced(total: int, number: int) -> np.ndarray:
    """Up to `number` positions below `total`, ascending, evenly spaced."""
    number = min(number, total)
    # multiplied before divided, in 64 bits: no rounding, and no position twice
    return (np.arange(number, dtype=np.int64) * total) // max(number, 1)


class _ShardLayout:
    """The shards with what their indexes say; samples are numbered through over all shards.

    starts: number of the first sample of each shard, and the total. damaged: shards that end early, cannot be read, or
    hold no samples. unused: members that no sample uses, by extension. repeated: samples that begin with a member
        whose name the sample before has already, by shard and key.

    Raises:
        VlmError: none can be read.
    """

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = tuple(shards)
        self.starts = [0]
        self.image_bytes = 0
        self.unused: Counter[str] = Counter()
        self.repeated: Counter[str] = Counter()
        self.damaged: list[BadRecord] = []
        is_any_read = False
        for shard in track_indexing(shards, total=len(shards)):
            try:
                index = open_index(shard)
            except VlmError as error:
                # it stays in the list without samples, so that shards and starts run in parallel
                self.starts.append(self.starts[-1])
                self.damaged.append(BadRecord(shard=shard, key="", reason="unreadable", detail=str(error)))
                continue
            self.starts.append(self.starts[-1] + len(index))
            self.image_bytes += index.image_bytes()
            self.unused.update(index.unused)
            self.repeated.update(f"{url_basename(shard)}: {key}" for key in index.repeated_keys())
            is_any_read = True
            if not len(index) and not index.damage:
                detail = "no key.jpg with key.txt or key.json; leave it out, training and embedding refuse it"
                self.damaged.append(BadRecord(shard=shard, key="", reason="no samples", detail=detail))
            if index.damage:
                self.damaged.append(BadRecord(shard=shard, key="", reason="ends early", detail=index.damage))
        if self.damaged and not is_any_read:
            others = f" The other {len(shards) - 1:,} cannot be read either." if len(shards) > 1 else ""
            raise VlmError(f"{self.damaged[0].detail}{others}")

    def selected_numbers(self, selection: "Selection | None") -> np.ndarray:
        """The numbers of the samples a selection keeps, ascending."""
        if selection is None:
            return np.arange(self.starts[-1], dtype=np.int64)
        # a shard that cannot be opened has no samples, and the selection does not know it
        filled: list[str] = []
        starts: list[int] = []
        for shard, (start, end) in zip(self.shards, pairwise(self.starts), strict=True):
            if start < end:
                filled.append(shard)
                starts.append(start)
        numbers = [np.zeros(0, np.int64)]
        for start, shard_times in zip(starts, selection.times_of(filled), strict=True):
            numbers.append(np.flatnonzero(shard_times) + start)
        return np.concatenate(numbers)

    def chunks(self, numbers: np.ndarray, on_sheet: frozenset[int]) -> Iterator[ScanChunk]:
        """The samples to scan, in order, none of two shards in one chunk."""
        for position, shard in enumerate(self.shards):
            first, last = self.starts[position : position + 2]
            in_shard = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, last)] - first
            for begin in range(0, len(in_shard), _CHUNK_SAMPLES):
                part = in_shard[begin : begin + _CHUNK_SAMPLES]
                # a chunk travels by pickle, so it takes only its own share of the sheet
                on_sheet_here = on_sheet.intersection((part + first).tolist())
                yield ScanChunk(shard, first, tuple(part.tolist()), on_sheet_here)

    def texts_of(self, repeated: list[tuple[int, bytes, int]]) -> dict[str, int]:
        """The captions behind digests, read again, with how often they occur."""
        times_of: dict[str, int] = {}
        for number, digest, times in repeated:
            position = bisect_right(self.starts, number) - 1
            # the statistics keep digests, not texts; only the few most frequent are read again
            reader = ShardReader(self.shards[position])
            try:
                captions = reader.read(number - self.starts[position]).captions
            finally:
                reader.close()
            for text in chain.from_iterable(captions.values()):
                if content_digest(text) == digest:
                    times_of[text] = times
        return times_of


def _inspection(
    layout: _ShardLayout,
    stats: DatasetStats,
    *,
    selected: int | None,
    context_length: int | None,
    near_duplicates: int | None,
) -> Inspection:
    return Inspection(
        shards=len(layout.shards),
        samples=layout.starts[-1],
        selected=selected,
        image_bytes=layout.image_bytes,
        looked_at=stats.looked_at,
        damaged=tuple(layout.damaged),
        corrupt=tuple(stats.bad),
        reasons=dict(stats.reasons.most_common()),
        formats=dict(stats.formats.most_common()),
        traits=dict(stats.traits.most_common()),
        languages=stats.languages(),
        context_length=context_length,
        caption_lines=stats.caption_lines(),
        garbled_captions=stats.garbled_captions,
        repeated_members=dict(layout.repeated.most_common(_MAX_UNUSED)),
        num_repeated_members=layout.repeated.total(),
        unused_members=dict(layout.unused.most_common(_MAX_UNUSED)),
        columns=stats.columns(),
        near_duplicates=near_duplicates,
        repeated_captions=layout.texts_of(stats.repeated_captions()),
        shown=tuple(stats.shown),
        duplicate_pictures=stats.duplicate_pictures,
        duplicate_keys=stats.duplicate_keys,
        widths=stats.widths,
        heights=stats.heights,
        aspects=stats.aspects,
        sizes=stats.sizes,
    )
