"""Decontamination: no training sample may be in an evaluation set, as a file, as an image or as an embedding."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from vlm.data.curation.filter import FilterContext, FilterResult
from vlm.data.curation.sample_table import RequiredColumn, SampleTable
from vlm.data.dedup import DISTANCE, connected_components, near_duplicate_pairs
from vlm.data.shards import expand_shards
from vlm.errors import VlmError
from vlm.files import compute_fingerprint


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
