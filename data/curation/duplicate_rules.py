"""Rules that drop what is there twice, in the shards or in an evaluation set."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from vlm.data.curation.facts import DIGEST_BYTES, Facts, Need
from vlm.data.curation.groups import join_pairs, keep_one_each
from vlm.data.curation.rule import NoParameters, Situation, Verdict
from vlm.data.likeness import DISTANCE
from vlm.data.same_picture import same_looks
from vlm.data.shards import expand_shards
from vlm.errors import VlmError
from vlm.files import fingerprint_of

Bits = Annotated[int, Field(ge=0, le=15)]


def by_bytes(situation: Situation, given: NoParameters) -> Verdict:
    """Keep one of the samples whose encoded pictures are equal byte by byte."""
    places = situation.left
    _, groups = np.unique(_digests(situation.facts)[places], return_inverse=True)
    return keep_one_each(situation, places, groups, lambda key: f"the same file as {key}")


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """distance: bits in which the 64-bit hashes of two pictures that are compared may differ."""

    distance: Bits = DISTANCE


def by_look(situation: Situation, given: Nearness) -> Verdict:
    """Keep one of the pictures that differ only by encoding, size, a little brightness or a hair at the edges."""
    places = situation.left
    hashes, thumbnails = _looks(situation.facts, places)
    pairs = same_looks(hashes, thumbnails, distance=given.distance)
    groups = join_pairs(pairs, len(places))
    return keep_one_each(situation, places, groups, lambda key: f"the same picture as {key}")


def by_embedding(situation: Situation, given: NoParameters) -> Verdict:
    """Keep one of the samples that the stored groups of embeddings put together."""
    stored = situation.columns.values_of("duplicates", situation.facts)
    has_value = stored.has_value
    places = np.flatnonzero(situation.is_left & has_value & (stored.values >= 0))
    verdict = keep_one_each(situation, places, stored.values[places], lambda key: f"nearly the embedding of {key}")
    return Verdict(
        weights=verdict.weights * has_value,
        why=lambda place: verdict.why(place) if has_value[place] else "no value",
        twins=verdict.twins,
        without_value=int((situation.is_left & ~has_value).sum()),
        record={**verdict.record, "model": stored.model},
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """against: the evaluation shards; distance: as of near-duplicates; similarity: the cosine that counts as the same.

    similarity: used only where a stored column `overlap` against these shards is given.
    """

    against: str
    distance: Bits = DISTANCE
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.95


def by_evaluation(situation: Situation, given: Evaluation) -> Verdict:
    """Drop whatever an evaluation set also holds: the same file, the same picture, or nearly the same embedding."""
    facts, places = situation.facts, situation.left
    others = situation.scan(expand_shards(given.against), frozenset({Need.DIGEST, Need.LOOK}))
    usable = np.flatnonzero(others.is_usable)
    is_same_file = np.isin(_digests(facts), _digests(others)[usable])
    is_same_picture = np.zeros(len(facts), dtype=bool)
    hashes, thumbnails = (
        np.concatenate(pair) for pair in zip(_looks(facts, places), _looks(others, usable), strict=True)
    )
    groups = join_pairs(same_looks(hashes, thumbnails, distance=given.distance), len(hashes))
    is_same_picture[places] = np.isin(groups[: len(places)], groups[len(places) :])
    is_near = _overlap(situation, given, others)
    found = is_same_file | is_same_picture | is_near
    reasons = ["the same file", "the same picture", "nearly the same embedding", "not in it"]

    def why(place: int) -> str:
        flags = (is_same_file[place], is_same_picture[place], is_near[place], True)
        return f"{reasons[flags.index(True)]} · {given.against}"

    return Verdict(
        weights=(~found).astype(np.float64),
        why=why,
        record={
            "against": fingerprint_of(*(shard.fingerprint for shard in others.shards)),
            "same_files": int((is_same_file & situation.is_left).sum()),
            "same_pictures": int((is_same_picture & ~is_same_file).sum()),
            "same_embeddings": int((is_near & ~is_same_file & ~is_same_picture & situation.is_left).sum()),
            "corrupt_in_evaluation": len(others) - len(usable),
        },
    )


def _overlap(situation: Situation, given: Evaluation, others: Facts) -> np.ndarray:
    """bool [N]: whether the stored nearness to just these evaluation shards reaches the limit."""
    if "overlap" not in situation.columns:
        return np.zeros(len(situation.facts), dtype=bool)
    stored = situation.columns.values_of("overlap", situation.facts)
    against = set(stored.details.get("against", ()))
    missing = [shard.address for shard in others.shards if shard.fingerprint not in against]
    if missing:
        raise VlmError(
            f"The column 'overlap' was made against other shards: {missing[0]} is not among them; "
            "make it again against the same evaluation shards, or leave the column out."
        )
    return stored.has_value & (stored.values >= given.similarity)


def _digests(facts: Facts) -> np.ndarray:
    return np.ascontiguousarray(facts.fixed("digest")).view(f"V{DIGEST_BYTES}").reshape(-1)


def _looks(facts: Facts, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return facts.numbers("hash")[places], facts.fixed("thumbnail")[places]
