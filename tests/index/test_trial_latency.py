"""Expected latency of all rows, and the head-to-head timing of the contenders."""

from dataclasses import replace

import numpy as np
import pytest

from tests.index.index_fixture import vectors
from tests.index.test_trial import trial
from vlm.index.autotune.trial import Latency, contenders, latency_growth, time_head_to_head


@pytest.mark.parametrize(
    ("here", "fewer", "work", "expected"),
    [
        ((100, 3.0), (50, 2.0), 400, 3.0),
        ((100, 3.0), None, 400, 4.0),
        ((100, 3.0), (50, 0.5), 400, 4.0),
        ((100, 3.0), (50, 4.0), 400, 1.0),
        ((100, 3.0), (100, 2.0), 400, 4.0),
        ((100, 3.0), (50, 2.0), 100, 1.0),
    ],
)
def test_latency_is_carried_on_along_a_line_that_neither_falls_nor_outgrows_the_work(
    here: tuple[float, float], fewer: tuple[float, float] | None, work: float, expected: float
) -> None:
    assert latency_growth(here, fewer, work) == pytest.approx(expected)


def test_only_what_meets_the_target_near_the_fastest_is_timed_again() -> None:
    missing = replace(trial(p50=0.5), misses=("recall 0.95",))
    assert contenders([trial(p50=1.4), missing, trial(p50=1), trial(p50=1.6)]) == {0, 2}
    assert contenders([missing]) == set()


class Runner:
    """Fake: its nth turn takes as many milliseconds as the pattern says, and twice that for all rows."""

    def __init__(self, name: str, pattern: list[float], turns: list[str]) -> None:
        self.name, self.pattern, self.turns = name, pattern, turns

    def time(self, vectors: np.ndarray, top: int) -> tuple[Latency, Latency]:
        """The next turn."""
        p50 = self.pattern[self.turns.count(self.name) % len(self.pattern)]
        self.turns.append(self.name)
        latency = Latency(p50_ms=p50, p95_ms=p50, p99_ms=p50, per_second=1000 / p50)
        return latency, latency.scaled(2)


def test_head_to_head_timing_takes_turns_and_gives_the_medians() -> None:
    turns: list[str] = []
    paces = {0: Runner("a", [1.0, 1.0, 1.0, 9.0, 1.0], turns), 3: Runner("b", [4.0, 5.0], turns)}
    found = time_head_to_head(paces, vectors(4, 0), 10)
    assert turns == ["a", "b"] * (len(turns) // 2)
    assert found[0][0].p50_ms == 1
    assert found[0][1].p50_ms == 2
    assert found[3][0].p50_ms == pytest.approx(4.5)
