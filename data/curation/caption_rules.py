"""Rules by the captions alone."""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from vlm.data.curation.facts import Facts, compute
from vlm.data.curation.rule import Situation, Verdict, need_one_of
from vlm.data.samples import UNNAMED
from vlm.errors import UsageError

# scripts written without spaces: each character counts as a word
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# the same, for Python's regular expressions, which know no scripts
UNSPACED_CHARACTERS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)
_WORD = rf"[{UNSPACED}]|[^\s{UNSPACED}]+"
_LATIN = ("LATIN",)
_CYRILLIC = ("CYRILLIC",)
_ARABIC = ("ARABIC",)
SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "nb", "no", "fi", "pl", "cs"), _LATIN),
    **dict.fromkeys(("tr", "ro", "hu", "id", "ms", "vi", "ca", "hr", "sk", "sl", "et", "lv", "lt", "sw"), _LATIN),
    **dict.fromkeys(("ru", "uk", "bg", "be", "mk"), _CYRILLIC),
    **dict.fromkeys(("ar", "fa", "ur"), _ARABIC),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "mr": ("DEVANAGARI",),
    "bn": ("BENGALI",),
    "ta": ("TAMIL",),
    "el": ("GREEK",),
    "th": ("THAI",),
}
"""Scripts by language, as the names of their characters begin in Unicode; other languages are taken at their word."""


@dataclass(frozen=True, kw_only=True)
class LengthLimits:
    """min, max: of a caption; languages: look at these only; of: whether any or all captions of a sample must fit."""

    min: Annotated[int, Field(ge=0)] | None = None
    max: Annotated[int, Field(ge=0)] | None = None
    languages: tuple[str, ...] = ()
    of: Literal["any", "all"] = "any"

    def __post_init__(self) -> None:
        need_one_of(self, "min", "max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise UsageError(f"min = {self.min} is above max = {self.max}; no caption fits.")


def by_words(situation: Situation, given: LengthLimits) -> Verdict:
    """Keep samples with a caption of so many words; a character of a script without spaces counts as one."""
    places, _, texts = situation.facts.captions(given.languages)
    counts = compute.count_substring_regex(texts, _WORD).to_numpy()
    return _by_length(situation.facts, given, places, counts, "words")


def by_characters(situation: Situation, given: LengthLimits) -> Verdict:
    """Keep samples with a caption of so many characters."""
    places, _, texts = situation.facts.captions(given.languages)
    return _by_length(situation.facts, given, places, compute.utf8_length(texts).to_numpy(), "characters")


def _by_length(facts: Facts, given: LengthLimits, places: np.ndarray, counts: np.ndarray, unit: str) -> Verdict:
    fits = np.ones(len(counts), dtype=bool)
    if given.min is not None:
        fits &= counts >= given.min
    if given.max is not None:
        fits &= counts <= given.max
    weights = _any_or_all(places, fits, len(facts), given.of)

    def why(place: int) -> str:
        start, end = np.searchsorted(places, [place, place + 1])
        return f"{', '.join(map(str, counts[start:end])) or 'no'} {unit}"

    return Verdict(weights=weights, why=why)


def _any_or_all(places: np.ndarray, fits: np.ndarray, samples: int, of: str) -> np.ndarray:
    fitting, all_of = np.bincount(places[fits], minlength=samples), np.bincount(places, minlength=samples)
    is_kept = (fitting > 0) if of == "any" else (fitting > 0) & (fitting == all_of)
    return is_kept.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Languages:
    """any: languages one of which a caption must be in; script: share of its letters in that language's script.

    A caption that does not name its language counts as the first of `any`.
    """

    any: tuple[str, ...]
    script: Annotated[float, Field(ge=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        if not self.any:
            raise UsageError("any= names no language; give some, as any=en+de.")


def by_language(situation: Situation, given: Languages) -> Verdict:
    """Keep samples with a caption in one of the languages, written in its script."""
    places, languages, texts = situation.facts.captions((*given.any, UNNAMED))
    named = compute.if_else(compute.equal(languages, UNNAMED), given.any[0], languages)
    is_ascii = compute.string_is_ascii(texts).to_numpy()
    fits = np.zeros(len(texts), dtype=bool)
    for language in given.any:
        rows = np.flatnonzero(compute.equal(named, language).to_numpy())
        scripts = SCRIPTS.get(language)
        for row in rows:
            is_plain = is_ascii[row] and scripts == _LATIN
            fits[row] = not scripts or is_plain or script_share(texts[int(row)].as_py(), scripts) >= given.script
    weights = _any_or_all(places, fits, len(situation.facts), "any")

    def why(place: int) -> str:
        start, end = np.searchsorted(places, [place, place + 1])
        return f"{end - start} in {'+'.join(given.any)}, {int(fits[start:end].sum())} of them in its script"

    return Verdict(weights=weights, why=why)


def script_share(text: str, scripts: tuple[str, ...]) -> float:
    """Share of the letters of a text that are of these scripts; 1 for a text without letters.

    >>> script_share("Hallo мир", ("LATIN",))
    0.625
    """
    letters = [character for character in text if character.isalpha()]
    return sum(_script(letter) in scripts for letter in letters) / len(letters) if letters else 1.0


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ", 1)[0].split("-", 1)[0]


@dataclass(frozen=True, kw_only=True)
class CaptionLimit:
    """max: samples that may have the same caption."""

    max: Annotated[int, Field(ge=1)] = 10


def by_repetition(situation: Situation, given: CaptionLimit) -> Verdict:
    """Keep no caption more than `max` times: of its samples the first in an order drawn from the seed.

    Captions that differ only in case and spaces are the same. A sample of several captions goes as soon as one of
    them is used up.
    """
    facts = situation.facts
    places, _, texts = facts.captions()
    is_left = situation.is_left[places]
    places, texts = places[is_left], texts.filter(pa.array(is_left))
    words = compute.utf8_trim_whitespace(compute.replace_substring_regex(compute.utf8_lower(texts), r"\s+", " "))
    coded = words.combine_chunks().dictionary_encode()
    codes = (coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded).indices.to_numpy()
    pairs = np.unique(np.stack([places, codes], axis=1), axis=0) if len(places) else np.zeros((0, 2), np.int64)
    counts = np.bincount(pairs[:, 1])
    pairs = pairs[counts[pairs[:, 1]] > given.max]
    starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
    weights = np.ones(len(facts))
    used: Counter[int] = Counter()
    for group in situation.rng.permutation(len(starts)):
        end = starts[group + 1] if group + 1 < len(starts) else len(pairs)
        repeated = pairs[starts[group] : end, 1].tolist()
        if all(used[code] < given.max for code in repeated):
            used.update(repeated)
        else:
            weights[pairs[starts[group], 0]] = 0
    worst = np.zeros(len(facts), dtype=np.int64)
    np.maximum.at(worst, pairs[:, 0], counts[pairs[:, 1]])
    return Verdict(weights=weights, why=lambda place: f"caption of {max(worst[place], 1):,} samples")
