"""Filters by image and by score: size and chance, duplicates, evaluation sets, and the scores a model gave to samples.

Each filter is the dataclass of its parameters, then the function that decides.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from vlm.console import read_text
from vlm.data.curation.filter import FilterContext, FilterResult, NoParameters, keep_one_per_group, require_one_of
from vlm.data.curation.sample_table import RequiredColumn, SampleTable
from vlm.data.curation.score_columns import ScoreValues
from vlm.data.dedup import DISTANCE, connected_components, near_duplicate_pairs
from vlm.data.selection import MAX_TIMES
from vlm.data.shards import expand_shards
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint

Pixels = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """min: pixels of the shorter side, at least; max: pixels of the longer side, at most."""

    min: Pixels | None = None
    max: Pixels | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "min", "max")
        if self.min and self.max and self.min > self.max:
            raise UsageError(f"min = {self.min} is above max = {self.max}; no image fits.")


def filter_by_size(context: FilterContext, parameters: SizeLimits) -> FilterResult:
    """Keep images whose sides are within limits."""
    widths = context.sample_table.numbers("width")
    heights = context.sample_table.numbers("height")
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
    """max: longer side / shorter side, at most."""

    max: Annotated[float, Field(ge=1)] = 3.0


def filter_by_aspect(context: FilterContext, parameters: AspectLimit) -> FilterResult:
    """Keep images that are not too long and narrow."""
    sides = np.stack([context.sample_table.numbers("width"), context.sample_table.numbers("height")]).astype(np.float64)
    # unusable samples have sides of 0: they are not remaining, but must not warn either
    ratios = sides.max(axis=0) / np.maximum(sides.min(axis=0), 1)
    return FilterResult(
        weights=(ratios <= parameters.max).astype(np.float64), why=lambda position: f"1 : {ratios[position]:.2f}"
    )


def filter_by_decoding(context: FilterContext, parameters: NoParameters) -> FilterResult:
    """Keep what decodes; the scan has already marked what does not."""
    weights = context.sample_table.is_usable.astype(np.float64)
    return FilterResult(weights=weights, why=lambda position: "decodes" if weights[position] else "cannot be decoded")


@dataclass(frozen=True, kw_only=True)
class KeepShare:
    """share: probability that a sample is kept."""

    share: Annotated[float, Field(ge=0, le=1)]


def keep_random_share(context: FilterContext, parameters: KeepShare) -> FilterResult:
    """Keep a random share, drawn from the seed."""
    weights = np.full(len(context.sample_table), parameters.share)
    return FilterResult(weights=weights, why=lambda position: "drawn by chance")


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """times: how often each sample is seen in an epoch, on average."""

    times: Annotated[float, Field(ge=0, le=MAX_TIMES)]


def apply_weight(context: FilterContext, parameters: Repeats) -> FilterResult:
    """Repeat every sample so many times."""
    weights = np.full(len(context.sample_table), parameters.times)
    return FilterResult(weights=weights, why=lambda position: f"{parameters.times:g} times")


Bits = Annotated[int, Field(ge=0, le=15)]


def drop_exact_duplicates(context: FilterContext, parameters: NoParameters) -> FilterResult:
    """Keep one of the samples whose encoded images are equal byte by byte."""
    positions = context.remaining
    _, groups = np.unique(context.sample_table.digests()[positions], return_inverse=True)
    return keep_one_per_group(context, positions, groups, lambda key: f"the same file as {key}")


@dataclass(frozen=True, kw_only=True)
class HashDistance:
    """distance: the most bits in which the 64-bit hashes of two images may differ for them to be compared."""

    distance: Bits = DISTANCE


def drop_near_duplicates(context: FilterContext, parameters: HashDistance) -> FilterResult:
    """Keep one of the images that differ only by encoding, size, a little brightness or a crop by a few pixels."""
    positions = context.remaining
    hashes, thumbnails = context.sample_table.signatures(positions)
    pairs = near_duplicate_pairs(hashes, thumbnails, distance=parameters.distance)
    groups = connected_components(pairs, len(positions))
    return keep_one_per_group(context, positions, groups, lambda key: f"the same image as {key}")


def drop_embedding_duplicates(context: FilterContext, parameters: NoParameters) -> FilterResult:
    """Keep one of the samples of each stored group of near-duplicate embeddings."""
    # groups below 0 are samples without a duplicate; samples without a value are dropped, as by every filter of scores
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


Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class MinimumScore:
    """min: the lowest score kept; top: or the share of samples kept, those of the highest scores."""

    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    top: Fraction | None = None

    def __post_init__(self) -> None:
        require_one_of(self, "min", "top")
        if self.min is not None and self.top is not None:
            raise UsageError("min= and top= are both given; give one.")


def filter_by_similarity(context: FilterContext, parameters: MinimumScore) -> FilterResult:
    """Keep samples whose image and caption a model finds similar (the CLIP score of LAION and DataComp)."""
    return _filter_by_score(context, "similarity", parameters)


def filter_by_target(context: FilterContext, parameters: MinimumScore) -> FilterResult:
    """Keep samples near a target set."""
    return _filter_by_score(context, "near", parameters)


def _filter_by_score(context: FilterContext, score: str, parameters: MinimumScore) -> FilterResult:
    stored = context.columns.aligned_values(score, context.sample_table)
    if parameters.min is not None:
        # scores are stored as float32: a limit of 0.7 in float64 would drop the sample that scores just 0.7
        is_kept = stored.has_value & (stored.values >= np.float32(parameters.min))
    else:
        # the highest are the lowest of the negated, with ties in the same order
        is_kept = _lowest(context, stored, -stored.values, share=parameters.top, k=None)
    return _score_result(context, stored, is_kept.astype(np.float64), score)


@dataclass(frozen=True, kw_only=True)
class KeyList:
    """keys: a file with a sample a line, by its key or as an index names it: KEY@SHARD, or KEY@SHARD:NUMBER."""

    keys: str


def keep_listed(context: FilterContext, parameters: KeyList) -> FilterResult:
    """Keep the samples that a file names, as the one that the search page saves for training."""
    # a key may hold any character but a line feed
    lines = list(filter(None, read_text(Path(parameters.keys)).split("\n")))
    table = context.sample_table
    exact = set(lines)
    in_shards: dict[str, list[tuple[str, int | None]]] = {}
    for line in lines:
        key, sign, shard = line.rpartition("@")
        if sign:
            name, _, number = shard.rpartition(":")
            is_numbered = bool(name) and number.isdecimal()
            place = (name, int(number)) if is_numbered else (shard, None)
            in_shards.setdefault(key, []).append(place)
    is_listed = np.zeros(len(table), dtype=bool)
    for position, key in enumerate(table.table.column("key").to_pylist()):
        places = in_shards.get(key, ())
        is_listed[position] = key in exact or any(_lies_at(table, position, *place) for place in places)
    if lines and not is_listed.any():
        raise UsageError(f"None of the {len(lines):,} keys of {parameters.keys} is in these shards.")
    return FilterResult(
        weights=is_listed.astype(np.float64),
        why=lambda position: "listed" if is_listed[position] else "not listed",
        record={"lines": len(lines), "fingerprint": compute_fingerprint(*sorted(exact))},
    )


def _lies_at(table: SampleTable, position: int, shard: str, number: int | None) -> bool:
    address, own_number = table.where(position)
    # from a slash on, so that shard `1` is not found in `a/11.tar`
    is_shard = f"/{address.removesuffix('.tar')}".endswith(f"/{shard}")
    return is_shard and number in (None, own_number)


@dataclass(frozen=True, kw_only=True)
class KeepCount:
    """k: how many samples are kept; share: or which share of them."""

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
    is_kept = _lowest(context, stored, sign * stored.values, share=parameters.share, k=parameters.k)
    return _score_result(context, stored, is_kept.astype(np.float64), "centre distance")


@dataclass(frozen=True, kw_only=True)
class ClusterCap:
    """cap: expected number of samples of a cluster, at most."""

    cap: Annotated[float, Field(gt=0)]


def balance_clusters(context: FilterContext, parameters: ClusterCap) -> FilterResult:
    """Keep each sample with probability cap / size of its cluster; small clusters stay whole."""
    stored = context.columns.aligned_values("cluster", context.sample_table)
    clustered = np.flatnonzero(context.is_remaining & stored.has_value & (stored.values >= 0))
    # of the remaining alone: what an earlier filter dropped must not count as a cluster's size
    clusters, codes, sizes = np.unique(stored.values[clustered], return_inverse=True, return_counts=True)
    probabilities = np.minimum(1.0, parameters.cap / sizes)
    # samples in no cluster (below 0) stay as they are; those without a value are dropped
    weights = np.where(stored.has_value, 1.0, 0.0)
    weights[clustered] = probabilities[codes]

    curve: list[dict[str, float]] = []
    for cluster, size, probability in zip(clusters, sizes, probabilities, strict=True):
        curve.append({"cluster": int(cluster), "samples": int(size), "expected": float(size * probability)})
    result = _score_result(context, stored, weights, "cluster")
    return FilterResult(
        weights=weights,
        why=result.why,
        without_value=result.without_value,
        record={**result.record, "clusters": len(clusters), "capped": int((probabilities < 1).sum())},
        curve=sorted(curve, key=lambda entry: -entry["samples"]),
    )


def _lowest(
    context: FilterContext, stored: ScoreValues, ranks: np.ndarray, *, share: float | None, k: int | None
) -> np.ndarray:
    """bool [N]: the k, or the share, of the remaining samples with the lowest ranks; ties in the order of the tars."""
    positions = np.flatnonzero(context.is_remaining & stored.has_value)
    number = k if k is not None else round((share or 0.0) * len(positions))
    # stable, or ties would fall differently from one version of numpy to the next
    order = np.argsort(ranks[positions], kind="stable")
    is_kept = np.zeros(len(context.sample_table), dtype=bool)
    is_kept[positions[order[:number]]] = True
    return is_kept


def _score_result(context: FilterContext, stored: ScoreValues, weights: np.ndarray, what: str) -> FilterResult:
    return FilterResult(
        weights=weights,
        why=lambda position: f"{what} {stored.values[position]:.4g}" if stored.has_value[position] else "no value",
        without_value=int((context.is_remaining & ~stored.has_value).sum()),
        record={"model": stored.model},
    )


@dataclass(frozen=True, kw_only=True)
class Decontamination:
    """against: the evaluation shards; distance: as of near-duplicates; similarity: the cosine that counts as the same.

    similarity is used only if a stored column `overlap` against these shards is given.
    """

    against: str
    distance: Annotated[int, Field(ge=0, le=15)] = DISTANCE
    similarity: Annotated[float, Field(ge=-1, le=1)] = 0.95


def decontaminate(context: FilterContext, parameters: Decontamination) -> FilterResult:
    """Drop whatever an evaluation set also holds: the same file, the same image, or nearly the same embedding."""
    sample_table = context.sample_table
    evaluation_columns = frozenset({RequiredColumn.DIGEST, RequiredColumn.SIGNATURE})
    evaluation = context.scan(expand_shards(parameters.against), evaluation_columns)
    # what cannot be decoded has no signature
    usable = np.flatnonzero(evaluation.is_usable)

    is_same_file = np.isin(sample_table.digests(), evaluation.digests()[usable])
    is_same_image = np.zeros(len(sample_table), dtype=bool)
    is_same_image[context.remaining] = _shared_images(context, evaluation, usable, distance=parameters.distance)
    is_near = _near_evaluation(context, parameters, evaluation)
    is_contaminated = is_same_file | is_same_image | is_near

    def why(position: int) -> str:
        if is_same_file[position]:
            reason = "the same file"
        elif is_same_image[position]:
            reason = "the same image"
        else:
            reason = "nearly the same embedding" if is_near[position] else "not in it"
        return f"{reason} · {parameters.against}"

    return FilterResult(
        weights=(~is_contaminated).astype(np.float64),
        why=why,
        record={
            "against": compute_fingerprint(*(shard.fingerprint for shard in evaluation.shards)),
            "same_files": int((is_same_file & context.is_remaining).sum()),
            "same_pictures": int((is_same_image & ~is_same_file).sum()),
            "same_embeddings": int((is_near & ~is_same_file & ~is_same_image & context.is_remaining).sum()),
            "corrupt_in_evaluation": len(evaluation) - len(usable),
        },
    )


def _shared_images(context: FilterContext, evaluation: SampleTable, usable: np.ndarray, *, distance: int) -> np.ndarray:
    """bool, of each remaining sample: whether it is grouped with a usable image of the evaluation set."""
    hashes, thumbnails = context.sample_table.signatures(context.remaining)
    evaluation_hashes, evaluation_thumbnails = evaluation.signatures(usable)
    pairs = near_duplicate_pairs(
        np.concatenate([hashes, evaluation_hashes]),
        np.concatenate([thumbnails, evaluation_thumbnails]),
        distance=distance,
    )
    # by groups rather than pairs: a copy of a copy of an evaluation image counts too
    groups = connected_components(pairs, len(hashes) + len(evaluation_hashes))
    return np.isin(groups[: len(hashes)], groups[len(hashes) :])


def _near_evaluation(context: FilterContext, parameters: Decontamination, evaluation: SampleTable) -> np.ndarray:
    """bool [N]: whether the stored similarity to exactly these evaluation shards reaches the limit."""
    if "overlap" not in context.columns:
        return np.zeros(len(context.sample_table), dtype=bool)
    stored = context.columns.aligned_values("overlap", context.sample_table)
    # a score against fewer shards would pass for clean what was never compared
    against = set(stored.details.get("against", ()))
    missing = [shard.url for shard in evaluation.shards if shard.fingerprint not in against]
    if missing:
        raise VlmError(
            f"The column 'overlap' was made against other shards: {missing[0]} is not among them; "
            "make it again against the same evaluation shards, or leave the column out."
        )
    return stored.has_value & (stored.values >= parameters.similarity)
