"""Rules by the picture alone, and by chance alone.

Rules that drop what is there twice, in the shards or in an evaluation set.

Rules by the values a model gave to samples, read from stored columns.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from vlm.data.curation.filter import (
    FilterContext,
    FilterResult,
    NoParameters,
    keep_one_per_group,
    require_one_of,
)
from vlm.data.curation.sample_table import RequiredColumn, SampleTable
from vlm.data.curation.score_columns import ScoreValues
from vlm.data.dedup import DIGEST_BYTES, DISTANCE, connected_components, near_duplicate_pairs
from vlm.data.selection import MAX_TIMES
from vlm.data.shards import expand_shards
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint

Pixels = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """min: pixels the shorter side has at least; max: pixels the longer side has at most."""

    min: Pixels | None = None
    max: Pixels | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "min", "max")
        if self.min and self.max and self.min > self.max:
            raise UsageError(f"min = {self.min} is above max = {self.max}; no picture fits.")


def filter_by_size(context: FilterContext, parameters: SizeLimits) -> FilterResult:
    """Keep pictures whose sides are within limits."""
    widths, heights = context.sample_table.numbers("width"), context.sample_table.numbers("height")
    fits = np.ones(len(context.sample_table), dtype=bool)
    if parameters.min is not None:
        fits &= np.minimum(widths, heights) >= parameters.min
    if parameters.max is not None:
        fits &= np.maximum(widths, heights) <= parameters.max
    return FilterResult(
        weights=fits.astype(np.float64), why=lambda position: f"{widths[position]}×{heights[position]} pixels"
    )


@dataclass(frozen=True, kw_only=True)
class AspectLimit:
    """max: how many times the longer side is as long as the shorter one, at most."""

    max: Annotated[float, Field(ge=1)] = 3.0


def filter_by_aspect(context: FilterContext, parameters: AspectLimit) -> FilterResult:
    """Keep pictures that are not too long and narrow."""
    sides = np.stack([context.sample_table.numbers("width"), context.sample_table.numbers("height")]).astype(np.float64)
    ratios = sides.max(axis=0) / np.maximum(sides.min(axis=0), 1)
    return FilterResult(
        weights=(ratios <= parameters.max).astype(np.float64), why=lambda position: f"1 : {ratios[position]:.2f}"
    )


def filter_by_decoding(context: FilterContext, parameters: NoParameters) -> FilterResult:
    """Keep what decodes; the scan has already said what does not."""
    weights = context.sample_table.is_usable.astype(np.float64)
    return FilterResult(weights=weights, why=lambda position: "decodes" if weights[position] else "cannot be decoded")


@dataclass(frozen=True, kw_only=True)
class KeepShare:
    """share: probability that a sample is kept."""

    share: Annotated[float, Field(ge=0, le=1)]


def keep_random_share(context: FilterContext, parameters: KeepShare) -> FilterResult:
    """Keep a share, drawn from the seed."""
    weights = np.full(len(context.sample_table), parameters.share)
    return FilterResult(weights=weights, why=lambda position: "drawn by chance")


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """times: how often each sample is seen, on the mean."""

    times: Annotated[float, Field(ge=0, le=MAX_TIMES)]


def apply_weight(context: FilterContext, parameters: Repeats) -> FilterResult:
    """See every sample so many times."""
    weights = np.full(len(context.sample_table), parameters.times)
    return FilterResult(weights=weights, why=lambda position: f"{parameters.times:g} times")


Bits = Annotated[int, Field(ge=0, le=15)]


def drop_exact_duplicates(context: FilterContext, parameters: NoParameters) -> FilterResult:
    """Keep one of the samples whose encoded pictures are equal byte by byte."""
    positions = context.left
    _, groups = np.unique(_digests(context.sample_table)[positions], return_inverse=True)
    return keep_one_per_group(context, positions, groups, lambda key: f"the same file as {key}")


@dataclass(frozen=True, kw_only=True)
class HashDistance:
    """distance: bits in which the 64-bit hashes of two pictures that are compared may differ."""

    distance: Bits = DISTANCE


def drop_near_duplicates(context: FilterContext, parameters: HashDistance) -> FilterResult:
    """Keep one of the pictures that differ only by encoding, size, a little brightness or a hair at the edges."""
    positions = context.left
    hashes, thumbnails = _signatures(context.sample_table, positions)
    pairs = near_duplicate_pairs(hashes, thumbnails, distance=parameters.distance)
    groups = connected_components(pairs, len(positions))
    return keep_one_per_group(context, positions, groups, lambda key: f"the same picture as {key}")


def drop_embedding_duplicates(context: FilterContext, parameters: NoParameters) -> FilterResult:
    """Keep one of the samples that the stored groups of embeddings put together."""
    stored = context.columns.aligned_values("duplicates", context.sample_table)
    has_value = stored.has_value
    positions = np.flatnonzero(context.is_remaining & has_value & (stored.values >= 0))
    result = keep_one_per_group(
        context, positions, stored.values[positions], lambda key: f"nearly the embedding of {key}"
    )
    return FilterResult(
        weights=result.weights * has_value,
        why=lambda position: result.why(position) if has_value[position] else "no value",
        duplicates_of=result.duplicates_of,
        without_value=int((context.is_remaining & ~has_value).sum()),
        record={**result.record, "model": stored.model},
    )


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """against: the evaluation shards; distance: as of near-duplicates; similarity: the cosine that counts as the same.

    similarity: used only where a stored column `overlap` against these shards is given.
    """

    against: str
    distance: Bits = DISTANCE
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.95


def decontaminate(context: FilterContext, parameters: Decontamination) -> FilterResult:
    """Drop whatever an evaluation set also holds: the same file, the same picture, or nearly the same embedding."""
    sample_table, positions = context.sample_table, context.left
    others = context.scan(
        expand_shards(parameters.against), frozenset({RequiredColumn.DIGEST, RequiredColumn.SIGNATURE})
    )
    usable = np.flatnonzero(others.is_usable)
    is_same_file = np.isin(_digests(sample_table), _digests(others)[usable])
    are_near_duplicates = np.zeros(len(sample_table), dtype=bool)
    hashes, thumbnails = (
        np.concatenate(pair)
        for pair in zip(_signatures(sample_table, positions), _signatures(others, usable), strict=True)
    )
    groups = connected_components(near_duplicate_pairs(hashes, thumbnails, distance=parameters.distance), len(hashes))
    are_near_duplicates[positions] = np.isin(groups[: len(positions)], groups[len(positions) :])
    is_near = _near_evaluation(context, parameters, others)
    found = is_same_file | are_near_duplicates | is_near
    reasons = ["the same file", "the same picture", "nearly the same embedding", "not in it"]

    def why(position: int) -> str:
        flags = (is_same_file[position], are_near_duplicates[position], is_near[position], True)
        return f"{reasons[flags.index(True)]} · {parameters.against}"

    return FilterResult(
        weights=(~found).astype(np.float64),
        why=why,
        record={
            "against": compute_fingerprint(*(shard.fingerprint for shard in others.shards)),
            "same_files": int((is_same_file & context.is_remaining).sum()),
            "same_pictures": int((are_near_duplicates & ~is_same_file).sum()),
            "same_embeddings": int((is_near & ~is_same_file & ~are_near_duplicates & context.is_remaining).sum()),
            "corrupt_in_evaluation": len(others) - len(usable),
        },
    )


def _near_evaluation(context: FilterContext, parameters: Decontamination, others: SampleTable) -> np.ndarray:
    """bool [N]: whether the stored nearness to just these evaluation shards reaches the limit."""
    if "overlap" not in context.columns:
        return np.zeros(len(context.sample_table), dtype=bool)
    stored = context.columns.aligned_values("overlap", context.sample_table)
    against = set(stored.details.get("against", ()))
    missing = [shard.url for shard in others.shards if shard.fingerprint not in against]
    if missing:
        raise VlmError(
            f"The column 'overlap' was made against other shards: {missing[0]} is not among them; "
            "make it again against the same evaluation shards, or leave the column out."
        )
    return stored.has_value & (stored.values >= parameters.similarity)


def _digests(sample_table: SampleTable) -> np.ndarray:
    return np.ascontiguousarray(sample_table.fixed("digest")).view(f"V{DIGEST_BYTES}").reshape(-1)


def _signatures(sample_table: SampleTable, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return sample_table.numbers("hash")[positions], sample_table.fixed("thumbnail")[positions]


Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class MinimumScore:
    """min: the least value kept; top: or the share of samples kept, those of the highest values."""

    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    top: Fraction | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "min", "top")
        if self.min is not None and self.top is not None:
            raise UsageError("min= and top= are both given; give one.")


def filter_by_similarity(context: FilterContext, parameters: MinimumScore) -> FilterResult:
    """Keep samples whose picture and caption a model finds alike (LAION and DataComp filter by it)."""
    return _filter_by_score(context, "similarity", parameters)


def filter_by_target(context: FilterContext, parameters: MinimumScore) -> FilterResult:
    """Keep samples near to a target set."""
    return _filter_by_score(context, "near", parameters)


def _filter_by_score(context: FilterContext, score: str, parameters: MinimumScore) -> FilterResult:
    stored = context.columns.aligned_values(score, context.sample_table)
    if parameters.min is not None:
        is_kept = stored.has_value & (stored.values >= np.float32(parameters.min))
    else:
        is_kept = _first(context, stored, -stored.values, share=parameters.top, k=None)
    return _verdict(context, stored, is_kept.astype(np.float64), score)


@dataclass(frozen=True, kw_only=True)
class KeepCount:
    """k: samples kept; share: or which share of them."""

    k: Annotated[int, Field(ge=1)] | None = None
    share: Fraction | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "k", "share")
        if self.k is not None and self.share is not None:
            raise UsageError("k= and share= are both given; give one.")


def keep_typical(context: FilterContext, parameters: KeepCount) -> FilterResult:
    """Keep the samples nearest to the centre of their cluster (Sorscher et al. 2022, arXiv 2206.14486)."""
    return _keep_by_distance(context, parameters, sign=1)


def keep_atypical(context: FilterContext, parameters: KeepCount) -> FilterResult:
    """Keep the samples farthest from the centre of their cluster."""
    return _keep_by_distance(context, parameters, sign=-1)


def _keep_by_distance(context: FilterContext, parameters: KeepCount, *, sign: int) -> FilterResult:
    stored = context.columns.aligned_values("centre-distance", context.sample_table)
    is_kept = _first(context, stored, sign * stored.values, share=parameters.share, k=parameters.k)
    return _verdict(context, stored, is_kept.astype(np.float64), "centre distance")


@dataclass(frozen=True, kw_only=True)
class ClusterCap:
    """cap: samples expected of a cluster, at most."""

    cap: Annotated[float, Field(gt=0)]


def balance_clusters(context: FilterContext, parameters: ClusterCap) -> FilterResult:
    """Keep each sample with probability cap / size of its cluster; small clusters stay whole."""
    stored = context.columns.aligned_values("cluster", context.sample_table)
    is_grouped = stored.has_value & (stored.values >= 0)
    pluralize = np.flatnonzero(context.is_remaining & is_grouped)
    clusters, codes, counts = np.unique(stored.values[pluralize], return_inverse=True, return_counts=True)
    chances = np.minimum(1.0, parameters.cap / counts)
    weights = np.where(stored.has_value, 1.0, 0.0)
    weights[pluralize] = chances[codes]
    curve = [
        {"cluster": int(cluster), "samples": int(count), "expected": float(count * chance)}
        for cluster, count, chance in zip(clusters, counts, chances, strict=True)
    ]
    result = _verdict(context, stored, weights, "cluster")
    return FilterResult(
        weights=weights,
        why=result.why,
        without_value=result.without_value,
        record={**result.record, "clusters": len(clusters), "capped": int((chances < 1).sum())},
        curve=sorted(curve, key=lambda each: -each["samples"]),
    )


def _first(
    context: FilterContext, stored: ScoreValues, ranks: np.ndarray, *, share: float | None, k: int | None
) -> np.ndarray:
    """bool [N]: of the samples left, those with the least ranks; equal ones in the order of the tars."""
    positions = np.flatnonzero(context.is_remaining & stored.has_value)
    wanted = k if k is not None else round((share or 0.0) * len(positions))
    is_kept = np.zeros(len(context.sample_table), dtype=bool)
    is_kept[positions[np.argsort(ranks[positions], kind="stable")[:wanted]]] = True
    return is_kept


def _verdict(context: FilterContext, stored: ScoreValues, weights: np.ndarray, what: str) -> FilterResult:
    return FilterResult(
        weights=weights,
        why=lambda position: f"{what} {stored.values[position]:.4g}" if stored.has_value[position] else "no value",
        without_value=int((context.is_remaining & ~stored.has_value).sum()),
        record={"model": stored.model},
    )
