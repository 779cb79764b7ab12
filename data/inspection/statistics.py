"""Dataset statistics: counts and distributions, summed up sample by sample in bounded memory."""

from array import array
from collections import Counter
from typing import Any

import numpy as np

from vlm.data.dedup import DISTANCE, THUMBNAIL_BYTES, DigestList, near_duplicate_pairs
from vlm.data.inspection.distribution import Distribution, distribution_of_counts, log_distribution
from vlm.data.inspection.findings import BadRecord, ColumnStats, ContactSheetSample, LanguageStats
from vlm.data.inspection.sample_scan import CaptionScan, SampleScan

# bounds of what is kept by name; everything beyond is only counted
_MAX_BAD = 1000
_MAX_COLUMNS = 64
_MAX_VALUES = 20


class DatasetStats:
    """The statistics of the samples added so far.

    Memory: 48 bytes a sample (two digests, the size and the shape of the image) and 26 a caption (digest, sample,
    language), with signatures 1,160 more an image; everything else is bounded.
    """

    def __init__(self, context_length: int | None = None) -> None:
        self.looked_at = 0
        self.reasons: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.traits: Counter[str] = Counter()
        self.bad: list[BadRecord] = []
        self.shown: list[ContactSheetSample] = []
        self._keys = DigestList()
        self._images = DigestList()
        self._widths: Counter[int] = Counter()
        self._heights: Counter[int] = Counter()
        # packed: a list of Python floats takes four times the memory
        self._aspects = array("d")
        self._sizes = array("Q")
        self._captions = _CaptionStats(context_length)
        self._lines = 0
        self._samples_of_lines = 0
        self._columns: dict[str, _ColumnCounter] = {}
        self._hashes = array("Q")
        self._thumbnails = bytearray()

    def add(self, scan: SampleScan) -> None:
        """Take in one sample."""
        self.looked_at += 1
        if scan.captions is not None:
            self._captions.add(scan.number, scan.captions)
            self._lines += scan.caption_lines
            self._samples_of_lines += scan.caption_lines > sum(map(len, scan.captions.values()))
        for name, values in (scan.columns or {}).items():
            if name in self._columns or len(self._columns) < _MAX_COLUMNS:
                self._columns.setdefault(name, _ColumnCounter()).add(values)
        # each part counts as far as the sample could be read: a damaged image still has a key and captions
        if scan.key:
            self._keys.add(scan.key)
            self._images.add(scan.image_digest)
            self._sizes.append(max(scan.image_bytes, 1))  # their distribution is logarithmic
        if scan.image is not None:
            self.formats[scan.image.format] += 1
            self.traits.update(scan.image.traits)
            self._widths[scan.image.width] += 1
            self._heights[scan.image.height] += 1
            self._aspects.append(scan.image.width / scan.image.height)
        if scan.signature is not None:
            self._hashes.append(scan.signature.hash)
            self._thumbnails += scan.signature.thumbnail.tobytes()
        if scan.shown is not None:
            self.shown.append(scan.shown)
        if scan.bad is not None:
            self.reasons[scan.bad.reason] += 1
            if len(self.bad) < _MAX_BAD:
                self.bad.append(scan.bad)

    @property
    def widths(self) -> Distribution | None:
        """Of the images, in pixels."""
        return distribution_of_counts(self._widths) if self._widths else None

    @property
    def heights(self) -> Distribution | None:
        """Of the images, in pixels."""
        return distribution_of_counts(self._heights) if self._heights else None

    @property
    def aspects(self) -> Distribution | None:
        """Of the images, width / height."""
        return log_distribution(np.array(self._aspects)) if self._aspects else None

    @property
    def sizes(self) -> Distribution | None:
        """Of the encoded images, in bytes."""
        return log_distribution(np.array(self._sizes, dtype=np.float64)) if self._sizes else None

    @property
    def duplicate_pictures(self) -> int:
        """Samples whose image, bit for bit, an earlier one has."""
        return len(self._images) - self._images.distinct()

    @property
    def duplicate_keys(self) -> int:
        """Samples whose key an earlier one has."""
        return len(self._keys) - self._keys.distinct()

    def near_duplicates(self) -> int:
        """Images that look like an earlier one (`vlm.data.dedup`)."""
        hashes = np.array(self._hashes, dtype=np.uint64)
        thumbnails = np.frombuffer(self._thumbnails, np.uint8).reshape(-1, THUMBNAIL_BYTES)
        is_later = np.zeros(len(hashes), dtype=bool)
        if len(hashes):
            for one, other in near_duplicate_pairs(hashes, thumbnails, distance=DISTANCE):
                # the later of a pair: the first of a group is no duplicate
                is_later[np.maximum(one, other)] = True
        return int(is_later.sum())

    def languages(self) -> dict[str, LanguageStats]:
        """The captions by language."""
        return self._captions.summarize()

    def caption_lines(self) -> dict[str, int] | None:
        """Samples whose captions go over several lines, and all captions if each line is one; None without such."""
        if not self._samples_of_lines:
            return None
        return {"samples": self._samples_of_lines, "captions": self._lines}

    @property
    def garbled_captions(self) -> int:
        """Captions of which some bytes were not text in UTF-8."""
        return self._captions.num_garbled

    def repeated_captions(self) -> list[tuple[int, bytes, int]]:
        """Of the captions that occur most: number of a sample that has it, its digest, how often it occurs."""
        return self._captions.repeated()

    def columns(self) -> dict[str, ColumnStats]:
        """The columns of the metadata."""
        return {name: column.summarize() for name, column in self._columns.items()}


