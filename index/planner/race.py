"""How quick the kinds are that may win: asked in turn, and carried on to all rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol, runtime_checkable

from vlm.index.planner.trial import Built, Latency, Trial
from vlm.index.planner.tuning import Setting
from vlm.tensors import Array, Float32

# a machine changes its pace within seconds; a round of all contenders takes a tenth of one each
_ROUNDS, _QUESTIONS_A_ROUND = 10, 200
# slower ones do not become the quickest by being asked again
_IN_THE_RACE = 1.5


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A filled index with the setting it is asked with; work: distances a question computes in it (`Kind.work`)."""

    built: Built
    setting: Setting
    work: float

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> Latency:
        """As `Built.time`."""
        return self.built.time(self.setting, vectors, top)


@runtime_checkable
class Timed(Protocol):
    """What can be timed again."""

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> tuple[Latency, Latency]:
        """Latency as measured on the sample, and as expected of all rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What tells how quick a kind is.

    fewer: the same kind with a part of the sample; None: latency is carried on by the work alone. work: of a question
        to all rows.
    """

    here: Asked
    fewer: Asked | None
    work: float

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> tuple[Latency, Latency]:
        """As `Timed.time`."""
        measured = self.here.time(vectors, top)
        smaller = (self.fewer.work, self.fewer.time(vectors, top).p50_ms) if self.fewer else None
        return measured, measured.scaled(growth((self.here.work, measured.p50_ms), smaller, self.work))


def growth(here: tuple[float, float], fewer: tuple[float, float] | None, work: float) -> float:
    """How many times longer a question takes with more work, by the line through two measurements of (work, time).

    What a question takes whatever its work is not carried on; but neither does a line fall, nor rise more steeply than
    in proportion. Of one measurement it is the proportion.

    >>> growth((100, 3.0), (50, 2.0), 400), growth((100, 3.0), None, 400)
    (3.0, 4.0)
    """
    (done, time), steepest = here, here[1] / here[0]
    slope = (time - fewer[1]) / (done - fewer[0]) if fewer and done > fewer[0] else steepest
    return 1 + min(max(slope, 0.0), steepest) * (work - done) / time


def near_quickest(trials: Sequence[Trial]) -> set[int]:
    """The places of those that keep the promise and may be the quickest of all, timed again."""
    keeping = {place: trial.latency.p50_ms for place, trial in enumerate(trials) if not trial.misses}
    limit = min(keeping.values(), default=0.0) * _IN_THE_RACE
    return {place for place, p50_ms in keeping.items() if p50_ms <= limit}


def race(paces: Mapping[int, Timed], vectors: Float32[Array, "Q D"], top: int) -> dict[int, tuple[Latency, Latency]]:
    """Each timed again, in turn with the others; the medians of what they take, by place."""
    times: dict[int, list[tuple[Latency, Latency]]] = {place: [] for place in paces}
    for _ in range(_ROUNDS):
        for place, pace in paces.items():
            times[place].append(pace.time(vectors[:_QUESTIONS_A_ROUND], top))
    return {
        place: (_median([measured for measured, _ in found]), _median([expected for _, expected in found]))
        for place, found in times.items()
    }


def _median(times: Sequence[Latency]) -> Latency:
    return Latency(
        p50_ms=median(time.p50_ms for time in times),
        p95_ms=median(time.p95_ms for time in times),
        p99_ms=median(time.p99_ms for time in times),
        per_second=median(time.per_second for time in times),
    )
