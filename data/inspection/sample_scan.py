"""What one sample shows, small enough to cross between processes.

Looking with several processes; what comes out, and in which order, does not depend on how many.
"""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm.data.decode import open_image, to_rgb, upright_size
from vlm.data.dedup import ImageSignature, content_digest, image_signature
from vlm.data.inspection.findings import BadRecord, ContactSheetSample
from vlm.data.samples import Captions, Sample, parse_tags
from vlm.data.tar import ShardReader
from vlm.data.tokenizers import Tokenizer, open_tokenizer
from vlm.errors import BadSample, VlmError

MAX_COUNTED_TOKENS = 1024
"""Tokens past which a caption's length is no longer told."""

_THUMBNAIL_PIXELS = 200
_MAX_VALUE_LENGTH = 60
_MAX_COLUMNS = 64
_ORIENTATION = 0x0112


class CaptionScan(NamedTuple):
    """A caption: what it is, and its lengths. tokens: 0 without a tokenizer."""

    digest: bytes
    words: int
    characters: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ImageScan:
    """A picture that could be decoded. width, height: upright, in pixels."""

    format: str
    width: int
    height: int
    traits: tuple[str, ...]


@dataclass(kw_only=True)
class SampleScan:
    """One sample; what could not be had stays empty, and `bad` says why."""

    number: int
    key: bytes = b""
    image_digest: bytes = b""
    image_bytes: int = 0
    captions: dict[str, tuple[CaptionScan, ...]] | None = None
    columns: dict[str, tuple[str, ...]] | None = None
    image: ImageScan | None = None
    signature: ImageSignature | None = None
    shown: ContactSheetSample | None = None
    bad: BadRecord | None = None


class ScanChunk(NamedTuple):
    """Samples of one shard to look at: their numbers in it, and in the whole corpus; and which are kept to be shown."""

    shard: str
    first: int
    numbers: tuple[int, ...]
    kept: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class ScanOptions:
    """What to look for. tokenizer: as `open_tokenizer` takes it; empty counts no tokens. looks: take them."""

    tokenizer: str = ""
    with_signatures: bool = False


class SampleScanner:
    """Looks at portions of shards; keeps the shard used last open."""

    def __init__(self, options: ScanOptions) -> None:
        self._tokenizer = open_tokenizer(options.tokenizer, MAX_COUNTED_TOKENS) if options.tokenizer else None
        self._with_signatures = options.with_signatures
        self._reader: ShardReader | None = None

    def __call__(self, chunk: ScanChunk) -> list[SampleScan]:
        """Look at each sample of a portion, never stopping at a bad one."""
        reader = self._open(chunk.shard)
        return [self._scan_sample(reader, chunk, number) for number in chunk.numbers]

    def close(self) -> None:
        """Release the shard."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self, shard: str) -> ShardReader:
        if self._reader is None or self._reader.url != shard:
            self.close()
            self._reader = ShardReader(shard)
        return self._reader

    def _scan_sample(self, reader: ShardReader, chunk: ScanChunk, number: int) -> SampleScan:
        scan = SampleScan(number=chunk.first + number)
        try:
            sample = reader.read(number)
            scan.captions = self._captions(sample.captions)
            scan.columns = metadata_columns(sample.metadata)
            scan.key, scan.image_digest, scan.image_bytes = (
                content_digest(sample.key),
                content_digest(sample.image),
                len(sample.image),
            )
            self._scan_image(scan, sample, keep=scan.number in chunk.kept)
            if not sample.captions:
                raise BadSample("no caption", "neither a text nor captions")
        except BadSample as error:
            key, offset = reader.key_and_offset(number)
            scan.bad = BadRecord(shard=reader.url, key=key, offset=offset, reason=error.reason, detail=error.detail)
        return scan

    def _scan_image(self, scan: SampleScan, sample: Sample, *, keep: bool) -> None:
        image = open_image(sample.image)
        width, height = upright_size(image)
        name, traits = image.format or "unknown", image_traits(image)
        rgb = to_rgb(image, resolution=min(1.0, _THUMBNAIL_PIXELS / max(width, height)))
        scan.image = ImageScan(format=name, width=width, height=height, traits=traits)
        scan.signature = image_signature(sample.image) if self._with_signatures else None
        if keep:
            small = _thumbnail(rgb)
            scan.shown = ContactSheetSample(
                key=sample.key, image=small, width=width, height=height, captions=sample.captions
            )

    def _captions(self, captions: Captions) -> dict[str, tuple[CaptionScan, ...]]:
        texts = [text for several in captions.values() for text in several]
        tokens = iter(token_lengths(self._tokenizer, texts) if self._tokenizer else [0] * len(texts))
        return {
            language: tuple(
                CaptionScan(content_digest(text), len(text.split()), len(text), next(tokens)) for text in several
            )
            for language, several in captions.items()
        }


def token_lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Tokens of each text with its start and end, as far as the tokenizer's context goes."""
    if not texts:
        return []
    rows = tokenizer.encode(texts)
    is_end = rows == tokenizer.end_token
    upto_end = is_end.argmax(axis=1) + 1
    return np.where(is_end.any(axis=1), upto_end, (rows != tokenizer.pad_token).sum(axis=1)).tolist()


