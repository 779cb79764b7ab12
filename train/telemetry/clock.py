"""How fast a run is, what it waits for, how much of the machine it uses, how long it will still take."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch

from vlm.train.processes import gathered
from vlm.train.telemetry.flops import SampleFlops
from vlm.train.telemetry.peaks import Peak

Item = TypeVar("Item")


class StepClock:
    """Times a run: one reading for the steps since the last.

    batch_size: samples of a step, over all processes. steps, done: of the whole run, and when the clock starts.
    peak: of this process's device. now: the clock read, in seconds.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        steps: int = 0,
        done: int = 0,
        peak: Peak | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch_size, self._peak, self._now = batch_size, peak, now
        self._left, self._is_known = steps - done, steps > 0
        self._timed_from: float | None = None
        self._timed_steps = 0
        self._restart()

    def _restart(self) -> None:
        self._since, self._waited, self._steps = self._now(), 0.0, 0
        self._decoded, self._flops = 0, 0.0

    def waiting(self, items: Iterator[Item]) -> Generator[Item, None, None]:
        """Pass the items on, counting the time each takes to come."""
        while True:
            before = self._now()
            item = next(items, None)
            self._waited += self._now() - before
            if item is None:
                return
            yield item

    def tick(self, *, decoded: int = 0, flops: float = 0.0) -> None:
        """One more step is done, for which this process decoded so many pictures and owed so many FLOPs."""
        self._steps += 1
        self._decoded += decoded
        self._flops += flops

    def leave_out(self, seconds: float) -> None:
        """Leave out time that was spent on neither data nor steps (evaluation, saving)."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """The values of this process for the steps since the last reading; then start anew.

        samples_per_second (all processes), images_per_second (decoded for this process), data_wait (share in [0, 1]),
        mfu (share of the peak, in [0, 1]; absent without a peak or a count), memory_bytes (largest use of the GPU so
        far, or resident memory of this process now), eta_seconds (absent where the number of steps is not known).
        """
        elapsed = max(self._now() - self._since, 1e-9)
        values = {
            "samples_per_second": self._steps * self._batch_size / elapsed,
            "images_per_second": self._decoded / elapsed,
            "data_wait": min(self._waited / elapsed, 1.0),
            "memory_bytes": float(_memory_bytes()),
        }
        if self._peak and self._flops > 0 and math.isfinite(self._flops):
            values["mfu"] = self._flops / elapsed / self._peak.flops
        left = self._seconds_left(elapsed)
        if left is not None:
            values["eta_seconds"] = left
        self._restart()
        return values

    def _seconds_left(self, elapsed: float) -> float | None:
        """From the mean over all windows but the first, which compiles and fills queues; evaluations count in it."""
        if not self._is_known:
            return None
        self._left -= self._steps
        if self._left <= 0 or not self._steps:
            return 0.0 if self._left <= 0 else None
        if self._timed_from is None:
            self._timed_from = self._now()
            return self._left * elapsed / self._steps
        self._timed_steps += self._steps
        return self._left * (self._now() - self._timed_from) / self._timed_steps


def over_processes(reading: dict[str, float]) -> dict[str, float]:
    """One reading for all processes, called by all: images are summed, memory is the largest, the rest are means."""
    readings = gathered([reading])
    merge: dict[str, Callable[[list[float]], float]] = {"images_per_second": math.fsum, "memory_bytes": max}
    return {name: merge.get(name, _mean)([other.get(name, reading[name]) for other in readings]) for name in reading}


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """What utilisation is measured against: the FLOPs of a sample, and the peak of each of the processes' devices."""

    sample: SampleFlops | None
    peak: Peak
    processes: int

    def facts(self) -> dict[str, float | str | int | None]:
        """As plain values."""
        return {
            "forward_flops_per_sample": self.sample.forward if self.sample else None,
            "backward_flops_per_sample": self.sample.backward if self.sample else None,
            "peak_flops": self.peak.flops,
            "peak_source": self.peak.source,
            "processes": self.processes,
        }

    def sentence(self) -> str:
        """In words, for the start of a run."""
        if self.sample is None:
            return "MFU is not given: the FLOPs of this network cannot be counted."
        devices = f"{self.processes} × " if self.processes > 1 else ""
        return (
            f"MFU is of {devices}{self.peak.flops / 1e12:,.3g} TFLOP/s ({self.peak.source}); a sample takes "
            f"{self.sample.forward / 1e9:,.3g} GFLOP forward and {self.sample.backward / 1e9:,.3g} backward."
        )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _memory_bytes() -> int:
    """Peak memory of the GPU, or memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
