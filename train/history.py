"""Runs on disk: which there are, their configuration, their progress, their quality and their speed.

The held-out figures say when to stop, and whether a run learns its pairs by heart. Both are read from the lines of
`metrics.jsonl`, so that a resumed run judges as one that was never interrupted.
"""

import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Literal

from vlm.console import percent
from vlm.errors import UsageError
from vlm.files import append_line, read_lines, write_text
from vlm.manifest import MANIFEST

METRICS = "metrics.jsonl"
TELEMETRY = "telemetry.json"
CONFIG = "config.toml"
BEST_METRICS = ("text_to_image_recall@10", "text_to_image_recall@1")
_SHARES = ("recall@", "accuracy", "zero_shot", "top1", "data_wait", "mfu")
_RUNNING_SECONDS = 120.0
_RUNNING_INTERVALS = 5


def format_metric(name: str, value: float) -> str:
    """The value of a metric for people: shares in percent with one decimal.

    >>> format_metric("text_to_image_recall@10", 0.5), format_metric("loss", 1.23456)
    ('50.0%', '1.235')
    """
    if any(part in name for part in _SHARES):
        return percent(value)
    # beyond 1e4, 4g would write an exponent
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, each with its step; nothing after a resumed step survives."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        # a killed run has logged steps after its newest checkpoint, which are repeated
        kept: list[str] = []
        for line in read_lines(path):
            if json.loads(line)["step"] <= resumed_step:
                kept.append(f"{line}\n")
        write_text(path, "".join(kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the values of one step."""
        append_line(self._path, json.dumps({"step": step, **values}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in read_lines(path)]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run folder, read.

    state: finished once it has its manifest; running while it has written a line recently (within five times the usual
    pause, and at least two minutes), else stopped. planned_steps: 0 if unknown. figures: what `vlm eval --out
    RUN/evaluation` left, named like the metrics of reference curves.
    """

    folder: Path
    state: Literal["finished", "running", "stopped"]
    configuration: dict[str, Any]
    lines: Sequence[Mapping[str, Any]]
    planned_steps: int
    telemetry: dict[str, Any]
    figures: dict[str, float]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def step(self) -> int:
        """The last step it wrote about."""
        return self.lines[-1]["step"] if self.lines else 0

    def last(self, metric: str) -> float | None:
        """The last value of a metric, None if there is none."""
        for line in reversed(self.lines):
            if metric in line:
                return line[metric]
        return None

    def typical(self, metric: str) -> float | None:
        """The median of a metric over all lines but the first, which holds the start-up."""
        values = [line[metric] for line in self.lines if metric in line]
        # the median, since evaluations and slow disks make outliers
        return median(values[1:] or values) if values else None

    def best(self) -> Mapping[str, Any] | None:
        """The line with the best recall on val (text→image @10, then @1), None if none was measured."""
        measured: list[Mapping[str, Any]] = []
        for line in self.lines:
            if line.keys() >= set(BEST_METRICS):
                measured.append(line)
        return max(measured, key=itemgetter(*BEST_METRICS), default=None)

    def measured(self) -> list[Mapping[str, Any]]:
        """The lines, with what was evaluated afterwards as one more line at the last step."""
        return [*self.lines, {"step": self.step, **self.figures}] if self.figures else list(self.lines)


def write_telemetry(run: Path, *, steps: int, utilisation: Mapping[str, Any]) -> None:
    """Write into a run's folder, when it begins, its planned steps and what MFU is measured against."""
    write_text(run / TELEMETRY, json.dumps({"steps": steps, **utilisation}, indent=1) + "\n")


def find_runs(folder: Path) -> list[Path]:
    """The run folders in a folder, or itself, oldest first; checkpoints and models inside runs do not count.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"There is no folder {str(folder)!r}; give the one your runs are in.")
    runs = [path.parent for path in folder.rglob(CONFIG) if _is_run(path.parent)]
    return sorted(runs, key=lambda path: ((path / CONFIG).stat().st_mtime, path))


def read_run(folder: Path) -> RunRecord:
    """Read a run, whatever its state and whichever version began it.

    Raises:
        UsageError: the folder is not a run.
    """
    if not _is_run(folder):
        raise UsageError(
            f"{folder} is not a run: it needs {CONFIG} and {METRICS}; vlm runs DIR lists the runs of a directory."
        )
    configuration = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
    lines = read_metrics(folder / METRICS)
    telemetry = _read_json(folder / TELEMETRY)
    counts = _read_json(folder / MANIFEST).get("counts", {})
    # earlier versions wrote no telemetry; a finished run knows its steps best
    planned = counts.get("steps") or telemetry.get("steps") or max(configuration.get("steps", -1), 0)
    return RunRecord(
        folder=folder,
        state=_state(folder, lines),
        configuration=configuration,
        lines=lines,
        planned_steps=planned,
        telemetry=telemetry,
        figures=_figures(folder / "evaluation" / "evaluation.json"),
    )


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


def _state(folder: Path, lines: Sequence[Mapping[str, Any]]) -> Literal["finished", "running", "stopped"]:
    if (folder / MANIFEST).is_file():
        return "finished"
    pauses: list[float] = []
    before: float | None = None
    for line in lines:
        if "seconds" in line:
            if before is not None:
                pauses.append(line["seconds"] - before)
            before = line["seconds"]
    # no process id is kept: the run may be on another machine, and the folder on a shared disk
    longest_pause = max(_RUNNING_SECONDS, _RUNNING_INTERVALS * median(pauses) if pauses else 0.0)
    silence = time.time() - (folder / METRICS).stat().st_mtime
    return "running" if silence < longest_pause else "stopped"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # a running process may be in the midst of writing it
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _figures(path: Path) -> dict[str, float]:
    values = _read_json(path)
    figures: dict[str, float] = {}
    if values.get("zero_shot"):
        figures["zero_shot_top1"] = values["zero_shot"]["top1"]
    if values.get("caption_truth"):
        figures["true_captions"] = values["caption_truth"]["true"]
    return figures


Lines = Sequence[Mapping[str, Any]]

DEFAULT_METRIC = "text_to_image_recall@10"
"""What is judged where no metric is named."""
# a fall by chance is smaller on a thousand images, measured on the same ones each time
_LEAST_FALL = 0.01
# two evaluations, since one may be low by chance
_LEAST_EVALUATIONS = 2
_LEAST_LOSS_FALL = 0.02


def evaluations_without_gain(lines: Lines, metric: str) -> int:
    """How many evaluations in a row, up to the last, have not beaten the best before them.

    >>> evaluations_without_gain([{"top1": 0.3}, {"loss": 1.0}, {"top1": 0.5}, {"top1": 0.5}, {"top1": 0.4}], "top1")
    2
    """
    without_gain = 0
    best = -1.0
    for line in lines:
        if metric not in line:
            continue
        # an equal value is no gain, as for the best checkpoint
        without_gain = 0 if line[metric] > best else without_gain + 1
        best = max(best, line[metric])
    return without_gain


def overfitting(lines: Lines, metric: str) -> str:
    """In words, that a held-out share falls while the loss falls; empty where it does not, or not by more than chance.

    The share must be a point below its best at the last two evaluations, and the loss 2% below what it was at the best.
    It is said once for each best: at later evaluations of the same fall this is empty.
    """
    values: list[tuple[int, float, float]] = []
    loss: float | None = None
    for line in lines:
        loss = line.get("loss", loss)
        if metric in line and loss is not None:
            values.append((line["step"], line[metric], loss))
    if not values:
        return ""
    best = max(range(len(values)), key=lambda index: values[index][1])
    best_step, best_value, best_loss = values[best]
    falls: list[bool] = []
    for _, value, loss_then in values[best + 1 :]:
        falls.append(best_value - value >= _LEAST_FALL and loss_then < best_loss * (1 - _LEAST_LOSS_FALL))
    is_new = len(falls) < _LEAST_EVALUATIONS + 1 or not all(falls[-_LEAST_EVALUATIONS - 1 : -1])
    if len(falls) < _LEAST_EVALUATIONS or not all(falls[-_LEAST_EVALUATIONS:]) or not is_new:
        return ""
    _, value, last_loss = values[-1]
    return (
        f"Overfitting: since step {best_step:,} the loss on what is trained on has fallen from {best_loss:.3g} to "
        f"{last_loss:.3g}, and {metric} on what is held out from {format_metric(metric, best_value)} to "
        f"{format_metric(metric, value)}: the model learns its pairs by heart. Keep the best "
        f"(--keep-best {metric} --early-stop 3), train shorter or at a smaller --learning-rate, lock a tower (--lock), "
        "or bring more pairs."
    )