def metadata_columns(metadata: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The columns of a sample other than its captions, with their texts (a list's entries); other values give none.

    >>> metadata_columns({"captions": ["a dog"], "tags": "dog, wet", "width": 3, "source": "zoo"})
    {'tags': ('dog', 'wet'), 'width': (), 'source': ('zoo',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, value in metadata.items():
        if name.startswith("caption"):
            continue
        if len(found) == _MAX_COLUMNS:
            break
        values = parse_tags(metadata) if name == "tags" else value if isinstance(value, list) else [value]
        found[name] = tuple(text[:_MAX_VALUE_LENGTH] for text in values if isinstance(text, str) and text)
    return found


def image_traits(image: Image.Image) -> tuple[str, ...]:
    """What is special about a picture whose header was read: alpha, palette, CMYK, grey, 16-bit, animated, turned."""
    mode = image.mode
    stored = str(tile[0][-1]) if (tile := getattr(image, "tile", None)) else ""
    traits = {
        "alpha": "A" in image.getbands() or "transparency" in image.info,
        "palette": mode == "P",
        "CMYK": mode == "CMYK",
        "grey": mode in ("1", "L", "LA") or mode.startswith(("I", "F")),
        "16-bit": mode.startswith("I") or ";16" in stored,
        "animated": bool(getattr(image, "is_animated", False)),
        "turned by EXIF": image.getexif().get(_ORIENTATION, 1) != 1,
    }
    return tuple(name for name, is_so in traits.items() if is_so)


def _thumbnail(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=80)
    return file.getvalue()


_AHEAD = 4
_scanner: SampleScanner | None = None


def scan_samples(chunks: Iterable[ScanChunk], options: ScanOptions, *, workers: int = 0) -> Iterator[list[SampleScan]]:
    """What each portion shows, in the order of the portions.

    workers: processes that read and decode; 0 does it in this one. Each has no more than a few portions under way.

    Raises:
        VlmError: a process was ended from outside.
    """
    if not workers:
        scanner = SampleScanner(options)
        try:
            yield from map(scanner, chunks)
        finally:
            scanner.close()
        return
    # spawned, not forked: this process may have threads by now
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_init_worker, initargs=(options,))
    waiting: deque[Future[list[SampleScan]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_scan_in_worker, chunk))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise VlmError(
            f"One of the {workers} worker processes ended abruptly, most likely for want of memory; "
            "repeat with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _init_worker(options: ScanOptions) -> None:
    global _scanner
    _scanner = SampleScanner(options)


def _scan_in_worker(chunk: ScanChunk) -> list[SampleScan]:
    assert _scanner is not None
    return _scanner(chunk)
