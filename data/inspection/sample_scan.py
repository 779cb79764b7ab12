"""What one sample shows when it is inspected, small enough to cross between processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm.data.decode import jpeg_thumbnail, open_image, to_rgb, upright_size
from vlm.data.dedup import ImageSignature, image_signature
from vlm.data.inspection.findings import BadRecord, ContactSheetSample
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
