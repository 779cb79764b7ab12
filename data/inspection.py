"""Looking at shards: what they hold, what is damaged, what is there twice."""

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vlm.console import progress
from vlm.data.decode import open_picture, to_rgb, upright_size
from vlm.data.samples import Captions, Sample
from vlm.data.shards import ShardReader
from vlm.data.tar_index import open_index
from vlm.errors import BadSample, VlmError

_MOST_SHOWN = 20
_THUMBNAIL_PIXELS = 200


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How numbers are spread; `edges` are the bounds of the bins whose sizes `counts` gives."""

    least: float
    median: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LanguageFacts:
    """Captions of one language; an empty code stands for captions that do not name theirs."""

    captions: int
    distinct: int
    per_picture: Spread
    words: Spread
    characters: Spread


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A sample that cannot be used, or a whole shard that ends early (then without a key)."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample for the contact sheet; `picture` is a small JPEG."""

    key: str
    picture: bytes = field(repr=False)
    width: int
    height: int
    captions: Captions


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What shards hold.

    samples, image_bytes: of all shards; everything else is about the `looked_at` samples among them.
    corrupt: samples by what is wrong; damaged: shards that end early or cannot be read.
    duplicate_pictures: samples whose picture, bit for bit, an earlier one has; duplicate_keys likewise.
    repeated_captions: the most frequent captions that occur more than once, with their numbers.
    """

    shards: int
    samples: int
    image_bytes: int
    looked_at: int
    damaged: tuple[BadRecord, ...]
    corrupt: tuple[BadRecord, ...]
    formats: dict[str, int]
    widths: Spread | None
    heights: Spread | None
    languages: dict[str, LanguageFacts]
    duplicate_pictures: int
    duplicate_keys: int
    repeated_captions: dict[str, int]
    shown: tuple[Shown, ...]

    def facts(self) -> dict[str, Any]:
        """All but the pictures, as plain values."""
        values = asdict(self)
        del values["shown"]
        return values


def inspect_shards(shards: Sequence[str], *, sample: int | None = None, pictures: int = 48) -> Inspection:
    """Read and decode the samples of shards, never stopping at a bad one.

    sample: look at no more than so many, evenly spread; None looks at all.
    pictures: how many to keep for the contact sheet, evenly spread.
    """
    counts, image_bytes, damaged = _open_all(shards)
    total = sum(counts)
    numbers = _spread_evenly(total, total if sample is None else sample)
    shown = {int(numbers[place]) for place in _spread_evenly(len(numbers), pictures)}
    look = _Look()
    with progress(total=len(numbers), what="inspecting", unit="sample") as bar:
        first = 0
        for shard, count in zip(shards, counts, strict=True):
            chosen = numbers[(numbers >= first) & (numbers < first + count)]
            reader = ShardReader(shard) if len(chosen) else None
            for number in chosen.tolist():
                if reader is not None:
                    look.at(reader, number - first, keep=number in shown)
                bar.update()
            if reader is not None:
                reader.close()
            first += count
    return look.result(shards=len(shards), samples=total, image_bytes=image_bytes, damaged=damaged)


def _open_all(shards: Sequence[str]) -> tuple[list[int], int, tuple[BadRecord, ...]]:
    """Samples of each shard, bytes of all pictures, and the shards that end early or cannot be opened."""
    counts: list[int] = []
    image_bytes = 0
    damaged: list[BadRecord] = []
    for shard in shards:
        try:
            index = open_index(shard)
        except VlmError as error:
            counts.append(0)
            damaged.append(BadRecord(shard=shard, key="", reason="unreadable", detail=str(error)))
            continue
        counts.append(len(index))
        image_bytes += index.image_bytes()
        if index.damage:
            damaged.append(BadRecord(shard=shard, key="", reason="ends early", detail=index.damage))
    return counts, image_bytes, tuple(damaged)


def _spread_evenly(total: int, wanted: int) -> np.ndarray:
    """Up to `wanted` numbers below `total`, ascending, evenly apart."""
    wanted = min(wanted, total)
    return (np.arange(wanted, dtype=np.int64) * total) // max(wanted, 1)


class _Look:
    """What was seen so far."""

    def __init__(self) -> None:
        self._looked_at = 0
        self._corrupt: list[BadRecord] = []
        self._formats: Counter[str] = Counter()
        self._sizes: list[tuple[int, int]] = []
        self._digests: set[bytes] = set()
        self._keys: set[str] = set()
        self._duplicate_pictures = self._duplicate_keys = 0
        self._captions: dict[str, Counter[str]] = {}
        self._per_picture: dict[str, list[int]] = {}
        self._shown: list[Shown] = []

    def at(self, reader: ShardReader, number: int, *, keep: bool) -> None:
        """Take in one sample."""
        self._looked_at += 1
        try:
            sample = reader.read(number)
            self._take_captions(sample.captions)
            self._take_identity(sample)
            self._take_picture(sample, keep=keep)
            if not sample.captions:
                raise BadSample("no caption", "neither a text nor captions")
        except BadSample as error:
            key = reader.index[number].key
            self._corrupt.append(BadRecord(shard=reader.address, key=key, reason=error.reason, detail=error.detail))

    def result(self, *, shards: int, samples: int, image_bytes: int, damaged: tuple[BadRecord, ...]) -> Inspection:
        """The whole picture."""
        sizes = np.array(self._sizes).reshape(-1, 2)
        all_captions = sum(self._captions.values(), Counter())
        return Inspection(
            shards=shards,
            samples=samples,
            image_bytes=image_bytes,
            looked_at=self._looked_at,
            damaged=damaged,
            corrupt=tuple(self._corrupt),
            formats=dict(self._formats.most_common()),
            widths=spread(sizes[:, 0]) if len(sizes) else None,
            heights=spread(sizes[:, 1]) if len(sizes) else None,
            languages={name: self._language(name) for name in self._captions},
            duplicate_pictures=self._duplicate_pictures,
            duplicate_keys=self._duplicate_keys,
            repeated_captions={text: n for text, n in all_captions.most_common(_MOST_SHOWN) if n > 1},
            shown=tuple(self._shown),
        )

    def _take_captions(self, captions: Captions) -> None:
        for language, texts in captions.items():
            self._captions.setdefault(language, Counter()).update(texts)
            self._per_picture.setdefault(language, []).append(len(texts))

    def _take_identity(self, sample: Sample) -> None:
        digest = hashlib.sha256(sample.image).digest()
        self._duplicate_pictures += digest in self._digests
        self._duplicate_keys += sample.key in self._keys
        self._digests.add(digest)
        self._keys.add(sample.key)

    def _take_picture(self, sample: Sample, *, keep: bool) -> None:
        picture = open_picture(sample.image)
        width, height = upright_size(picture)
        name = picture.format or "unknown"
        rgb = to_rgb(picture, resolution=min(1.0, _THUMBNAIL_PIXELS / max(width, height)))
        self._formats[name] += 1
        self._sizes.append((width, height))
        if keep:
            self._shown.append(
                Shown(
                    key=sample.key,
                    picture=_thumbnail(rgb),
                    width=width,
                    height=height,
                    captions=sample.captions,
                )
            )

    def _language(self, name: str) -> LanguageFacts:
        texts = self._captions[name]
        times = list(texts.values())
        return LanguageFacts(
            captions=sum(times),
            distinct=len(texts),
            per_picture=spread(np.array(self._per_picture[name])),
            words=spread(np.repeat([len(text.split()) for text in texts], times)),
            characters=spread(np.repeat([len(text) for text in texts], times)),
        )


def _thumbnail(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=80)
    return file.getvalue()


def spread(values: np.ndarray, *, bins: int = 24) -> Spread:
    """Least, median, most, and a histogram; whole numbers get bins of whole width.

    >>> spread(np.array([1, 1, 2, 4])).counts
    (2, 1, 0, 1)
    """
    least, most = int(values.min()), int(values.max())
    width = -(-(most - least + 1) // bins)
    edges = np.arange(least, most + width + 1, width)
    counts, _ = np.histogram(values, bins=edges)
    return Spread(
        least=least,
        median=float(np.median(values)),
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )
