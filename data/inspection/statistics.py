"""Dataset statistics: what one sample shows, and counts and distributions summed up over all in bounded memory."""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm.data.decode import jpeg_thumbnail, open_image, to_rgb, upright_size
from vlm.data.dedup import DISTANCE, THUMBNAIL_BYTES, DigestList, ImageSignature, image_signature, near_duplicate_pairs
from vlm.data.inspection.findings import (
    BadRecord,
    ColumnStats,
    ContactSheetSample,
    Distribution,
    LanguageStats,
    distribution_of_counts,
    log_distribution,
)
from vlm.data.samples import REPLACEMENT_CHARACTER, Captions, Sample, parse_tags, split_lines
from vlm.data.tar import ShardReader
from vlm.data.tokenizers import Tokenizer, open_tokenizer
from vlm.errors import BadSample
from vlm.files import content_digest

MAX_COUNTED_TOKENS = 1024
"""Tokens past which the length of a caption is no longer counted."""

# bounds of what crosses between processes for each sample
_THUMBNAIL_PIXELS = 200
_MAX_VALUE_LENGTH = 60
# of one sample, and of all together
_MAX_COLUMNS = 64
_ORIENTATION = 0x0112


class CaptionScan(NamedTuple):
    """A caption: what it is, and its lengths. tokens: 0 without a tokenizer. is_garbled: bytes of it were no text."""

    digest: bytes
    words: int
    characters: int
    tokens: int
    is_garbled: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageScan:
    """An image that can be decoded. width, height: upright, in pixels."""

    format: str
    width: int
    height: int
    traits: tuple[str, ...]


@dataclass(kw_only=True)
class SampleScan:
    """One sample; what cannot be read or decoded stays empty, and `bad` says why."""

    number: int
    key: bytes = b""
    image_digest: bytes = b""
    image_bytes: int = 0
    captions: dict[str, tuple[CaptionScan, ...]] | None = None
    caption_lines: int = 0
    columns: dict[str, tuple[str, ...]] | None = None
    image: ImageScan | None = None
    signature: ImageSignature | None = None
    shown: ContactSheetSample | None = None
    bad: BadRecord | None = None


class ScanChunk(NamedTuple):
    """Samples of one shard to scan.

    first: number in all shards of the first sample of this one. numbers: of the samples in this shard. on_sheet: those,
    by number in all shards, that the contact sheet shows.
    """

    shard: str
    first: int
    numbers: tuple[int, ...]
    on_sheet: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """What to scan for. tokenizer: as `open_tokenizer` takes it; empty counts no tokens."""

    tokenizer: str = ""
    with_signatures: bool = False


