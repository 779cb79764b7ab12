"""Filters by caption: length, language, repetition, and balancing over concepts after MetaCLIP.

Each filter is the dataclass of its parameters, then the function that decides. The list of concepts that captions are
balanced over is built here too: words and pairs of words of a corpus, titles, WordNet.
"""

import json
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from vlm.data.curation.filter import FilterContext, FilterResult, require_one_of
from vlm.data.curation.sample_table import SampleTable, compute
from vlm.data.samples import UNNAMED
from vlm.errors import UsageError
from vlm.files import compute_fingerprint, write_text
from vlm.results import Result

# scripts written without spaces: each character counts as a word
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# the same for Python's regular expressions, which do not know scripts
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
"""Scripts by language, as the Unicode names of their characters begin; other languages are not checked."""


@dataclass(frozen=True, kw_only=True)
class LengthLimits:
    """min, max: of a caption; languages: only these count; of: whether any or all captions of a sample must fit."""

    min: Annotated[int, Field(ge=0)] | None = None
    max: Annotated[int, Field(ge=0)] | None = None
    languages: tuple[str, ...] = ()
    of: Literal["any", "all"] = "any"

    def __post_init__(self) -> None:
        require_one_of(self, "min", "max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise UsageError(f"min = {self.min} is above max = {self.max}; no caption fits.")


def filter_by_words(context: FilterContext, parameters: LengthLimits) -> FilterResult:
    """Keep samples with a caption of so many words; a character of a script without spaces counts as one."""
    positions, _, texts = context.sample_table.captions(parameters.languages)
    counts = compute.count_substring_regex(texts, _WORD).to_numpy()
    return _filter_by_length(context.sample_table, parameters, positions, counts, "words")


def filter_by_characters(context: FilterContext, parameters: LengthLimits) -> FilterResult:
    """Keep samples with a caption of so many characters."""
    positions, _, texts = context.sample_table.captions(parameters.languages)
    return _filter_by_length(
        context.sample_table, parameters, positions, compute.utf8_length(texts).to_numpy(), "characters"
    )


def _filter_by_length(
    sample_table: SampleTable, parameters: LengthLimits, positions: np.ndarray, counts: np.ndarray, unit: str
) -> FilterResult:
    fits = np.ones(len(counts), dtype=bool)
    if parameters.min is not None:
        fits &= counts >= parameters.min
    if parameters.max is not None:
        fits &= counts <= parameters.max
    weights = _any_or_all(positions, fits, len(sample_table), parameters.of)

    def why(position: int) -> str:
        start, end = np.searchsorted(positions, [position, position + 1])
        return f"{', '.join(map(str, counts[start:end])) or 'no'} {unit}"

    return FilterResult(weights=weights, why=why)


def _any_or_all(positions: np.ndarray, fits: np.ndarray, samples: int, of: str) -> np.ndarray:
    """float64 [samples]: 1 for the samples of which any, or all, captions fit."""
    num_fitting = np.bincount(positions[fits], minlength=samples)
    num_captions = np.bincount(positions, minlength=samples)
    is_kept = num_fitting > 0
    if of == "all":
        is_kept &= num_fitting == num_captions
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


def filter_by_language(context: FilterContext, parameters: Languages) -> FilterResult:
    """Keep samples with a caption in one of the languages, written in its script."""
    # captions without a language too: most data sets name none
    positions, languages, texts = context.sample_table.captions((*parameters.any, UNNAMED))
    named = compute.if_else(compute.equal(languages, UNNAMED), parameters.any[0], languages)
    is_ascii = compute.string_is_ascii(texts).to_numpy()
    fits = np.zeros(len(texts), dtype=bool)
    for language in parameters.any:
        rows = np.flatnonzero(compute.equal(named, language).to_numpy())
        scripts = SCRIPTS.get(language)
        for row in rows:
            # most captions are ASCII: their letters need not be looked up one by one
            is_latin = is_ascii[row] and scripts == _LATIN
            fits[row] = not scripts or is_latin or script_share(texts[int(row)].as_py(), scripts) >= parameters.script
    weights = _any_or_all(positions, fits, len(context.sample_table), "any")

    def why(position: int) -> str:
        start, end = np.searchsorted(positions, [position, position + 1])
        return f"{end - start} in {'+'.join(parameters.any)}, {int(fits[start:end].sum())} of them in its script"

    return FilterResult(weights=weights, why=why)


def script_share(text: str, scripts: tuple[str, ...]) -> float:
    """Share of the letters of a text that are of these scripts; 1 for a text without letters.

    >>> script_share("Hallo мир", ("LATIN",))
    0.625
    """
    letters = [character for character in text if character.isalpha()]
    return sum(_script(letter) in scripts for letter in letters) / len(letters) if letters else 1.0


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    # Python does not know scripts, but the name of a letter begins with its own; "CJK" may be followed by a dash
    return unicodedata.name(letter, "").split(" ", 1)[0].split("-", 1)[0]


@dataclass(frozen=True, kw_only=True)
class CaptionLimit:
    """max: how many samples may have the same caption."""

    max: Annotated[int, Field(ge=1)] = 10


def limit_repeated_captions(context: FilterContext, parameters: CaptionLimit) -> FilterResult:
    """Keep no caption more than `max` times: of its samples the first in a random order drawn from the seed.

    Captions that differ only in case and spaces are the same. A sample with several captions is dropped as soon as one
    of them is used up.
    """
    sample_table = context.sample_table
    positions, _, texts = sample_table.captions()
    is_remaining = context.is_remaining[positions]
    positions = positions[is_remaining]
    texts = texts.filter(pa.array(is_remaining))

    # a number for each distinct caption, then the distinct (sample, caption) pairs of captions that occur too often
    normalized = compute.utf8_trim_whitespace(compute.replace_substring_regex(compute.utf8_lower(texts), r"\s+", " "))
    coded = normalized.combine_chunks().dictionary_encode()
    codes = (coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded).indices.to_numpy()
    pairs = np.unique(np.stack([positions, codes], axis=1), axis=0) if len(positions) else np.zeros((0, 2), np.int64)
    counts = np.bincount(pairs[:, 1])
    pairs = pairs[counts[pairs[:, 1]] > parameters.max]

    # samples in random order; each uses up one of the allowed times of all its captions, or is dropped
    starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
    weights = np.ones(len(sample_table))
    used: Counter[int] = Counter()
    for group in context.rng.permutation(len(starts)):
        end = starts[group + 1] if group + 1 < len(starts) else len(pairs)
        repeated = pairs[starts[group] : end, 1].tolist()
        if all(used[code] < parameters.max for code in repeated):
            used.update(repeated)
        else:
            weights[pairs[starts[group], 0]] = 0

    worst = np.zeros(len(sample_table), dtype=np.int64)
    np.maximum.at(worst, pairs[:, 0], counts[pairs[:, 1]])
    return FilterResult(weights=weights, why=lambda position: f"caption of {max(worst[position], 1):,} samples")


_PUNCTUATION = re.compile(r"([,.;:?!`])")
_CAPTIONS_PER_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ConceptCap:
    """concepts: a file, a JSON list or a concept a line; cap: expected number of samples of a concept, roughly.

    languages: only these captions count (`tags` for tags). case: `fold` matches in lower case, `keep` as it is written,
    as MetaCLIP's code does.
    """

    concepts: Path
    cap: Annotated[float, Field(gt=0)] = 20_000
    languages: tuple[str, ...] = ()
    case: Literal["fold", "keep"] = "fold"


def balance_concepts(context: FilterContext, parameters: ConceptCap) -> FilterResult:
    """Keep samples of frequent concepts less often (Xu et al. 2024, arXiv 2309.16671, algorithm 1).

    A concept matches a sample when it occurs, between word boundaries, in one of its captions. With `count` samples
    matched, each match keeps its sample with probability min(1, cap / count), independently, so a sample is kept with
    1 - Π (1 - p) over its concepts; one that matches nothing is dropped. As in the paper a frequent concept may end
    above the cap, kept by the rarer concepts next to it. Theirs counts pairs of image and caption, this one samples.
    """
    sample_table = context.sample_table
    folds_case = parameters.case == "fold"
    names = read_concepts(parameters.concepts, folds_case=folds_case)
    positions, _, texts = sample_table.captions(parameters.languages)
    is_remaining = context.is_remaining[positions]
    samples, concepts = match(
        names, positions[is_remaining], texts.filter(pa.array(is_remaining)), folds_case=folds_case
    )

    counts = np.bincount(concepts, minlength=len(names))
    chances = np.minimum(1.0, parameters.cap / np.maximum(counts, 1))
    weights = keep_probabilities(samples, chances[concepts], len(sample_table))
    kept = np.bincount(concepts, weights=weights[samples], minlength=len(names))
    by_frequency = np.argsort(-counts, kind="stable")
    num_matched = int(np.count_nonzero(counts))

    curve: list[dict[str, Any]] = []
    for concept in by_frequency[:num_matched].tolist():
        curve.append({"concept": names[concept], "matches": int(counts[concept]), "expected": float(kept[concept])})

    def why(position: int) -> str:
        own = concepts[samples == position]
        if not len(own):
            return "matches no concept"
        # the rarest decides most: it keeps its samples with the highest probability
        rarest = own[np.argmin(counts[own])]
        return f"{weights[position]:.2f} · {names[rarest]} ({counts[rarest]:,})"

    return FilterResult(
        weights=weights,
        why=why,
        record={
            "concepts": compute_fingerprint(*names),
            "case": parameters.case,
            "concepts_given": len(names),
            "concepts_matched": num_matched,
            "concepts_above_cap": int((counts > parameters.cap).sum()),
            "samples_matched": len(np.unique(samples)),
        },
        curve=curve,
    )


def keep_probabilities(samples: np.ndarray, chances: np.ndarray, number: int) -> np.ndarray:
    """float64 [number]: 1 - Π (1 - chance) over the matches of each sample, 0 without any.

    >>> keep_probabilities(np.array([0, 0, 2]), np.array([0.5, 0.5, 1.0]), 3).round(6).tolist()
    [0.75, 0.0, 1.0]
    """
    with np.errstate(divide="ignore"):
        # in logarithms a product becomes a sum that bincount can make; a certain match is log 0
        missed = np.bincount(samples, weights=np.log1p(-chances), minlength=number)
    # 0 minus rather than a sign: a sample without a match gets 0, not -0
    return 0.0 - np.expm1(missed)


def read_concepts(path: Path, *, folds_case: bool = True) -> list[str]:
    """The concepts of a file, each once, in their order, as `spaced` writes them.

    Raises:
        UsageError: there is no such file, or it has no concept.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"The concepts {str(path)!r} cannot be read: {error}.") from error
    # in their order, each once: the number of a concept is its position here
    names: dict[str, None] = {}
    for name in lines:
        if isinstance(name, str) and name.strip():
            names[spaced(name, folds_case=folds_case)] = None
    if not names:
        raise UsageError(f"{path} names no concept; write one a line, or a JSON list.")
    return list(names)


def spaced(text: str, *, folds_case: bool = True) -> str:
    """A text as it is matched: `, . ; : ? ! \\`` set apart, words one space apart, in lower case where case is folded.

    >>> spaced("A Dog,  running.")
    'a dog , running .'
    """
    return " ".join(_PUNCTUATION.sub(r" \1 ", text.lower() if folds_case else text).split())


def match(
    names: Sequence[str], positions: np.ndarray, texts: pa.ChunkedArray, *, folds_case: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Which concepts occur in the captions of which samples: parallel arrays of positions and concepts, each pair once.

    names: of `spaced`; positions (int64, ascending): the sample of each text. One pass of Aho and
    Corasick (1975) a caption, whatever the number of concepts.
    """
    import ahocorasick_rs

    # between spaces, a pattern cannot match inside a word; scripts without spaces have no such border
    patterns = [name if UNSPACED_CHARACTERS.search(name) else f" {name} " for name in names]
    automaton = ahocorasick_rs.AhoCorasick(patterns)
    samples = array("q")
    concepts = array("q")
    for start in range(0, len(texts), _CAPTIONS_PER_BLOCK):
        block = texts.slice(start, _CAPTIONS_PER_BLOCK).to_pylist()
        for position, text in zip(positions[start : start + _CAPTIONS_PER_BLOCK].tolist(), block, strict=True):
            # overlapping, since one concept may be part of another ("dog", "dog food"), and both count
            matches = automaton.find_matches_as_indexes(f" {spaced(text, folds_case=folds_case)} ", overlapping=True)
            matched = {concept for concept, _, _ in matches}
            samples.extend([position] * len(matched))
            concepts.extend(matched)
    pairs = np.stack([np.array(samples, dtype=np.int64), np.array(concepts, dtype=np.int64)], axis=1)
    pairs = np.unique(pairs, axis=0)
    return pairs[:, 0], pairs[:, 1]


_WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")


@dataclass(frozen=True, kw_only=True)
class ConceptLimits:
    """What of a corpus is a concept.

    min_count: occurrences of a word, and of a pair of words. min_pmi: bits of pointwise mutual information of a pair,
    log2 of how many times more often it occurs than if its words followed each other by chance. max_bigrams: most
    pairs, those of the highest information; 0 takes all. folds_case: whether words are lower-cased.
    """

    min_count: int = 100
    min_pmi: float = 5.0
    max_bigrams: int = 0
    folds_case: bool = True

    def __post_init__(self) -> None:
        if self.min_count < 1 or self.max_bigrams < 0 or not math.isfinite(self.min_pmi):
            raise UsageError(
                f"min_count = {self.min_count}, max_bigrams = {self.max_bigrams}, min_pmi = {self.min_pmi}: give a "
                "count of at least 1, a number of pairs of at least 0, and a finite information."
            )


@dataclass(frozen=True, kw_only=True)
class ConceptSummary(Result):
    """The file that was written, the texts read for it, and how many concepts each source has, before each is once."""

    out: str
    texts: int
    unigrams: int
    bigrams: int
    titles: int
    synsets: int
    concepts: int


def build_concepts(
    texts: Iterable[str], out: Path, limits: ConceptLimits, *, titles: Path | None = None, wordnet: Path | None = None
) -> ConceptSummary:
    """Write the concepts of a corpus as a JSON list, the filter `balance:concepts=OUT`'s file.

    In this order, each once: WordNet's synsets, words and pairs by falling count and information, titles. MetaCLIP (Xu
    et al. 2024, §3.1) rebuilds CLIP's list from the unigrams of Wikipedia that occur at least 100 times, its bigrams of
    high pointwise mutual information, its titles, and all synsets of WordNet. texts are read twice, so that pairs of
    rare words, of which a large corpus has very many, are never counted.

    Raises:
        UsageError: `out` exists, a source cannot be read, or there is no concept.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name another file or remove it.")
    synsets = read_synsets(wordnet, folds_case=limits.folds_case) if wordnet else []
    entitled = _read_titles(titles, folds_case=limits.folds_case) if titles else []
    counts, num_texts = count_unigrams(texts, folds_case=limits.folds_case)
    unigrams = [word for word, count in counts.most_common() if count >= limits.min_count]
    bigrams = informative_bigrams(texts, counts, limits)

    concepts = list(dict.fromkeys([*synsets, *unigrams, *bigrams, *entitled]))
    if not concepts:
        raise UsageError(
            f"No word of {num_texts:,} texts occurs {limits.min_count} times; give more text, or a smaller --min-count."
        )
    write_text(out, json.dumps(concepts, ensure_ascii=False, indent=0) + "\n")
    return ConceptSummary(
        out=str(out),
        texts=num_texts,
        unigrams=len(unigrams),
        bigrams=len(bigrams),
        titles=len(entitled),
        synsets=len(synsets),
        concepts=len(concepts),
    )


def count_unigrams(texts: Iterable[str], *, folds_case: bool = True) -> tuple[Counter[str], int]:
    """How often each word occurs, and the number of texts; punctuation is no word.

    >>> count_unigrams(["A dog, a cat."])[0].most_common(1)
    [('a', 2)]
    """
    counts: Counter[str] = Counter()
    num_texts = 0
    for text in texts:
        num_texts += 1
        for run in _word_runs(text, folds_case=folds_case):
            counts.update(run)
    return counts, num_texts


def informative_bigrams(texts: Iterable[str], counts: Counter[str], limits: ConceptLimits) -> list[str]:
    """Pairs of neighbouring words, by falling pointwise mutual information.

    With n(a) occurrences of a word among N, and n(ab) of a pair among M, the information is
    log2 (n(ab) / M) / ((n(a) / N) (n(b) / N)) (Church and Hanks 1990, §3).
    """
    pairs: Counter[tuple[str, str]] = Counter()
    num_pairs = 0
    for text in texts:
        for run in _word_runs(text, folds_case=limits.folds_case):
            num_pairs += max(len(run) - 1, 0)
            for word, next_word in pairwise(run):
                # a pair is at most as frequent as the rarer of its words
                if counts[word] >= limits.min_count and counts[next_word] >= limits.min_count:
                    pairs[word, next_word] += 1
    num_words = counts.total()
    information: dict[str, float] = {}
    for (first, second), count in pairs.items():
        if count < limits.min_count:
            continue
        by_chance = counts[first] * counts[second] / num_words**2
        bits = math.log2(count / num_pairs / by_chance)
        if bits >= limits.min_pmi:
            information[f"{first} {second}"] = bits
    informative = list(information)
    # by the text too, so that equal information does not leave the order to that of the corpus
    informative.sort(key=lambda pair: (-information[pair], pair))
    return informative[: limits.max_bigrams or None]


def _word_runs(text: str, *, folds_case: bool) -> Iterator[list[str]]:
    """The words of a text, cut where punctuation stands: a pair does not reach over a full stop."""
    run: list[str] = []
    for token in spaced(text, folds_case=folds_case).split():
        if any(character.isalnum() for character in token):
            run.append(token)
        elif run:
            yield run
            run = []
    if run:
        yield run


def read_synsets(folder: Path, *, folds_case: bool = True) -> list[str]:
    """The first lemma of each synset in a folder of WordNet's database (`data.noun` …), each once, words spaced.

    Raises:
        UsageError: it holds none of the database's files.
    """
    files = [folder / name for name in _WORDNET_FILES if (folder / name).is_file()]
    if not files:
        raise UsageError(f"{folder} holds no file of WordNet's database, such as {_WORDNET_FILES[0]}.")
    lemmas: dict[str, None] = {}
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                # the licence at the top is indented
                if line.startswith(" "):
                    continue
                # offset, lexicographer's file, part of speech, number of words, then the first word
                fields = line.split(maxsplit=5)
                if len(fields) < 6:
                    raise UsageError(f"{path} is not WordNet's: a line begins {line[:40]!r}.")
                # an adjective may say where it stands: "galore(ip)"
                lemma = fields[4].partition("(")[0].replace("_", " ")
                lemmas[spaced(lemma, folds_case=folds_case)] = None
    return list(lemmas)


def _read_titles(path: Path, *, folds_case: bool) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The titles {str(path)!r} cannot be read: {error}.") from error
    titles: dict[str, None] = {}
    for line in lines:
        # Wikipedia's dumps write spaces as underscores
        if title := spaced(line.replace("_", " "), folds_case=folds_case):
            titles[title] = None
    return list(titles)


@dataclass(frozen=True)
class TextLines:
    """The lines of a text file that are not empty, read anew each time."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    yield line
