"""The list of concepts that captions are balanced over: words and pairs of words of a corpus, titles, WordNet.

MetaCLIP (Xu et al. 2024, §3.1) rebuilds CLIP's list from the unigrams of Wikipedia that occur at least 100 times, its
bigrams of high pointwise mutual information, its titles, and all synsets of WordNet.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vlm.data.curation.caption_filters import spaced
from vlm.errors import UsageError
from vlm.files import write_text
from vlm.results import Result

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

    In this order, each once: WordNet's synsets, words and pairs by falling count and information, titles. texts are
    read twice, so that pairs of rare words, of which a large corpus has very many, are never counted.

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
            # a pair is at most as frequent as the rarer of its words
            pairs.update(pair for pair in pairwise(run) if min(counts[pair[0]], counts[pair[1]]) >= limits.min_count)
    num_words = counts.total()
    information: dict[str, float] = {}
    for (first, second), count in pairs.items():
        if count >= limits.min_count:
            by_chance = counts[first] * counts[second] / num_words**2
            information[f"{first} {second}"] = math.log2(count / num_pairs / by_chance)
    informative = [pair for pair, bits in information.items() if bits >= limits.min_pmi]
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
    # Wikipedia's dumps write spaces as underscores
    titles = [spaced(line.replace("_", " "), folds_case=folds_case) for line in lines]
    return list(dict.fromkeys(title for title in titles if title))


@dataclass(frozen=True)
class TextLines:
    """The lines of a text file that are not empty, read anew each time."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    yield line
