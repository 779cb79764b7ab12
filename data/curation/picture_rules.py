"""Rules by the picture alone, and by chance alone."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from vlm.data.curation.rule import NoParameters, Situation, Verdict, need_one_of
from vlm.data.selection import MAX_TIMES
from vlm.errors import UsageError

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
