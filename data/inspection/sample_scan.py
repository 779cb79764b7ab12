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

from vlm.data.decode import open_picture, to_rgb, upright_size
from vlm.data.dedup import Look, digest_of, look_of
from vlm.data.inspection.findings import BadRecord, Shown
from vlm.data.samples import Captions, Sample, tags_of
from vlm.data.tar import ShardReader
from vlm.data.tokenizers import Tokenizer, open_tokenizer
from vlm.errors import BadSample, VlmError

UNCUT_LENGTH = 1024
"""Tokens past which a caption's length is no longer told."""

_THUMBNAIL_PIXELS = 200
_LONGEST_VALUE = 60
_MOST_COLUMNS = 64
_ORIENTATION = 0x0112


class CaptionGlance(NamedTuple):
    """A caption: what it is, and its lengths. tokens: 0 without a tokenizer."""

    digest: bytes
    words: int
    characters: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class PictureGlance:
    """A picture that could be decoded. width, height: upright, in pixels."""

    format: str
    width: int
    height: int
    traits: tuple[str, ...]


@dataclass(kw_only=True)
class Glance:
    """One sample; what could not be had stays empty, and `bad` says why."""

    number: int
    key: bytes = b""
    image: bytes = b""
    image_bytes: int = 0
    captions: dict[str, tuple[CaptionGlance, ...]] | None = None
    columns: dict[str, tuple[str, ...]] | None = None
    picture: PictureGlance | None = None
    look: Look | None = None
    shown: Shown | None = None
    bad: BadRecord | None = None


class Portion(NamedTuple):
    """Samples of one shard to look at: their numbers in it, and in the whole corpus; and which are kept to be shown."""

    shard: str
    first: int
    numbers: tuple[int, ...]
    kept: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to look for. tokenizer: as `open_tokenizer` takes it; empty counts no tokens. looks: take them."""

    tokenizer: str = ""
    looks: bool = False


class Glancer:
    """Looks at portions of shards; keeps the shard used last open."""

    def __init__(self, wanted: Wanted) -> None:
        self._tokenizer = open_tokenizer(wanted.tokenizer, UNCUT_LENGTH) if wanted.tokenizer else None
        self._looks = wanted.looks
        self._reader: ShardReader | None = None

    def __call__(self, portion: Portion) -> list[Glance]:
        """Look at each sample of a portion, never stopping at a bad one."""
        reader = self._open(portion.shard)
        return [self._glance(reader, portion, number) for number in portion.numbers]

    def close(self) -> None:
        """Release the shard."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self, shard: str) -> ShardReader:
        if self._reader is None or self._reader.address != shard:
            self.close()
            self._reader = ShardReader(shard)
        return self._reader

    def _glance(self, reader: ShardReader, portion: Portion, number: int) -> Glance:
        seen = Glance(number=portion.first + number)
        try:
            sample = reader.read(number)
            seen.captions = self._captions(sample.captions)
            seen.columns = columns_of(sample.metadata)
            seen.key, seen.image, seen.image_bytes = digest_of(sample.key), digest_of(sample.image), len(sample.image)
            self._take_picture(seen, sample, keep=seen.number in portion.kept)
            if not sample.captions:
                raise BadSample("no caption", "neither a text nor captions")
        except BadSample as error:
            key, offset = reader.place(number)
            seen.bad = BadRecord(shard=reader.address, key=key, offset=offset, reason=error.reason, detail=error.detail)
        return seen

    def _take_picture(self, seen: Glance, sample: Sample, *, keep: bool) -> None:
        picture = open_picture(sample.image)
        width, height = upright_size(picture)
        name, traits = picture.format or "unknown", traits_of(picture)
        rgb = to_rgb(picture, resolution=min(1.0, _THUMBNAIL_PIXELS / max(width, height)))
        seen.picture = PictureGlance(format=name, width=width, height=height, traits=traits)
        seen.look = look_of(sample.image) if self._looks else None
        if keep:
            small = _thumbnail(rgb)
            seen.shown = Shown(key=sample.key, picture=small, width=width, height=height, captions=sample.captions)

    def _captions(self, captions: Captions) -> dict[str, tuple[CaptionGlance, ...]]:
        texts = [text for several in captions.values() for text in several]
        tokens = iter(token_lengths(self._tokenizer, texts) if self._tokenizer else [0] * len(texts))
        return {
            language: tuple(
                CaptionGlance(digest_of(text), len(text.split()), len(text), next(tokens)) for text in several
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


def columns_of(metadata: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """The columns of a sample other than its captions, with their texts (a list's entries); other values give none.

    >>> columns_of({"captions": ["a dog"], "tags": "dog, wet", "width": 3, "source": "zoo"})
    {'tags': ('dog', 'wet'), 'width': (), 'source': ('zoo',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, value in metadata.items():
        if name.startswith("caption"):
            continue
        if len(found) == _MOST_COLUMNS:
            break
        values = tags_of(metadata) if name == "tags" else value if isinstance(value, list) else [value]
        found[name] = tuple(text[:_LONGEST_VALUE] for text in values if isinstance(text, str) and text)
    return found


def traits_of(picture: Image.Image) -> tuple[str, ...]:
    """What is special about a picture whose header was read: alpha, palette, CMYK, grey, 16-bit, animated, turned."""
    mode = picture.mode
    stored = str(tile[0][-1]) if (tile := getattr(picture, "tile", None)) else ""
    traits = {
        "alpha": "A" in picture.getbands() or "transparency" in picture.info,
        "palette": mode == "P",
        "CMYK": mode == "CMYK",
        "grey": mode in ("1", "L", "LA") or mode.startswith(("I", "F")),
        "16-bit": mode.startswith("I") or ";16" in stored,
        "animated": bool(getattr(picture, "is_animated", False)),
        "turned by EXIF": picture.getexif().get(_ORIENTATION, 1) != 1,
    }
    return tuple(name for name, is_so in traits.items() if is_so)


def _thumbnail(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    file = io.BytesIO()
    small.save(file, format="JPEG", quality=80)
    return file.getvalue()


_AHEAD = 4
_glancer: Glancer | None = None


def glance_all(portions: Iterable[Portion], wanted: Wanted, *, workers: int = 0) -> Iterator[list[Glance]]:
    """What each portion shows, in the order of the portions.

    workers: processes that read and decode; 0 does it in this one. Each has no more than a few portions under way.

    Raises:
        VlmError: a process was ended from outside.
    """
    if not workers:
        glancer = Glancer(wanted)
        try:
            yield from map(glancer, portions)
        finally:
            glancer.close()
        return
    # spawned, not forked: this process may have threads by now
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(wanted,))
    waiting: deque[Future[list[Glance]]] = deque()
    try:
        for portion in portions:
            waiting.append(pool.submit(_glance_in_worker, portion))
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


def _begin(wanted: Wanted) -> None:
    global _glancer
    _glancer = Glancer(wanted)


def _glance_in_worker(portion: Portion) -> list[Glance]:
    assert _glancer is not None
    return _glancer(portion)
