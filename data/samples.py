"""Samples: a pair on its way into a shard, a sample on its way out, its captions, tags and arrays, its random numbers.

Every random choice about a sample comes from `SampleRng`, a pure function of the visit, so that neither the number of
workers nor a resumed run changes it.
"""

import io
import json
import math
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from struct import Struct
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import msgspec
import numpy as np

from vlm.errors import BadSample

Value = TypeVar("Value")

REPLACEMENT_CHARACTER = "\ufffd"
"""What a byte that is not text in its encoding is read as."""

UNNAMED = ""
"""The language of captions that do not say theirs."""

Captions = dict[str, tuple[str, ...]]
"""Captions by language code; `UNNAMED` where none is given."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image with its captions, as a source gives it to `vlm pack`.

    key: unique in its source, without a dot.
    image: the encoded file as it was found, in any format.
    metadata: plain JSON values, kept in `key.json`. arrays: kept as `key.NAME.npy`.
    """

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class DroppedValue(NamedTuple):
    """A value of a row that is not packed, because an earlier row of the same image has another one.

    row: where it stands, as a person finds it.
    """

    image: str
    row: str
    column: str
    value: Any
    first_value: Any


class DroppedValues(NamedTuple):
    """Those of an image: the column of each, of how many rows they are, and the first."""

    columns: list[str]
    num_rows: int
    first: DroppedValue


class Words(NamedTuple):
    """What a sample says beside its image; dropped: what it said that finds no place."""

    captions: Captions
    metadata: dict[str, Any]
    dropped: DroppedValues | None = None


@runtime_checkable
class WordedSource(Protocol):
    """A source that tells the captions and metadata of a pair without reading the image."""

    def words(self, number: int) -> Words:
        """Those of pair `number`.

        Raises:
            BadSample: it cannot be used.
        """
        ...


