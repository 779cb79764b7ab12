"""Samples: a pair on its way into a shard, a sample on its way out, and which of its captions is shown.

Every random choice about a sample comes from `SampleRng`, a pure function of the visit, so that neither the number of
workers nor a resumed run changes it. `CaptionSampler` draws one caption by language and probability, whole or one
sentence of it.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from struct import Struct
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from vlm.errors import BadSample, UsageError

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


class Sample(NamedTuple):
    """One sample as it is stored in a shard: encoded image, captions, metadata, and the requested arrays."""

    key: str
    image: bytes
    captions: Captions
    metadata: dict[str, Any]
    arrays: dict[str, np.ndarray]


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
    if not any(captions.values()):
        captions = {UNNAMED: _texts(raw) or _texts(text) or _texts(metadata.get("caption"))}
    for name, value in metadata.items():
        if name.startswith("captions_"):
            captions[name.removeprefix("captions_")] = _texts(value)
    return {language: texts for language, texts in captions.items() if texts}


def split_lines(captions: Captions) -> Captions:
    """Each line of a caption as one of its own.

    >>> split_lines({"": ("a jug\\n\\na pot ",)})
    {'': ('a jug', 'a pot')}
    """
    by_language: Captions = {}
    for language, texts in captions.items():
        lines: list[str] = []
        for text in texts:
            lines += map(str.strip, text.splitlines())
        by_language[language] = tuple(dict.fromkeys(filter(None, lines)))
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
            named[languages[0] if language == UNNAMED else language] = texts
        selected = {language: named[language] for language in languages if language in named}
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
    texts: list[str] = []
    for text in value:
        # metadata is whatever its producer wrote: a list may hold numbers or null among the captions
        if isinstance(text, str) and (stripped := text.strip()):
            texts.append(stripped)
    return tuple(texts)


TAGS = "tags"
"""The language under which the tags of a sample can be requested."""

_WEIGHTS = "caption_weights"
# a Latin mark ends a sentence only before a space (3.5 stays whole), a CJK mark always, the last of a row
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])(?![.!?。！？])")


class SampledCaption(NamedTuple):
    """A caption as it was drawn.

    number: its position among all captions of the sample, languages in their order; -1 for tags.
    """

    text: str
    language: str
    number: int


@dataclass(frozen=True, kw_only=True)
class CaptionSampler:
    """Draws one caption of a sample.

    languages: drawn from, uniformly or by `language_weights`; empty uses the first one of each sample.
        `tags` means the sample's tags, joined in a random order. Any group of captions stored under a name
        (`captions_synthetic`) is requested like a language.
    sentences: of the drawn caption, show one sentence, drawn uniformly (DreamLIP's sub-captions).

    Within a language captions are drawn uniformly, or by the sample's own `caption_weights`: a list next to
    `captions`, or lists by language.
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
            raise UsageError(f"languages = {self.languages} names one twice; name each once, with a weight if needed.")
        if self.language_weights and (min(self.language_weights) < 0 or not 0 < sum(self.language_weights) < math.inf):
            raise UsageError(f"language_weights = {self.language_weights}: give numbers of at least 0, not all 0.")

    def __call__(self, sample: Sample, rng: RandomSource) -> SampledCaption:
        """Draw one caption.

        Raises:
            BadSample: there is none in the requested languages, or its weights do not fit.
        """
        captions = sample.captions
        tags = parse_tags(sample.metadata) if TAGS in self.languages else ()
        if tags:
            # a new dictionary: the numbers of captions are counted in the one that was stored
            captions = captions | {TAGS: (", ".join(shuffled(tags, rng)),)}

        # the language, then the caption, then the sentence: in another order a seed would give other captions
        candidates = select_languages(captions, self.languages)
        language_weights = self._weights_of(tuple(candidates))
        language = list(candidates)[_weighted_index(rng, language_weights, len(candidates))]
        texts = candidates[language]
        # captions that do not name their language are stored under none, but may have been requested under one
        stored_language = language if language in sample.captions or language == TAGS else UNNAMED
        position = _weighted_index(rng, _caption_weights(sample, stored_language, len(texts)), len(texts))
        text = texts[position]
        if self.sentences:
            sentences = split_sentences(text)
            text = sentences[random_below(rng, len(sentences))]
        number = _caption_index(sample.captions, stored_language, position)
        return SampledCaption(text=text, language=language, number=number)

    def sentences_of(self, sample: Sample) -> list[str]:
        """The different sentences of all captions in the requested languages, in their order; tags have none."""
        requested = tuple(language for language in self.languages if language != TAGS)
        if self.languages and not requested:
            return []
        weights = dict(zip(self.languages, self.language_weights, strict=False))
        try:
            captions = select_languages(sample.captions, requested)
        except BadSample:
            return []
        sentences: dict[str, None] = {}  # as an ordered set
        for language, texts in captions.items():
            if weights.get(language, 1) > 0:
                for text in texts:
                    sentences.update(dict.fromkeys(split_sentences(text)))
        return list(sentences)

    def _weights_of(self, candidates: tuple[str, ...]) -> list[float] | None:
        if not self.language_weights:
            return None
        by_language = dict(zip(self.languages, self.language_weights, strict=True))
        weights = [by_language[language] for language in candidates]
        if sum(weights) <= 0:
            raise BadSample("no caption", f"only in languages of weight 0: {candidates}")
        return weights


def split_sentences(text: str) -> list[str]:
    """The sentences of a caption; a text without an end mark is one.

    It is split after . ! ? before a space, and after 。！？ anywhere; several marks in a row end one sentence.
    Abbreviations are not known: "Dr. Smith" is split too.

    >>> split_sentences("A dog runs. It is wet!")
    ['A dog runs.', 'It is wet!']
    """
    return list(filter(None, map(str.strip, _SENTENCE_END.split(text)))) or [text]


def parse_tags(metadata: dict[str, Any]) -> tuple[str, ...]:
    """The tags of a sample: `tags`, a list or words separated by commas."""
    raw = metadata.get("tags")
    if isinstance(raw, str):
        raw = raw.split(",")
    return _texts(raw) if isinstance(raw, list) else ()


def _weighted_index(rng: RandomSource, weights: list[float] | None, number: int) -> int:
    if weights is None:
        return random_below(rng, number)
    # the bound guards against rounding: the product may reach the last end itself
    ends = list(accumulate(weights))
    return min(bisect_right(ends, rng.random() * ends[-1]), number - 1)


def _caption_weights(sample: Sample, language: str, number: int) -> list[float] | None:
    raw = sample.metadata.get(_WEIGHTS)
    if raw is None or language == TAGS:
        return None
    weights = raw.get(language) if isinstance(raw, dict) else raw
    # a plain list of weights goes with `captions`, which is the first language of the sample
    if weights is None or (isinstance(raw, list) and language != next(iter(sample.captions))):
        return None
    try:
        numbers = list(map(float, weights))
        is_valid = len(numbers) == number and min(numbers) >= 0 and 0 < sum(numbers) < math.inf
    except (TypeError, ValueError, OverflowError):
        numbers = []
        is_valid = False
    if not is_valid:
        preview = repr(weights)[:80]
        raise BadSample("bad caption weights", f"{number} weights of at least 0 needed for {language!r}: {preview}")
    return numbers


def _caption_index(captions: Captions, language: str, position: int) -> int:
    if language == TAGS:
        return -1
    num_before = 0
    for name, texts in captions.items():
        if name == language:
            break
        num_before += len(texts)
    return num_before + position
