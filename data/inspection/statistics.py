"""How numbers are spread: least, median, most, and a histogram.

Adding up what samples show.
"""

from array import array
from collections import Counter
from typing import Any

import numpy as np

from vlm.data.dedup import DISTANCE, THUMBNAIL_BYTES, Digests, Repeated, same_looks
from vlm.data.inspection.findings import BadRecord, ColumnFacts, LanguageFacts, Shown
from vlm.data.inspection.sample_scan import CaptionGlance, Glance
from vlm.pages import BoundedCounter, Spread, log_spread, spread_counts

_MOST_BAD = 1000
_MOST_COLUMNS = 64
_MOST_VALUES = 20


class Tally:
    """What was seen so far.

    Memory: 48 bytes a sample (two digests, the size and the shape of the picture) and 26 a caption (digest, sample,
    language), with looks 1,160 more a picture; everything else is bounded.
    """

    def __init__(self, context_length: int | None = None) -> None:
        self.looked_at = 0
        self.reasons: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.traits: Counter[str] = Counter()
        self.bad: list[BadRecord] = []
        self.shown: list[Shown] = []
        self._keys, self._pictures = Digests(), Digests()
        self._widths: Counter[int] = Counter()
        self._heights: Counter[int] = Counter()
        self._aspects, self._sizes = array("d"), array("Q")
        self._captions = _Captions(context_length)
        self._columns: dict[str, _Column] = {}
        self._hashes, self._thumbnails = array("Q"), bytearray()

    def add(self, seen: Glance) -> None:
        """Take in one sample."""
        self.looked_at += 1
        if seen.captions is not None:
            self._captions.add(seen.number, seen.captions)
        for name, values in (seen.columns or {}).items():
            if name in self._columns or len(self._columns) < _MOST_COLUMNS:
                self._columns.setdefault(name, _Column()).add(values)
        if seen.key:
            self._keys.add(seen.key)
            self._pictures.add(seen.image)
            self._sizes.append(max(seen.image_bytes, 1))
        if seen.picture is not None:
            self.formats[seen.picture.format] += 1
            self.traits.update(seen.picture.traits)
            self._widths[seen.picture.width] += 1
            self._heights[seen.picture.height] += 1
            self._aspects.append(seen.picture.width / seen.picture.height)
        if seen.look is not None:
            self._hashes.append(seen.look.hash)
            self._thumbnails += seen.look.thumbnail.tobytes()
        if seen.shown is not None:
            self.shown.append(seen.shown)
        if seen.bad is not None:
            self.reasons[seen.bad.reason] += 1
            if len(self.bad) < _MOST_BAD:
                self.bad.append(seen.bad)

    @property
    def widths(self) -> Spread | None:
        """Of the pictures, in pixels."""
        return spread_counts(self._widths) if self._widths else None

    @property
    def heights(self) -> Spread | None:
        """Of the pictures, in pixels."""
        return spread_counts(self._heights) if self._heights else None

    @property
    def aspects(self) -> Spread | None:
        """Of the pictures, width / height."""
        return log_spread(np.array(self._aspects)) if self._aspects else None

    @property
    def sizes(self) -> Spread | None:
        """Of the encoded pictures, in bytes."""
        return log_spread(np.array(self._sizes, dtype=np.float64)) if self._sizes else None

    @property
    def duplicate_pictures(self) -> int:
        """Samples whose picture, bit for bit, an earlier one has."""
        return len(self._pictures) - self._pictures.distinct()

    @property
    def duplicate_keys(self) -> int:
        """Samples whose key an earlier one has."""
        return len(self._keys) - self._keys.distinct()

    def near_duplicates(self) -> int:
        """Pictures that look like an earlier one (`vlm.data.dedup`)."""
        hashes = np.array(self._hashes, dtype=np.uint64)
        thumbnails = np.frombuffer(self._thumbnails, np.uint8).reshape(-1, THUMBNAIL_BYTES)
        is_later = np.zeros(len(hashes), dtype=bool)
        if len(hashes):
            for one, other in same_looks(hashes, thumbnails, distance=DISTANCE):
                is_later[np.maximum(one, other)] = True
        return int(is_later.sum())

    def languages(self) -> dict[str, LanguageFacts]:
        """The captions by language."""
        return self._captions.facts()

    def repeated_captions(self) -> list[tuple[int, bytes, int]]:
        """Of the captions that occur most: number of a sample that has it, its digest, how often it occurs."""
        return self._captions.repeated()

    def columns(self) -> dict[str, ColumnFacts]:
        """The columns of the metadata."""
        return {name: column.facts() for name, column in self._columns.items()}


class _Captions:
    def __init__(self, context_length: int | None) -> None:
        self._context_length = context_length
        self._digests = Digests()
        self._samples, self._language = array("Q"), array("H")
        self._lengths: dict[str, dict[str, Counter[int]]] = {}

    def add(self, number: int, captions: dict[str, tuple[CaptionGlance, ...]]) -> None:
        for language, several in captions.items():
            lengths = self._lengths.setdefault(
                language, {name: Counter() for name in ("per_picture", "words", "characters", "tokens")}
            )
            lengths["per_picture"][len(several)] += 1
            place = list(self._lengths).index(language)
            for caption in several:
                self._digests.add(caption.digest)
                self._samples.append(number)
                self._language.append(place)
                lengths["words"][caption.words] += 1
                lengths["characters"][caption.characters] += 1
                lengths["tokens"][caption.tokens] += 1

    def facts(self) -> dict[str, LanguageFacts]:
        languages = np.array(self._language, dtype=np.uint16)
        found: dict[str, LanguageFacts] = {}
        for place, (name, lengths) in enumerate(self._lengths.items()):
            spreads: dict[str, Any] = {of: spread_counts(times) for of, times in lengths.items()}
            limit = self._context_length
            if limit is None:
                spreads["tokens"] = None
            found[name] = LanguageFacts(
                captions=lengths["words"].total(),
                distinct=self._digests.distinct(languages == place),
                cut=sum(n for tokens, n in lengths["tokens"].items() if tokens > limit) if limit else 0,
                **spreads,
            )
        return found

    def repeated(self) -> list[tuple[int, bytes, int]]:
        most: list[Repeated] = self._digests.most_repeated(_MOST_VALUES)
        return [(self._samples[place], self._digests[place], times) for place, times in most]


class _Column:
    def __init__(self) -> None:
        self._samples, self._values = 0, BoundedCounter()

    def add(self, values: tuple[str, ...]) -> None:
        self._samples += 1
        for value in values:
            self._values.add(value)

    def facts(self) -> ColumnFacts:
        most = {value: times for value, times in self._values.most_common(_MOST_VALUES).items() if times > 1}
        return ColumnFacts(samples=self._samples, distinct=len(self._values), is_exact=self._values.is_exact, most=most)
