"""What travels through the data rooms: a pair on its way into a shard, a sample on its way out.

Which caption of a sample is shown: drawn by language and probability, whole or one sentence of it.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate, takewhile
from struct import Struct
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from vlm.errors import BadSample, UsageError

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


def parse_captions(text: str | None, metadata: dict[str, Any]) -> Captions:
    """Captions from the `key.txt` and `key.json` of a sample.

    Read in this order: `captions` (a list, or lists by language) with any `captions_LANGUAGE` beside it;
    the text file; `caption` (img2dataset).

    >>> parse_captions(None, {"captions": ["a dog"], "captions_zh": ["狗"]})
    {'': ('a dog',), 'zh': ('狗',)}
    """
    raw = metadata.get("captions")
    found = {str(language): _texts(texts) for language, texts in raw.items()} if isinstance(raw, dict) else {}
    if not any(found.values()):
        found = {UNNAMED: _texts(raw) or _texts(text) or _texts(metadata.get("caption"))}
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


class RandomSource(Protocol):
    """A source of random numbers; numpy's generators are one."""

    def random(self) -> float:
        """The next number, even in [0, 1)."""
        ...


class SampleRng:
    """Every random choice about one sample at one visit: a pure function of seed, epoch, key and repeat.

    Numbers are read off the BLAKE2 digest of the visit, eight at a time; setting a generator of numpy up takes longer
    than all that is drawn for a sample. purpose: at most 16 ASCII letters; streams of different purposes are
    independent, so that asking for one thing more changes no other. repeat: which visit of the sample in this epoch,
    from 0, where a selection asks for several.

    >>> SampleRng(0, 0, "key").random() == SampleRng(0, 0, "key").random()
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


def random_below(rng: RandomSource, number: int) -> int:
    """One of the whole numbers from 0 on below `number`, evenly."""
    return int(rng.random() * number)


def shuffled(values: Sequence[Value], rng: RandomSource, number: int | None = None) -> list[Value]:
    """The values in an even random order, or the first `number` of them in that order (Fisher and Yates)."""
    left = list(values)
    for position in range(min(len(left) if number is None else number, len(left))):
        other = position + random_below(rng, len(left) - position)
        left[position], left[other] = left[other], left[position]
    return left if number is None else left[:number]


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        return ()
    return tuple([stripped for text in value if isinstance(text, str) and (stripped := text.strip())])


TAGS = "tags"
"""The language under which the tags of a sample can be asked for."""

_WEIGHTS = "caption_weights"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])(?![.!?。！？])")


class SampledCaption(NamedTuple):
    """A caption as it was drawn.

    number: its place among all captions of the sample, languages in their order; -1 for tags.
    """

    text: str
    language: str
    number: int


@dataclass(frozen=True, kw_only=True)
class CaptionSampler:
    """How one caption of a sample is drawn.

    languages: those captions are drawn from, evenly or by `language_weights`; empty takes the first of each sample.
        `tags` stands for the sample's tags, joined in a drawn order. Any group of captions kept under a name
        (`captions_synthetic`) is asked for like a language.
    sentences: of the drawn caption, show one sentence, drawn evenly (DreamLIP's sub-captions).

    Within a language captions are drawn evenly, or by the sample's own `caption_weights`: a list beside `captions`,
    or lists by language.
    """

    languages: tuple[str, ...] = ()
    language_weights: tuple[float, ...] = ()
    sentences: bool = False

    def __post_init__(self) -> None:
        if self.language_weights and len(self.language_weights) != len(self.languages):
            raise UsageError(
                f"{len(self.language_weights)} language_weights for {len(self.languages)} languages; give one each."
            )
        if len(set(self.languages)) < len(self.languages):
            raise UsageError(f"languages = {self.languages} names one twice; name each once, with a weight if need be.")
        if self.language_weights and (min(self.language_weights) < 0 or not 0 < sum(self.language_weights) < math.inf):
            raise UsageError(f"language_weights = {self.language_weights}: give numbers from 0 on, not all 0.")

    def __call__(self, sample: Sample, rng: RandomSource) -> SampledCaption:
        """Draw one caption.

        Raises:
            BadSample: there is none in the languages asked for, or its weights do not fit.
        """
        captions = sample.captions
        if TAGS in self.languages and (tags := parse_tags(sample.metadata)):
            captions = captions | {TAGS: (", ".join(shuffled(tags, rng)),)}
        chosen = select_languages(captions, self.languages)
        language = list(chosen)[_weighted_index(rng, self._weights_of(tuple(chosen)), len(chosen))]
        texts = chosen[language]
        kept_as = language if language in sample.captions or language == TAGS else UNNAMED
        position = _weighted_index(rng, _caption_weights(sample, kept_as, len(texts)), len(texts))
        text = texts[position]
        if self.sentences:
            sentences = split_sentences(text)
            text = sentences[random_below(rng, len(sentences))]
        return SampledCaption(text=text, language=language, number=_caption_index(sample.captions, kept_as, position))

    def sentences_of(self, sample: Sample) -> list[str]:
        """The different sentences of all captions in the languages asked for, in their order; tags are none."""
        requested = tuple(language for language in self.languages if language != TAGS)
        weights = dict(zip(self.languages, self.language_weights, strict=False))
        try:
            chosen = select_languages(sample.captions, requested) if requested or not self.languages else {}
        except BadSample:
            return []
        texts = [text for language in chosen if weights.get(language, 1) > 0 for text in chosen[language]]
        return list(dict.fromkeys(sentence for text in texts for sentence in split_sentences(text)))

    def _weights_of(self, chosen: tuple[str, ...]) -> list[float] | None:
        if not self.language_weights:
            return None
        by_language = dict(zip(self.languages, self.language_weights, strict=True))
        weights = [by_language[language] for language in chosen]
        if sum(weights) <= 0:
            raise BadSample("no caption", f"only in languages of weight 0: {chosen}")
        return weights


def split_sentences(text: str) -> list[str]:
    """The sentences of a caption; a text without an end mark is one.

    Cut is after . ! ? before a space, and after 。！？ anywhere; several marks in a row end one sentence.
    Abbreviations are not known: "Dr. Smith" is cut too.

    >>> split_sentences("A dog runs. It is wet!")
    ['A dog runs.', 'It is wet!']
    """
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()] or [text]


def parse_tags(metadata: dict[str, Any]) -> tuple[str, ...]:
    """The tags of a sample: `tags`, a list or words separated by commas."""
    raw = metadata.get("tags")
    parts = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else []
    return tuple(tag.strip() for tag in parts if isinstance(tag, str) and tag.strip())


def _weighted_index(rng: RandomSource, weights: list[float] | None, number: int) -> int:
    if weights is None:
        return random_below(rng, number)
    ends = list(accumulate(weights))
    return min(bisect_right(ends, rng.random() * ends[-1]), number - 1)


def _caption_weights(sample: Sample, language: str, number: int) -> list[float] | None:
    raw = sample.metadata.get(_WEIGHTS)
    if raw is None or language == TAGS:
        return None
    weights = raw.get(language) if isinstance(raw, dict) else raw
    if weights is None or (isinstance(raw, list) and language != next(iter(sample.captions))):
        return None
    try:
        numbers = [float(weight) for weight in weights]
        is_sound = len(numbers) == number and min(numbers) >= 0 and 0 < sum(numbers) < math.inf
    except (TypeError, ValueError, OverflowError):
        is_sound, numbers = False, []
    if not is_sound:
        preview = repr(weights)[:80]
        raise BadSample("bad caption weights", f"{number} weights from 0 on are wanted for {language!r}: {preview}")
    return numbers


def _caption_index(captions: Captions, language: str, position: int) -> int:
    if language == TAGS:
        return -1
    before = takewhile(lambda name: name != language, captions)
    return sum(len(captions[name]) for name in before) + position
