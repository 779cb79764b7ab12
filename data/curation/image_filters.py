"""Rules by the picture alone, and by chance alone.

Rules that drop what is there twice, in the shards or in an evaluation set.

Rules by the values a model gave to samples, read from stored columns.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from vlm.data.curation.filter import NoParameters, Situation, Verdict, join_pairs, keep_one_each, need_one_of
from vlm.data.curation.sample_table import DIGEST_BYTES, Facts, Need
from vlm.data.curation.score_columns import Values
from vlm.data.dedup import DISTANCE, same_looks
from vlm.data.selection import MAX_TIMES
from vlm.data.shards import expand_shards
from vlm.errors import UsageError, VlmError
from vlm.files import fingerprint_of

Pixels = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """min: pixels the shorter side has at least; max: pixels the longer side has at most."""

    min: Pixels | None = None
    max: Pixels | None = None

    def __post_init__(self) -> None:
        need_one_of(self, "min", "max")
        if self.min and self.max and self.min > self.max:
            raise UsageError(f"min = {self.min} is above max = {self.max}; no picture fits.")


def by_size(situation: Situation, given: SizeLimits) -> Verdict:
    """Keep pictures whose sides are within limits."""
    widths, heights = situation.facts.numbers("width"), situation.facts.numbers("height")
    fits = np.ones(len(situation.facts), dtype=bool)
    if given.min is not None:
        fits &= np.minimum(widths, heights) >= given.min
    if given.max is not None:
        fits &= np.maximum(widths, heights) <= given.max
    return Verdict(weights=fits.astype(np.float64), why=lambda place: f"{widths[place]}×{heights[place]} pixels")


@dataclass(frozen=True, kw_only=True)
class AspectLimit:
    """max: how many times the longer side is as long as the shorter one, at most."""

    max: Annotated[float, Field(ge=1)] = 3.0


def by_aspect(situation: Situation, given: AspectLimit) -> Verdict:
    """Keep pictures that are not too long and narrow."""
    sides = np.stack([situation.facts.numbers("width"), situation.facts.numbers("height")]).astype(np.float64)
    ratios = sides.max(axis=0) / np.maximum(sides.min(axis=0), 1)
    return Verdict(weights=(ratios <= given.max).astype(np.float64), why=lambda place: f"1 : {ratios[place]:.2f}")


def by_decoding(situation: Situation, given: NoParameters) -> Verdict:
    """Keep what decodes; the scan has already said what does not."""
    weights = situation.facts.is_usable.astype(np.float64)
    return Verdict(weights=weights, why=lambda place: "decodes" if weights[place] else "cannot be decoded")


@dataclass(frozen=True, kw_only=True)
class Share:
    """share: probability that a sample is kept."""

    share: Annotated[float, Field(ge=0, le=1)]


def by_chance(situation: Situation, given: Share) -> Verdict:
    """Keep a share, drawn from the seed."""
    weights = np.full(len(situation.facts), given.share)
    return Verdict(weights=weights, why=lambda place: "drawn by chance")


@dataclass(frozen=True, kw_only=True)
class Times:
    """times: how often each sample is seen, on the mean."""

    times: Annotated[float, Field(ge=0, le=MAX_TIMES)]


def by_weight(situation: Situation, given: Times) -> Verdict:
    """See every sample so many times."""
    weights = np.full(len(situation.facts), given.times)
    return Verdict(weights=weights, why=lambda place: f"{given.times:g} times")


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


Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class AtLeast:
    """min: the least value kept; top: or the share of samples kept, those of the highest values."""

    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    top: Fraction | None = None

    def __post_init__(self) -> None:
        need_one_of(self, "min", "top")
        if self.min is not None and self.top is not None:
            raise UsageError("min= and top= are both given; give one.")


def by_similarity(situation: Situation, given: AtLeast) -> Verdict:
    """Keep samples whose picture and caption a model finds alike (LAION and DataComp filter by it)."""
    return _by_value(situation, "similarity", given)


def by_target(situation: Situation, given: AtLeast) -> Verdict:
    """Keep samples near to a target set."""
    return _by_value(situation, "near", given)


def _by_value(situation: Situation, signal: str, given: AtLeast) -> Verdict:
    stored = situation.columns.values_of(signal, situation.facts)
    if given.min is not None:
        is_kept = stored.has_value & (stored.values >= np.float32(given.min))
    else:
        is_kept = _first(situation, stored, -stored.values, share=given.top, k=None)
    return _verdict(situation, stored, is_kept.astype(np.float64), signal)


@dataclass(frozen=True, kw_only=True)
class HowMany:
    """k: samples kept; share: or which share of them."""

    k: Annotated[int, Field(ge=1)] | None = None
    share: Fraction | None = None

    def __post_init__(self) -> None:
        need_one_of(self, "k", "share")
        if self.k is not None and self.share is not None:
            raise UsageError("k= and share= are both given; give one.")


def by_typicality(situation: Situation, given: HowMany) -> Verdict:
    """Keep the samples nearest to the centre of their cluster (Sorscher et al. 2022, arXiv 2206.14486)."""
    return _by_distance(situation, given, sign=1)


def by_atypicality(situation: Situation, given: HowMany) -> Verdict:
    """Keep the samples farthest from the centre of their cluster."""
    return _by_distance(situation, given, sign=-1)


def _by_distance(situation: Situation, given: HowMany, *, sign: int) -> Verdict:
    stored = situation.columns.values_of("centre-distance", situation.facts)
    is_kept = _first(situation, stored, sign * stored.values, share=given.share, k=given.k)
    return _verdict(situation, stored, is_kept.astype(np.float64), "centre distance")


@dataclass(frozen=True, kw_only=True)
class ClusterCap:
    """cap: samples expected of a cluster, at most."""

    cap: Annotated[float, Field(gt=0)]


def by_cluster(situation: Situation, given: ClusterCap) -> Verdict:
    """Keep each sample with probability cap / size of its cluster; small clusters stay whole."""
    stored = situation.columns.values_of("cluster", situation.facts)
    is_grouped = stored.has_value & (stored.values >= 0)
    counted = np.flatnonzero(situation.is_left & is_grouped)
    clusters, codes, counts = np.unique(stored.values[counted], return_inverse=True, return_counts=True)
    chances = np.minimum(1.0, given.cap / counts)
    weights = np.where(stored.has_value, 1.0, 0.0)
    weights[counted] = chances[codes]
    curve = [
        {"cluster": int(cluster), "samples": int(count), "expected": float(count * chance)}
        for cluster, count, chance in zip(clusters, counts, chances, strict=True)
    ]
    verdict = _verdict(situation, stored, weights, "cluster")
    return Verdict(
        weights=weights,
        why=verdict.why,
        without_value=verdict.without_value,
        record={**verdict.record, "clusters": len(clusters), "capped": int((chances < 1).sum())},
        curve=sorted(curve, key=lambda each: -each["samples"]),
    )


def _first(
    situation: Situation, stored: Values, ranks: np.ndarray, *, share: float | None, k: int | None
) -> np.ndarray:
    """bool [N]: of the samples left, those with the least ranks; equal ones in the order of the tars."""
    places = np.flatnonzero(situation.is_left & stored.has_value)
    wanted = k if k is not None else round((share or 0.0) * len(places))
    is_kept = np.zeros(len(situation.facts), dtype=bool)
    is_kept[places[np.argsort(ranks[places], kind="stable")[:wanted]]] = True
    return is_kept


def _verdict(situation: Situation, stored: Values, weights: np.ndarray, what: str) -> Verdict:
    return Verdict(
        weights=weights,
        why=lambda place: f"{what} {stored.values[place]:.4g}" if stored.has_value[place] else "no value",
        without_value=int((situation.is_left & ~stored.has_value).sum()),
        record={"model": stored.model},
    )
