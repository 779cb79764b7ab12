"""Which caption of a sample is shown: drawn by language and probability, whole or one sentence of it."""

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any, NamedTuple

from vlm.data.samples import UNNAMED, Captions, Chance, Sample, pick, select_languages, shuffled
from vlm.errors import BadSample, UsageError

TAGS = "tags"
"""The language under which the tags of a sample can be asked for."""

_WEIGHTS = "caption_weights"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)|(?<=[。！？])(?![.!?。！？])")


class DrawnCaption(NamedTuple):
    """A caption as it was drawn.

    number: its place among all captions of the sample, languages in their order; -1 for tags.
    """

    text: str
    language: str
    number: int


@dataclass(frozen=True, kw_only=True)
class CaptionDraw:
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

    def __call__(self, sample: Sample, rng: Chance) -> DrawnCaption:
        """Draw one caption.

        Raises:
            BadSample: there is none in the languages asked for, or its weights do not fit.
        """
        captions = sample.captions
        if TAGS in self.languages and (tags := tags_of(sample.metadata)):
            captions = captions | {TAGS: (", ".join(shuffled(tags, rng)),)}
        chosen = select_languages(captions, self.languages)
        language = list(chosen)[_draw(rng, self._weights_of(tuple(chosen)), len(chosen))]
        texts = chosen[language]
        kept_as = language if language in sample.captions or language == TAGS else UNNAMED
        place = _draw(rng, _caption_weights(sample, kept_as, len(texts)), len(texts))
        text = texts[place]
        if self.sentences:
            sentences = split_sentences(text)
            text = sentences[pick(rng, len(sentences))]
        return DrawnCaption(text=text, language=language, number=_number_of(sample.captions, kept_as, place))

    def sentences_of(self, sample: Sample) -> list[str]:
        """The different sentences of all captions in the languages asked for, in their order; tags are none."""
        asked = tuple(language for language in self.languages if language != TAGS)
        weights = dict(zip(self.languages, self.language_weights, strict=False))
        try:
            chosen = select_languages(sample.captions, asked) if asked or not self.languages else {}
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


def tags_of(metadata: dict[str, Any]) -> tuple[str, ...]:
    """The tags of a sample: `tags`, a list or words separated by commas."""
    given = metadata.get("tags")
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else []
    return tuple(tag.strip() for tag in parts if isinstance(tag, str) and tag.strip())


def _draw(rng: Chance, weights: list[float] | None, number: int) -> int:
    if weights is None:
        return pick(rng, number)
    ends = list(accumulate(weights))
    return min(bisect_right(ends, rng.random() * ends[-1]), number - 1)


def _caption_weights(sample: Sample, language: str, number: int) -> list[float] | None:
    given = sample.metadata.get(_WEIGHTS)
    if given is None or language == TAGS:
        return None
    weights = given.get(language) if isinstance(given, dict) else given
    if weights is None or (isinstance(given, list) and language != next(iter(sample.captions))):
        return None
    try:
        numbers = [float(weight) for weight in weights]
        is_sound = len(numbers) == number and min(numbers) >= 0 and 0 < sum(numbers) < math.inf
    except (TypeError, ValueError, OverflowError):
        is_sound, numbers = False, []
    if not is_sound:
        told = repr(weights)[:80]
        raise BadSample("bad caption weights", f"{number} weights from 0 on are wanted for {language!r}: {told}")
    return numbers


def _number_of(captions: Captions, language: str, place: int) -> int:
    if language == TAGS:
        return -1
    before = takewhile(lambda name: name != language, captions)
    return sum(len(captions[name]) for name in before) + place
