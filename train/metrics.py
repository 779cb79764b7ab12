"""Metrics of a run: means since the last line, speed, data wait, MFU and time left; the progress line."""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch

from vlm.console import format_duration, progress
from vlm.tensor_types import Tensor
from vlm.train.distributed import gather_objects
from vlm.train.flops import PeakFlops, SampleFlops

logger = logging.getLogger(__name__)

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class ProgressLine:
    """One bar over the whole run: step, loss, samples/s, data wait, MFU, time left."""

    def __init__(self, *, steps: int, done: int, is_shown: bool) -> None:
        self._bar = progress(total=steps, what="training", done=done, unit="step") if is_shown else None
        if self._bar is not None:
            # the bar's own estimate of the time left ignores evaluations
            self._bar.bar_format = _FORMAT

    def update(self, values: dict[str, Any]) -> None:
        """Show the newest values."""
        if self._bar is not None:
            self._bar.set_postfix_str(progress_note(values), refresh=False)

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def roll_back(self, step: int) -> None:
        """The run rolled back to a step."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def progress_note(values: dict[str, Any]) -> str:
    """What is shown of the values of a line.

    >>> values = {"loss": 2.5, "samples_per_second": 1234.5, "data_wait": 0.03, "mfu": 0.412, "eta_seconds": 3750}
    >>> progress_note(values)
    'loss 2.500  1,234 samples/s  data wait 3%  MFU 41%  1 h 2 min left'
    """
    parts = [
        f"loss {values['loss']:.3f}",
        f"{values['samples_per_second']:,.0f} samples/s",
        f"data wait {values['data_wait']:.0%}",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    if values.get("eta_seconds"):
        parts.append(f"{format_duration(values['eta_seconds'])} left")
    return "  ".join(parts)


class WindowMean:
    """Means of named values over the steps since the last reading.

    Values may be scalars on the device: they are summed there, in float64, and nothing waits for them before `read`.
    The sums are part of the state of a run: a run that stops between two lines writes, when resumed, the line that the
    uninterrupted run does (`to_values`, `restore`).
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """The values of one step."""
        for name, value in values.items():
            # float64, so that sums do not depend on where a window begins; on the device, so that nothing waits for
            # it
            number = torch.as_tensor(value).detach().double()
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, Tensor]:
        """The mean of each name over the steps that had it; then the sums are reset."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def to_values(self) -> dict[str, tuple[float, int]]:
        """Sum and count of each name, as plain values."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}

    def restore(self, values: dict[str, Any], device: torch.device) -> None:
        """Continue from what `to_values` gave."""
        self._sums, self._counts = {}, {}
        for name, (total, count) in values.items():
            self._sums[name] = torch.tensor(total, dtype=torch.float64, device=device)
            self._counts[name] = count


Item = TypeVar("Item")


class StepTimer:
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
        peak: PeakFlops | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch_size = batch_size
        self._peak = peak
        self._now = now
        self._steps_left = steps - done
        self._is_length_known = steps > 0
        self._timed_from: float | None = None
        self._timed_steps = 0
        self._restart()

    def _restart(self) -> None:
        self._since = self._now()
        self._data_wait_seconds = 0.0
        self._steps = 0
        self._decoded = 0
        self._flops = 0.0

    def timed(self, items: Iterator[Item]) -> Generator[Item, None, None]:
        """Pass the items on, timing how long each is waited for."""
        while True:
            before = self._now()
            item = next(items, None)
            # until here: what the caller does with the item is no waiting
            self._data_wait_seconds += self._now() - before
            if item is None:
                return
            yield item

    def tick(self, *, decoded: int = 0, flops: float = 0.0) -> None:
        """One more step is done, for which this process decoded so many images and needed so many FLOPs."""
        self._steps += 1
        self._decoded += decoded
        self._flops += flops

    def exclude_time(self, seconds: float) -> None:
        """Leave out time that was spent on neither data nor steps (evaluation, saving)."""
        # as if the window had begun later
        self._since += seconds

    def read(self) -> dict[str, float]:
        """The values of this process for the steps since the last reading; then the timer is reset.

        samples_per_second (all processes), images_per_second (decoded for this process), data_wait (share in [0, 1]),
        mfu (share of the peak, in [0, 1]; absent without a peak or a count, and from the first reading on that is
        higher than the peak), memory_bytes (largest use of the GPU so
        far, or resident memory of this process now), eta_seconds (absent where the number of steps is not known).
        """
        elapsed = max(self._now() - self._since, 1e-9)
        values = {
            "samples_per_second": self._steps * self._batch_size / elapsed,
            "images_per_second": self._decoded / elapsed,
            "data_wait": min(self._data_wait_seconds / elapsed, 1.0),
            "memory_bytes": float(_memory_bytes()),
        }
        utilisation = self._utilisation(elapsed)
        if utilisation is not None:
            values["mfu"] = utilisation
        left = self._seconds_left(elapsed)
        if left is not None:
            values["eta_seconds"] = left
        self._restart()
        return values

    def _utilisation(self, elapsed: float) -> float | None:
        """Share of the peak; None where either is not known, or where the peak turns out to be none."""
        if not self._peak or not math.isfinite(self._flops) or self._flops <= 0:
            return None
        share = self._flops / elapsed / self._peak.flops
        if share <= 1:
            return share
        logger.warning(
            f"The run reaches {self._flops / elapsed / 1e12:,.3g} TFLOP/s, more than its device's peak of "
            f"{self._peak.flops / 1e12:,.3g} ({self._peak.source}), so MFU is not shown from here on: the peak was "
            "measured while other work ran, or is another device's. Give the real one by --peak-tflops."
        )
        self._peak = None
        return None

    def _seconds_left(self, elapsed: float) -> float | None:
        """From the mean over all windows but the first, which compiles and fills queues; evaluations count in it."""
        if not self._is_length_known:
            return None
        self._steps_left -= self._steps
        if self._steps_left <= 0:
            return 0.0
        if not self._steps:
            return None
        # the first window has compilation and empty queues; from the second on the mean is representative
        if self._timed_from is None:
            self._timed_from = self._now()
            return self._steps_left * elapsed / self._steps
        self._timed_steps += self._steps
        return self._steps_left * (self._now() - self._timed_from) / self._timed_steps


def reduce_over_processes(reading: dict[str, float]) -> dict[str, float]:
    """One reading for all processes, called by all: images are summed, memory is the largest, the rest are means."""
    readings = gather_objects([reading])
    reducers: dict[str, Callable[[list[float]], float]] = {"images_per_second": math.fsum, "memory_bytes": max}
    merged: dict[str, float] = {}
    for name, own_value in reading.items():
        # a process whose peak was too low leaves out its mfu
        values = [other.get(name, own_value) for other in readings]
        merged[name] = reducers.get(name, _mean)(values)
    return merged


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """What MFU is measured against: the FLOPs of a sample, and the peak of each process's device."""

    sample: SampleFlops | None
    peak: PeakFlops
    processes: int

    def to_values(self) -> dict[str, float | str | int | None]:
        """As plain values."""
        return {
            "forward_flops_per_sample": self.sample.forward if self.sample else None,
            "backward_flops_per_sample": self.sample.backward if self.sample else None,
            "peak_flops": self.peak.flops,
            "peak_source": self.peak.source,
            "processes": self.processes,
        }

    def summary(self) -> str:
        """In words, for the start of a run."""
        if self.sample is None:
            return "MFU is not reported: the FLOPs of this network cannot be counted."
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