class SampleScanner:
    """Scans the samples of a chunk, never stopping at a bad one. Of a process for `vlm.data.shard_workers`."""

    def __init__(self, options: ScanOptions) -> None:
        self._tokenizer = open_tokenizer(options.tokenizer, MAX_COUNTED_TOKENS) if options.tokenizer else None
        self._with_signatures = options.with_signatures

    def __call__(self, reader: ShardReader, chunk: ScanChunk) -> list[SampleScan]:
        """The scans of a chunk's samples, in its order."""
        return [self._scan_sample(reader, chunk, number) for number in chunk.numbers]

    def _scan_sample(self, reader: ShardReader, chunk: ScanChunk, number: int) -> SampleScan:
        scan = SampleScan(number=chunk.first + number)
        try:
            sample = reader.read(number)
            scan.captions = self._scan_captions(sample.captions)
            scan.caption_lines = sum(len(texts) for texts in split_lines(sample.captions).values())
            scan.columns = metadata_columns(sample.metadata)
            scan.key = content_digest(sample.key)
            scan.image_digest = content_digest(sample.image)
            scan.image_bytes = len(sample.image)
            self._scan_image(scan, sample, is_on_sheet=scan.number in chunk.on_sheet)
            # last, so that a sample without captions still counts in the statistics of images
            if not sample.captions:
                raise BadSample("no caption", "neither a text nor captions")
        except BadSample as error:
            key, offset = reader.key_and_offset(number)
            scan.bad = BadRecord(shard=reader.url, key=key, offset=offset, reason=error.reason, detail=error.detail)
        return scan

    def _scan_image(self, scan: SampleScan, sample: Sample, *, is_on_sheet: bool) -> None:
        image = open_image(sample.image)
        width, height = upright_size(image)
        image_format = image.format or "unknown"
        traits = image_traits(image)
        # every image is decoded, for damage shows only then
        rgb = to_rgb(image, resolution=min(1.0, _THUMBNAIL_PIXELS / max(width, height)))
        scan.image = ImageScan(format=image_format, width=width, height=height, traits=traits)
        if self._with_signatures:
            scan.signature = image_signature(sample.image)
        if is_on_sheet:
            scan.shown = ContactSheetSample(
                key=sample.key,
                image=jpeg_thumbnail(rgb, pixels=_THUMBNAIL_PIXELS),
                width=width,
                height=height,
                captions=sample.captions,
            )

    def _scan_captions(self, captions: Captions) -> dict[str, tuple[CaptionScan, ...]]:
        # all captions of the sample are tokenized at once
        all_texts = [*chain.from_iterable(captions.values())]
        lengths = token_lengths(self._tokenizer, all_texts) if self._tokenizer else [0] * len(all_texts)
        num_tokens = iter(lengths)
        scans: dict[str, tuple[CaptionScan, ...]] = {}
        for language, texts in captions.items():
            own_scans: list[CaptionScan] = []
            for text in texts:
                words = len(text.split())
                is_garbled = REPLACEMENT_CHARACTER in text
                own_scans.append(CaptionScan(content_digest(text), words, len(text), next(num_tokens), is_garbled))
            scans[language] = tuple(own_scans)
        return scans


def token_lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with its start and end, as far as the tokenizer's context goes."""
    if not texts:
        return []
    rows = tokenizer.encode(texts)
    is_end = rows == tokenizer.end_token
    # the first end token: where padding is the same token, it fills the rest of the row
    upto_end = is_end.argmax(axis=1) + 1
    return np.where(is_end.any(axis=1), upto_end, (rows != tokenizer.pad_token).sum(axis=1)).tolist()


def metadata_columns(metadata: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The metadata columns of a sample, with their texts (or a list's entries); other values give none.

    >>> metadata_columns({"captions": ["a dog"], "tags": "dog, wet", "width": 3, "source": "zoo"})
    {'tags': ('dog', 'wet'), 'width': (), 'source': ('zoo',)}
    """
    columns: dict[str, tuple[str, ...]] = {}
    for name, value in metadata.items():
        if name.startswith("caption"):
            continue
        if len(columns) == _MAX_COLUMNS:
            break
        values = value if isinstance(value, list) else [value]
        if name == "tags":
            values = parse_tags(metadata)
        texts: list[str] = []
        for text in values:
            if isinstance(text, str) and text:
                texts.append(text[:_MAX_VALUE_LENGTH])
        columns[name] = tuple(texts)
    return columns


def image_traits(image: Image.Image) -> tuple[str, ...]:
    """What is special about an image whose header was read: alpha, palette, CMYK, grey, 16-bit, animated, turned."""
    mode = image.mode
    # Pillow opens a 16-bit colour PNG as 8-bit RGB; only its tile still names the stored mode
    tile = getattr(image, "tile", None)
    stored_mode = str(tile[0][-1]) if tile else ""
    traits = {
        "alpha": "A" in image.getbands() or "transparency" in image.info,
        "palette": mode == "P",
        "CMYK": mode == "CMYK",
        "grey": mode in ("1", "L", "LA") or mode.startswith(("I", "F")),
        "16-bit": mode.startswith("I") or ";16" in stored_mode,
        "animated": bool(getattr(image, "is_animated", False)),
        "turned by EXIF": image.getexif().get(_ORIENTATION, 1) != 1,
    }
    return tuple(name for name, has_trait in traits.items() if has_trait)


# bounds of what is kept by name; everything beyond is only counted
_MAX_BAD = 1000
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
