"""What every side of the index benchmark measures alike.

Imported also by autofaiss's own environment, so it may import nothing of vlm.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COUNTS = (1, 10, 100)
_TIMED_TOP = 10
_TIE = 1e-6

Search = Callable[[np.ndarray, int], np.ndarray]
"""Queries and how many answers to the positions of the rows found, -1 where none was."""


def measure(search: Search, folder: Path) -> dict[str, Any]:
    """Recall up to ties, and the time of one question at a time."""
    rows, questions = np.load(folder / "rows.npy", mmap_mode="r"), np.load(folder / "questions.npy")
    truth = np.load(folder / "truth.npy")
    found: dict[str, Any] = {f"recall@{count}": _recall(search, rows, questions, truth, count) for count in COUNTS}
    for question in questions[:20]:
        search(question[None], _TIMED_TOP)
    seconds = []
    for question in questions:
        before = time.perf_counter()
        search(question[None], _TIMED_TOP)
        seconds.append(time.perf_counter() - before)
    p50, p95 = (float(value) * 1000 for value in np.percentile(seconds, (50, 95)))
    return found | {"p50_ms": p50, "p95_ms": p95, "questions_per_s": len(seconds) / sum(seconds)}


class PeakMemory:
    """The most memory this process holds from now on beyond what it holds now, in MB; pages mapped from files count.

    Linux only: the kernel's high-water mark is set back.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_mb("VmRSS")

    def mb(self) -> float:
        """So far."""
        return _status_mb("VmHWM") - self._before

    def whole_mb(self) -> float:
        """So far, with what was held before."""
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
