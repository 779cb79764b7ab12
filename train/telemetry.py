"""How a run goes: a line of metrics.jsonl every few steps, and a progress line with the time left."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from vlm.console import progress
from vlm.files import append_line, read_lines, write_text

METRICS = "metrics.jsonl"

Item = TypeVar("Item")


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with its step; nothing after a resumed step survives."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        kept = [line for line in read_lines(path) if json.loads(line)["step"] <= resumed_step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of one step."""
        append_line(self._path, json.dumps({"step": step, **values}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in read_lines(path)]


class StepClock:
    """Times a run: samples a second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._restart()

    def _restart(self) -> None:
        self._since, self._waited, self._steps = time.monotonic(), 0.0, 0

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """Pass the items on, counting the time each takes to come."""
        while True:
            before = time.monotonic()
            item = next(items, None)
            self._waited += time.monotonic() - before
            if item is None:
                return
            yield item

    def tick(self) -> None:
        """One more step is done."""
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        """Leave out time that was spent on neither data nor steps (evaluation, saving)."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """samples_per_second, data_wait (share in [0, 1]), memory_bytes; then start anew."""
        elapsed = max(time.monotonic() - self._since, 1e-9)
        values = {
            "samples_per_second": self._steps * self._batch_size / elapsed,
            "data_wait": min(self._waited / elapsed, 1.0),
            "memory_bytes": float(_memory_bytes()),
        }
        self._restart()
        return values


class ProgressLine:
    """One bar over the whole run: step, loss, samples/s, data wait, time left."""

    def __init__(self, *, steps: int, done: int, is_shown: bool) -> None:
        self._bar = progress(total=steps, what="training", done=done, unit="step") if is_shown else None

    def update(self, values: dict[str, Any]) -> None:
        """Show the newest values."""
        if self._bar is not None:
            note = (
                f"loss {values['loss']:.3f}  {values['samples_per_second']:,.0f} samples/s  "
                f"data wait {values['data_wait']:.0%}"
            )
            self._bar.set_postfix_str(note, refresh=False)

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _memory_bytes() -> int:
    """Peak memory of the GPU, or memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
