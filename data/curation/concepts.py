"""Balancing over concepts, after MetaCLIP."""

import json
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from vlm.data.curation.caption_rules import UNSPACED_CHARACTERS
from vlm.data.curation.rule import Situation, Verdict
from vlm.errors import UsageError
from vlm.files import fingerprint_of

_PUNCTUATION = re.compile(r"([,.;:?!`])")
_CAPTIONS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ConceptCap:
    """concepts: a file, a JSON list or a concept a line; cap: samples expected of a concept, more or less.

    languages: look at these captions only (`tags` for tags).
    """

    concepts: Path
    cap: Annotated[float, Field(gt=0)] = 20_000
    languages: tuple[str, ...] = ()


def by_concepts(situation: Situation, given: ConceptCap) -> Verdict:
    """Keep samples of frequent concepts less often (Xu et al. 2024, arXiv 2309.16671, algorithm 1).

    A concept matches a sample when it stands, between word borders, in one of its captions. With `count` samples
    matched, each match keeps its sample with probability min(1, cap / count), independently, so a sample is kept with
    1 - Π (1 - p) over its concepts; one that matches nothing is dropped. As in the paper a frequent concept may end
    above the cap, kept by the rarer concepts beside it. Theirs counts pairs of picture and caption, this one samples.
    """
    facts = situation.facts
    names = read_concepts(given.concepts)
    places, _, texts = facts.captions(given.languages)
    is_left = situation.is_left[places]
    samples, concepts = match(names, places[is_left], texts.filter(pa.array(is_left)))
    counts = np.bincount(concepts, minlength=len(names))
    chances = np.minimum(1.0, given.cap / np.maximum(counts, 1))
    weights = keep_probabilities(samples, chances[concepts], len(facts))
    kept = np.bincount(concepts, weights=weights[samples], minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    matched = int(np.count_nonzero(counts))

    def why(place: int) -> str:
        own = concepts[samples == place]
        if not len(own):
            return "matches no concept"
        rarest = own[np.argmin(counts[own])]
        return f"{weights[place]:.2f} · {names[rarest]} ({counts[rarest]:,})"

    return Verdict(
        weights=weights,
        why=why,
        record={
            "concepts": fingerprint_of(*names),
            "concepts_given": len(names),
            "concepts_matched": matched,
            "concepts_above_cap": int((counts > given.cap).sum()),
            "samples_matched": len(np.unique(samples)),
        },
        curve=[
            {"concept": names[place], "matches": int(counts[place]), "expected": float(kept[place])}
            for place in order[:matched].tolist()
        ],
    )


def keep_probabilities(samples: np.ndarray, chances: np.ndarray, number: int) -> np.ndarray:
    """float64 [number]: 1 - Π (1 - chance) over the matches of each sample, 0 without any.

    >>> keep_probabilities(np.array([0, 0, 2]), np.array([0.5, 0.5, 1.0]), 3).round(6).tolist()
    [0.75, 0.0, 1.0]
    """
    with np.errstate(divide="ignore"):
        missed = np.bincount(samples, weights=np.log1p(-chances), minlength=number)
    return 0.0 - np.expm1(missed)


def read_concepts(path: Path) -> list[str]:
    """The concepts of a file, each once, lower case, in their order.

    Raises:
        UsageError: there is no such file, or no concept in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        listed = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"The concepts {str(path)!r} cannot be read: {error}.") from error
    names = list(dict.fromkeys(spaced(name) for name in listed if isinstance(name, str) and name.strip()))
    if not names:
        raise UsageError(f"{path} names no concept; write one a line, or a JSON list.")
    return names


def spaced(text: str) -> str:
    """A text as it is matched: lower case, `, . ; : ? ! \\`` set apart, words one space apart.

    >>> spaced("A Dog,  running.")
    'a dog , running .'
    """
    return " ".join(_PUNCTUATION.sub(r" \1 ", text.lower()).split())


def match(names: Sequence[str], places: np.ndarray, texts: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Which concepts stand in the captions of which samples: parallel arrays of places and concepts, each pair once.

    names: as `spaced` gives them; places (int64, ascending): the sample of each text. One pass of Aho and
    Corasick (1975) a caption, whatever the number of concepts.
    """
    import ahocorasick_rs

    patterns = [name if UNSPACED_CHARACTERS.search(name) else f" {name} " for name in names]
    automaton = ahocorasick_rs.AhoCorasick(patterns)
    samples, concepts = array("q"), array("q")
    for start in range(0, len(texts), _CAPTIONS_AT_ONCE):
        block = texts.slice(start, _CAPTIONS_AT_ONCE).to_pylist()
        for place, text in zip(places[start : start + _CAPTIONS_AT_ONCE].tolist(), block, strict=True):
            found = _found(automaton.find_matches_as_indexes(f" {spaced(text)} ", overlapping=True))
            samples.extend([place] * len(found))
            concepts.extend(found)
    pairs = np.stack([np.array(samples, dtype=np.int64), np.array(concepts, dtype=np.int64)], axis=1)
    pairs = np.unique(pairs, axis=0)
    return pairs[:, 0], pairs[:, 1]


def _found(matches: Iterable[tuple[int, int, int]]) -> set[int]:
    return {concept for concept, _, _ in matches}
