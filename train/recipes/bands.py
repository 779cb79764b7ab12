"""Where a run is expected to be, as bands around curves, and where it leaves them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance
from typing import Any, Literal

from vlm.errors import UsageError

Lines = Sequence[Mapping[str, Any]]

SHARES = tuple(number / 10 for number in range(1, 11))
_END_WIDTH = 0.01
_ROUNDING = 0.5
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t at 97.5% for 1 to 15 degrees of freedom; the last is also used beyond, a little too wide."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """What one metric of a recipe is expected to be in the course of a run.

    points: (share of the run's steps, low, high), ascending. The value of a run at a share is the mean of what it
    measured in the `width` around it, a share of the run too; without a `width`, what it measured last before it.
    kind: measured with this code, or published by others, mostly as a figure at the end. source: the runs, the paper.
    """

    metric: str
    points: tuple[tuple[float, float, float], ...]
    kind: Literal["measured", "published"]
    source: str
    width: float = 0.0

    @property
    def is_better_low(self) -> bool:
        """Whether less of the metric is better."""
        return self.metric == "loss"


@dataclass(frozen=True, kw_only=True)
class Departure:
    """A place where a run is outside its band: share of the run, its value, the band there."""

    share: float
    value: float
    low: float
    high: float
    is_better: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A run against one band: how many of its points could be compared, and those outside."""

    band: Band
    compared: int
    departures: tuple[Departure, ...]

    def sentence(self, steps: int) -> str:
        """In words; steps is the planned length of the run."""
        name = f"{self.band.metric} ({self.band.kind})"
        if not self.compared:
            return f"{name}: the run has measured nothing that could be compared yet."
        if not self.departures:
            places = "at its one point" if self.compared == 1 else f"at all {self.compared} points"
            return f"{name}: inside the band {places}."
        first = self.departures[0]
        side = "better" if first.is_better else "worse"
        return (
            f"{name}: leaves the band at step {round(first.share * steps):,} ({first.share:.0%} of the run): "
            f"{first.value:.4g}, expected {first.low:.4g} to {first.high:.4g}, so {side}; outside at "
            f"{len(self.departures)} of {self.compared} points."
        )


def value_at(lines: Lines, metric: str, *, share: float, steps: int, width: float) -> float | None:
    """What a run of so many planned steps measured at a share of it; None where it measured nothing or is not there."""
    low = (share - (width / 2 or _END_WIDTH)) * steps
    high = min(share + width / 2, 1.0) * steps + _ROUNDING
    if not lines or lines[-1]["step"] < high - 2 * _ROUNDING:
        return None
    found = [line[metric] for line in lines if metric in line and low < line["step"] <= high]
    if not found:
        return None
    return fmean(found) if width else found[-1]


def judge(band: Band, lines: Lines, steps: int) -> Verdict:
    """Where a run of so many planned steps leaves a band."""
    departures: list[Departure] = []
    compared = 0
    for share, low, high in band.points:
        value = value_at(lines, band.metric, share=share, steps=steps, width=band.width)
        if value is None:
            continue
        compared += 1
        if not low <= value <= high:
            is_better = (value < low) == band.is_better_low
            departures.append(Departure(share=share, value=value, low=low, high=high, is_better=is_better))
    return Verdict(band=band, compared=compared, departures=tuple(departures))


def band_of_runs(
    runs: Sequence[tuple[Lines, int]], metric: str, *, source: str, shares: Sequence[float] = SHARES
) -> Band:
    """The band that one more run of the same recipe stays in, at each of K points, with a probability of 95%.

    runs: lines and planned steps of n runs that differ in their seed alone. The band is the prediction interval of a
    normal variable, mean ± t · s · √(1 + 1/n). Since three runs say little about the spread at one point, s² is the
    mean over the points (for a loss relative to its mean there, which falls by much in a run), and t that of
    (n - 1) · K / 2 degrees of freedom, n - 1 at the least, for neighbouring points of a run are not independent. Shares
    at which a run measured nothing are left out.

    Raises:
        UsageError: fewer than two runs, or nothing of this metric in all of them.
    """
    if len(runs) < 2:
        raise UsageError(f"A band needs two runs or more that differ in their seed, got {len(runs)}.")
    width = shares[1] - shares[0] if len(shares) > 1 else _END_WIDTH
    at: dict[float, list[float]] = {}
    for share in shares:
        values = [value_at(lines, metric, share=share, steps=steps, width=width) for lines, steps in runs]
        known = [value for value in values if value is not None]
        if len(known) == len(runs):
            at[share] = known
    if not at:
        raise UsageError(
            f"There is no {metric!r} that all {len(runs)} runs measured at the same tenths of their steps."
        )
    is_relative = metric == "loss"
    spread = sqrt(fmean(variance(values) / (fmean(values) ** 2 if is_relative else 1.0) for values in at.values()))
    freedom = (len(runs) - 1) * max(len(at) // 2, 1)
    half = _T[min(freedom, len(_T)) - 1] * sqrt(1 + 1 / len(runs)) * spread
    points = [(share, fmean(values), half * (fmean(values) if is_relative else 1.0)) for share, values in at.items()]
    limits = [(share, middle - reach, middle + reach) for share, middle, reach in points]
    return Band(metric=metric, points=_inside_range(limits, metric), kind="measured", source=source, width=width)


def _inside_range(points: Sequence[tuple[float, float, float]], metric: str) -> tuple[tuple[float, float, float], ...]:
    """Recall cannot leave [0, 1], and no loss falls below 0."""
    most = 1.0 if "recall" in metric or "top1" in metric else float("inf")
    return tuple((share, max(low, 0.0), min(high, most)) for share, low, high in points)
