"""Measurements shared by all sides of the index benchmark.

Also imported in autofaiss's own environment, so it must not import vlm.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COUNTS = (1, 10, 100)
_TIMED_TOP = 10
_MAX_EF = 4096
_WARM_UP_SECONDS, _TIMED_SECONDS = 0.1, 0.2
_TIE = 1e-6

Search = Callable[[np.ndarray, int], np.ndarray]
"""From queries and a number of results to the positions of the rows found, -1 for missing results."""


def measure(search: Search, request: dict[str, Any]) -> dict[str, Any]:
    """Depending on the request: recall up to ties, or the time of queries, run one at a time for a while.

    seconds: of each query, by the clock. cpu_s: processor time of all of them, which other work on the machine changes
    less; threads that a library starts count too.
    """
    folder = Path(request["folder"])
    questions = np.load(folder / "questions.npy")
    if request["do"] == "recall":
        rows, truth = np.load(folder / "rows.npy", mmap_mode="r"), np.load(folder / "truth.npy")
        return {f"recall@{count}": _recall(search, rows, questions, truth, count) for count in COUNTS}
    # warm-up: the CPU caches hold the data of another process
    place, _ = _retrieve(search, questions, request["first"], _WARM_UP_SECONDS)
    before = time.process_time()
    place, seconds = _retrieve(search, questions, place, _TIMED_SECONDS)
    return {"seconds": seconds, "cpu_s": time.process_time() - before, "next": place}


def tune_ef(set_search: Callable[[int], Search], folder: Path, recall: float) -> int:
    """The least ef of a graph with which the mean recall@10 of the tuning queries reaches `recall`; the same for all.

    set_search: makes the search with this ef. Doubles ef until it reaches the recall, then bisects.
    """
    planned, truth = np.load(folder / "planned.npy"), np.load(folder / "planned_truth.npy")
    rows = np.load(folder / "rows.npy", mmap_mode="r")

    def reaches(ef: int) -> bool:
        return _recall(set_search(ef), rows, planned, truth, _TIMED_TOP) >= recall

    low, high = _TIMED_TOP - 1, _TIMED_TOP
    while not reaches(high):
        if high == _MAX_EF:
            return high
        low, high = high, min(2 * high, _MAX_EF)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def _retrieve(search: Search, questions: np.ndarray, place: int, limit: float) -> tuple[int, list[float]]:
    """Run queries one by one from this position for so many seconds; returns the position after the last."""
    seconds: list[float] = []
    end = time.perf_counter() + limit
    while (before := time.perf_counter()) < end:
        search(questions[place][None], _TIMED_TOP)
        seconds.append(time.perf_counter() - before)
        place = (place + 1) % len(questions)
    return place, seconds


class PeakMemory:
    """Peak memory of this process in MB relative to its present memory; memory-mapped file pages count.

    Linux only: resets the kernel's high-water mark.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_mb("VmRSS")

    def mb(self) -> float:
        """The peak so far."""
        return _status_mb("VmHWM") - self._before

    def whole_mb(self) -> float:
        """The peak so far, including what was held before."""
        return _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


def _recall(search: Search, rows: np.ndarray, questions: np.ndarray, truth: np.ndarray, count: int) -> float:
    count = min(count, truth.shape[1])
    hits = 0
    for first in range(0, len(questions), 100):
        some = questions[first : first + 100]
        positions = search(some, count)
        scores = np.einsum("qd,qkd->qk", some, rows[np.maximum(positions, 0)])
        is_near = scores >= truth[first : first + 100, count - 1 : count] - _TIE
        hits += int((is_near & (positions >= 0)).sum())
    return hits / (len(questions) * count)
