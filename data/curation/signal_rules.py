"""Rules by the values a model gave to samples, read from stored columns."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from vlm.data.curation.columns import Values
from vlm.data.curation.rule import Situation, Verdict, need_one_of
from vlm.errors import UsageError

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class AtLeast:
    """min: the least value kept; top: or the share of samples kept, those of the highest values."""

    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    top: Share | None = None

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
    share: Share | None = None

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