class _CaptionStats:
    """Captions by language; languages are numbered in the order in which they are first met."""

    def __init__(self, context_length: int | None) -> None:
        self.num_garbled = 0
        self._context_length = context_length
        self._digests = DigestList()
        self._samples = array("Q")
        self._languages = array("H")
        # counts of lengths rather than lengths: captions have few different ones
        self._lengths: dict[str, dict[str, Counter[int]]] = {}

    def add(self, number: int, captions: dict[str, tuple[CaptionScan, ...]]) -> None:
        for language, scans in captions.items():
            if language not in self._lengths:
                names = ("per_picture", "words", "characters", "tokens")
                self._lengths[language] = {name: Counter() for name in names}
            lengths = self._lengths[language]
            lengths["per_picture"][len(scans)] += 1
            language_number = list(self._lengths).index(language)
            for caption in scans:
                self._digests.add(caption.digest)
                self._samples.append(number)
                self._languages.append(language_number)
                lengths["words"][caption.words] += 1
                lengths["characters"][caption.characters] += 1
                lengths["tokens"][caption.tokens] += 1
                self.num_garbled += caption.is_garbled

    def summarize(self) -> dict[str, LanguageStats]:
        language_numbers = np.array(self._languages, dtype=np.uint16)
        limit = self._context_length
        summary: dict[str, LanguageStats] = {}
        for language_number, (language, lengths) in enumerate(self._lengths.items()):
            distributions: dict[str, Any] = {name: distribution_of_counts(times) for name, times in lengths.items()}
            num_cut = 0
            if limit is None:
                distributions["tokens"] = None
            elif limit:
                for tokens, times in lengths["tokens"].items():
                    if tokens > limit:
                        num_cut += times
            summary[language] = LanguageStats(
                captions=lengths["words"].total(),
                distinct=self._digests.distinct(language_numbers == language_number),
                cut=num_cut,
                **distributions,
            )
        return summary

    def repeated(self) -> list[tuple[int, bytes, int]]:
        most_repeated = self._digests.most_repeated(_MAX_VALUES)
        repeated: list[tuple[int, bytes, int]] = []
        for position, times in most_repeated:
            repeated.append((self._samples[position], self._digests[position], times))
        return repeated


class _ColumnCounter:
    def __init__(self) -> None:
        self._samples = 0
        self._values = BoundedCounter()

    def add(self, values: tuple[str, ...]) -> None:
        self._samples += 1
        for value in values:
            self._values.add(value)

    def summarize(self) -> ColumnStats:
        most: dict[str, int] = {}
        for value, times in self._values.most_common(_MAX_VALUES).items():
            # a value that occurs once (an address, a number) says nothing about the column
            if times > 1:
                most[value] = times
        return ColumnStats(samples=self._samples, distinct=len(self._values), is_exact=self._values.is_exact, most=most)


class BoundedCounter:
    """How often values occur, for at most `limit` different ones: past it the rarer half is forgotten.

    Frequent values keep their count; once something was forgotten, `is_exact` is False and the rarer counts are
    lower bounds.
    """

    def __init__(self, limit: int = 50_000) -> None:
        self._limit = limit
        self._counts = Counter[str]()
        self.is_exact = True

    def add(self, value: str) -> None:
        """Count one."""
        self._counts[value] += 1
        if len(self._counts) > self._limit:
            # by half, so that the sort is paid once for many values
            self._counts = Counter(dict(self._counts.most_common(self._limit // 2)))
            self.is_exact = False

    def __len__(self) -> int:
        return len(self._counts)

    def most_common(self, number: int) -> dict[str, int]:
        """The most frequent values with their counts; equal ones in the order in which they were met."""
        return dict(self._counts.most_common(number))
