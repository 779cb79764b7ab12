"""What travels through the data rooms: a pair on its way into a shard, a sample on its way out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from struct import Struct
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from vlm.errors import BadSample

Value = TypeVar("Value")

UNNAMED = ""
"""The language of captions that do not say theirs."""

Captions = dict[str, tuple[str, ...]]
"""Captions by language code; `UNNAMED` where none is given."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture with its captions, as a source gives it to `vlm pack`.

    key: unlike that of any other pair of its source, without a dot.
    image: the encoded file as it was found, of any kind.
    metadata: plain JSON values, kept in `key.json`. arrays: kept as `key.NAME.npy`.
    """

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class Sample(NamedTuple):
    """One sample as it lies in a shard: encoded picture, captions, metadata, and the stored arrays asked for."""

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any]
    arrays: dict[str, np.ndarray]


def captions_of(text: str | None, metadata: dict[str, Any]) -> Captions:
    """Captions from the `key.txt` and `key.json` of a sample.

    Read in this order: `captions` (a list, or lists by language) with any `captions_LANGUAGE` beside it;
    the text file; `caption` (img2dataset).

    >>> captions_of(None, {"captions": ["a dog"], "captions_zh": ["狗"]})
    {'': ('a dog',), 'zh': ('狗',)}
    """
    given = metadata.get("captions")
    found = {str(language): _texts(texts) for language, texts in given.items()} if isinstance(given, dict) else {}
    if not any(found.values()):
        found = {UNNAMED: _texts(given) or _texts(text) or _texts(metadata.get("caption"))}
    for name, value in metadata.items():
        if name.startswith("captions_"):
            found[name.removeprefix("captions_")] = _texts(value)
    return {language: texts for language, texts in found.items() if texts}


def select_languages(captions: Captions, languages: tuple[str, ...]) -> Captions:
    """The captions in the asked languages; without a wish, those of the first language.

    Captions that do not name their language count as the first one asked for.

    Raises:
        BadSample: none is left.
    """
    if not languages:
        chosen = dict(list(captions.items())[:1])
    else:
        named = {languages[0] if language == UNNAMED else language: texts for language, texts in captions.items()}
        chosen = {language: named[language] for language in languages if language in named}
    if not chosen:
        raise BadSample("no caption", f"languages asked {languages or 'any'}, found {tuple(captions)}")
    return chosen


class Chance(Protocol):
    """A source of random numbers; numpy's generators are one."""

    def random(self) -> float:
        """The next number, even in [0, 1)."""
        ...


class SampleChance:
    """Every random choice about one sample at one visit: a pure function of seed, epoch, key and repeat.

    Numbers are read off the BLAKE2 digest of the visit, eight at a time; setting a generator of numpy up takes longer
    than all that is drawn for a sample. purpose: at most 16 ASCII letters; streams of different purposes are
    independent, so that asking for one thing more changes no other. repeat: which visit of the sample in this epoch,
    from 0, where a selection asks for several.

    >>> SampleChance(0, 0, "key").random() == SampleChance(0, 0, "key").random()
    True
    """

    __slots__ = ("_block", "_purpose", "_visit", "_words")

    def __init__(self, seed: int, epoch: int, key: str, repeat: int = 0, purpose: str = "") -> None:
        self._visit = f"{seed}/{epoch}/{repeat}/{key}".encode(errors="surrogatepass")
        self._purpose = purpose.encode()
        self._block = 0
        self._words: list[int] = []

    def random(self) -> float:
        """The next number, even in [0, 1), of 53 bits."""
        if not self._words:
            digest = blake2b(self._visit, salt=_NUMBERED(self._block), person=self._purpose).digest()
            self._block, self._words = self._block + 1, list(_WORDS(digest))
        return (self._words.pop() >> 11) * _OF_53_BITS


_NUMBERED, _WORDS = Struct("<Q").pack, Struct("<8Q").unpack
_OF_53_BITS = 2.0**-53


def pick(chance: Chance, number: int) -> int:
    """One of the whole numbers from 0 on below `number`, evenly."""
    return int(chance.random() * number)


def shuffled(values: Sequence[Value], chance: Chance, number: int | None = None) -> list[Value]:
    """The values in an even random order, or the first `number` of them in that order (Fisher and Yates)."""
    left = list(values)
    for place in range(min(len(left) if number is None else number, len(left))):
        other = place + pick(chance, len(left) - place)
        left[place], left[other] = left[other], left[place]
    return left if number is None else left[:number]


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return ()
    return tuple([stripped for text in value if isinstance(text, str) and (stripped := text.strip())])