def without_captions(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a sample without its captions, which shards keep under names of their own."""
    others: dict[str, Any] = {}
    for name, value in metadata.items():
        if name not in ("caption", "captions") and not name.startswith("captions_"):
            others[name] = value
    return others


class Sample(NamedTuple):
    """One sample as it is stored in a shard: encoded image, captions, metadata, and the requested arrays."""

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any]
    arrays: dict[str, np.ndarray]


class SampleIndex(NamedTuple):
    """One visit of a sample: in which epoch of its source, from which shard, which number in it.

    repeat: which visit of this sample in the epoch, from 0; a selection may ask for several.
    """

    epoch: int
    shard: int
    number: int
    repeat: int = 0


def parse_captions(text: str | None, metadata: dict[str, Any]) -> Captions:
    """Captions from the `key.txt` and `key.json` of a sample.

    Read in this order: `captions` (a list, or lists by language) with any `captions_LANGUAGE` next to it;
    the text file; `caption` (img2dataset).

    >>> parse_captions(None, {"captions": ["a dog"], "captions_zh": ["狗"]})
    {'': ('a dog',), 'zh': ('狗',)}
    """
    raw = metadata.get("captions")
    captions: Captions = {}
    if isinstance(raw, dict):
        captions = {str(language): _texts(texts) for language, texts in raw.items()}
    # the first that has any: img2dataset writes a text into both the file and `caption`
    if not any(captions.values()):
        captions = {UNNAMED: _texts(raw) or _texts(text) or _texts(metadata.get("caption"))}
    for name, value in metadata.items():
        if name.startswith("captions_"):
            captions[name.removeprefix("captions_")] = _texts(value)
    if not all(captions.values()):
        captions = {language: texts for language, texts in captions.items() if texts}
    return captions


def parse_words(text: bytes, content: bytes | None, encoding: str) -> tuple[Captions, dict[str, Any]]:
    """Captions and metadata from the content of KEY.txt and KEY.json; None where there is no such file."""
    metadata = {} if content is None else _parse_json_object(content, encoding)
    return parse_captions(_decode_caption(text, encoding), metadata), metadata


def _decode_caption(data: bytes, encoding: str) -> str:
    """Text by its byte order mark, else in the encoding given, else UTF-8."""
    if not data:  # most samples have their captions in JSON
        return ""
    # a wrong byte costs a character, not the sample
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):  # neither begins any UTF-8
        return data.decode("utf-16", errors="replace")
    is_marked = data.startswith(BOM_UTF8)
    return data.removeprefix(BOM_UTF8).decode("utf-8" if is_marked else encoding or "utf-8", errors="replace")


def _parse_json_object(data: bytes, encoding: str) -> dict[str, Any]:
    try:
        if encoding:
            data = data.decode(encoding).encode()
        value = _parse_json(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("unreadable json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSample("unreadable json", f"an object was expected, found {type(value).__name__}")
    return value


def _parse_json(data: bytes) -> Any:
    """A JSON value; NaN, byte order marks and the like, which only Python's reader takes, included."""
    try:
        # three times as fast; of what it takes it makes the same, whole numbers of any length included
        return _decode_json(data)
    except (msgspec.MsgspecError, RecursionError):
        pass
    value = json.loads(data)
    if b"\\u" in data:  # half a surrogate pair is valid JSON, but not valid text
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"))
    return value


_decode_json = msgspec.json.Decoder().decode


def split_lines(captions: Captions, *, keeps_repeated: bool = False) -> Captions:
    """Each line of a caption as one of its own; the same line again only where it is kept.

    >>> split_lines({"": ("a jug\\n\\na pot ",)})
    {'': ('a jug', 'a pot')}
    """
    by_language: Captions = {}
    for language, texts in captions.items():
        lines: list[str] = []
        for text in texts:
            lines += map(str.strip, text.splitlines())
        full = list(filter(None, lines))
        by_language[language] = tuple(full if keeps_repeated else dict.fromkeys(full))
    return by_language


def select_languages(captions: Captions, languages: tuple[str, ...]) -> Captions:
    """The captions in the requested languages, in their order; without a request, those of the first language.

    Captions that do not name their language count as the first requested one.

    Raises:
        BadSample: none is left.
    """
    if not languages:
        selected = dict(list(captions.items())[:1])
    else:
        named: Captions = {}
        for language, texts in captions.items():
            # data in one language hardly ever says which
            named[languages[0] if language == UNNAMED else language] = texts
        selected = {}
        # in the order of the request: a seed draws another caption from another order
        for language in languages:
            if language in named:
                selected[language] = named[language]
    if not selected:
        raise BadSample("no caption", f"languages requested {languages or 'any'}, found {tuple(captions)}")
    return selected


class RandomSource(Protocol):
    """A source of random numbers; numpy's generators are one."""

    def random(self) -> float:
        """The next number, uniform in [0, 1)."""
        ...


class SampleRng:
    """Every random choice about one sample at one visit: a pure function of seed, epoch, key and repeat.

    Numbers are read off the BLAKE2 digest of the visit, eight at a time; setting up a generator of numpy takes longer
    than all that is drawn for a sample. purpose: at most 16 ASCII letters; streams of different purposes are
    independent, so that one more kind of draw changes no other. repeat: which visit of the sample in this epoch,
    from 0, where a selection asks for several.

    >>> SampleRng(0, 0, "key").random() == SampleRng(0, 0, "key").random()
    True
    """

    __slots__ = ("_block", "_purpose", "_visit", "_words")

    def __init__(self, seed: int, epoch: int, key: str, repeat: int = 0, purpose: str = "") -> None:
        # a file name that is not UTF-8 reaches Python with lone surrogates, which plain encoding refuses
        self._visit = f"{seed}/{epoch}/{repeat}/{key}".encode(errors="surrogatepass")
        self._purpose = purpose.encode()
        self._block = 0
        self._words: list[int] = []

    def random(self) -> float:
        """The next number, uniform in [0, 1), of 53 bits."""
        if not self._words:
            digest = blake2b(self._visit, salt=_NUMBERED(self._block), person=self._purpose).digest()
            self._block += 1
            self._words = list(_WORDS(digest))
        # the upper 53 bits, as many as a double holds: the result is exact and below 1
        return (self._words.pop() >> 11) * _OF_53_BITS


_NUMBERED = Struct("<Q").pack
_WORDS = Struct("<8Q").unpack
_OF_53_BITS = 2.0**-53


def random_below(rng: RandomSource, number: int) -> int:
    """A whole number from 0 up to but not including `number`, uniform."""
    return int(rng.random() * number)


def shuffled(values: Sequence[Value], rng: RandomSource, number: int | None = None) -> list[Value]:
    """The values in a uniform random order, or the first `number` of them in that order (Fisher and Yates)."""
    order = list(values)
    number = len(order) if number is None else min(number, len(order))
    for position in range(number):
        other = position + random_below(rng, len(order) - position)
        # stops after `number` swaps: a prefix of the full shuffle, at the cost of what is drawn
        order[position], order[other] = order[other], order[position]
    return order[:number]


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return ()
    try:
        return tuple(filter(None, map(str.strip, value)))
    except TypeError:
        pass
    texts: list[str] = []
    for text in value:
        # metadata is whatever its producer wrote: a list may hold numbers or null among the captions
        if isinstance(text, str) and (stripped := text.strip()):
            texts.append(stripped)
    return tuple(texts)


TAGS = "tags"
"""The language under which the tags of a sample can be requested."""


def parse_tags(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The tags of a sample: `tags`, a list or words separated by commas."""
    raw = metadata.get("tags")
    if isinstance(raw, str):
        raw = raw.split(",")
    return _texts(raw) if isinstance(raw, list) else ()


def metadata_value(metadata: Mapping[str, Any], name: str) -> Any:
    """The value of a field, dots selecting nested ones; None where there is none.

    >>> metadata_value({"exif": {"iso": 100}}, "exif.iso")
    100
    """
    value: Any = metadata
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def parse_npy(data: bytes, name: str) -> np.ndarray:
    """An array from the bytes of an .npy file; its header is checked before any memory is allocated."""
    try:
        file = io.BytesIO(data)
        read_header = _NPY_HEADERS[np.lib.format.read_magic(file)]
        shape, is_fortran, dtype = read_header(file)
        rest = memoryview(data)[file.tell() :]
        if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(rest):
            raise ValueError(f"{dtype} of shape {shape} in {len(rest):,} bytes")
        return np.frombuffer(rest, dtype).reshape(shape, order="F" if is_fortran else "C").copy()
    except Exception as error:  # numpy evaluates the header, and raises whatever that stumbles over
        raise BadSample("unreadable array", f"{name}: {error}") from error


_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
