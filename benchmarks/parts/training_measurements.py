"""The five measurements of the trainer benchmark; each returns medians and ratios with all single values."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from parts.measure_process import BENCH, Side
from parts.messages import say
from parts.training_runs import NETWORK, Network, Precision, Trainer, TrainerRun, Trainers

from vlm.errors import VlmError

MEMORY_GB = (8, 16, 64, 128)
"""Memory sizes for which the largest batch is reported."""
_OVERCOUNT_SAMPLES = 16
_OVERCOUNT_SPLITS = (1, 2, 4)
_TINY = Network(width=32, layers=1, text_layers=1, image_size=32, patch_size=8, context_length=77)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes and repetitions. large: batch in micro-batches whose memory is compared with batch's; split: whose time is.

    margin: untimed steps at either end of a run, where queues of batches fill and drain.
    """

    steps: int
    repeats: int
    margin: int
    batch: int
    large: int
    split: int
    allocators: tuple[str, ...]
    precisions: tuple[Precision, ...]


def throughput(trainers: Trainers, sizes: Sizes, shards: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Samples per second of both trainers on each data set, by allocator setting and precision; the runs alternate."""
    rows: list[dict[str, Any]] = []
    for name, found in shards.items():
        for allocator, precision in product(sizes.allocators, sizes.precisions):
            run = TrainerRun(
                shards=tuple(found),
                batch=sizes.batch,
                micro=sizes.batch,
                steps=sizes.steps + 2 * sizes.margin,
                allocator=allocator,
                precision=precision,
            )
            rows.append({"shards": name} | _compare_trainers(trainers, sizes, name, run))
    return rows


def _compare_trainers(trainers: Trainers, sizes: Sizes, name: str, run: TrainerRun) -> dict[str, Any]:
    rates: dict[Trainer, list[float]] = {"ours": [], "open_clip": []}
    for repeat in range(sizes.repeats):
        settings = f"{name}, allocator {run.allocator}, {run.precision}"
        say(f"throughput: {settings}, run {repeat + 1} of {sizes.repeats} …")
        for trainer in _in_turn(tuple(rates), repeat):
            each = trainers.measure(trainer, run).samples_per_s[sizes.margin :][: sizes.steps]
            rates[trainer].append(len(each) / sum(1 / rate for rate in each))
    ratios = [one / two for one, two in zip(rates["ours"], rates["open_clip"], strict=True)]
    medians = {side: median(found) for side, found in rates.items()}
    found = {"samples_per_s": medians, "ratio": median(ratios), "runs": rates}
    return {"allocator": run.allocator, "precision": run.precision} | found


def memory(trainers: Trainers, sizes: Sizes, shards: list[str]) -> dict[str, Any]:
    """Peak memory of both trainers with a batch and with a large one in micro-batches of that size, two steps of each.

    The line through both gives the bytes per additional sample, and the largest batch for a given memory.
    """
    peaks: dict[str, dict[int, list[float]]] = {}
    for repeat in range(sizes.repeats):
        for trainer in ("ours", "open_clip"):
            for batch in (sizes.batch, sizes.large):
                say(f"memory: {trainer}, batch {batch:,}, run {repeat + 1} of {sizes.repeats} …")
                run = TrainerRun(shards=tuple(shards), batch=batch, micro=sizes.batch, steps=2)
                peak = trainers.measure(trainer, run, is_watched=True).peak_mb
                peaks.setdefault(trainer, {}).setdefault(batch, []).append(peak)
    medians = {side: {batch: median(found) for batch, found in each.items()} for side, each in peaks.items()}
    ratios = {side: each[sizes.large] / each[sizes.batch] for side, each in medians.items()}
    lines = {side: _line(each[sizes.batch], each[sizes.large], sizes) for side, each in medians.items()}
    return {"peak_mb": medians, "ratio": ratios, "runs": peaks, "lines": lines}


def _line(small_mb: float, large_mb: float, sizes: Sizes) -> dict[str, Any]:
    """KB per additional sample of a batch in micro-batches, and the largest such batch by GB of memory."""
    slope = max(large_mb - small_mb, 0) / (sizes.large - sizes.batch)
    if not slope:
        return {"kb_a_sample": 0.0, "largest": {}}
    free = {room: room * 1e3 - small_mb for room in MEMORY_GB}
    largest = {room: max(0, sizes.batch + int(mb / slope) // sizes.batch * sizes.batch) for room, mb in free.items()}
    return {"kb_a_sample": slope * 1e3, "largest": largest}


def step_cost(trainers: Trainers, sizes: Sizes, shards: list[str]) -> dict[str, Any]:
    """Seconds of the run's step and of a bare one on the same batch, alternating step by step in one process."""
    say("step: ours compared with a bare PyTorch step …")
    whole = {"batch": sizes.batch, "micro": sizes.batch}
    asked = {"ours": {"kind": "ours", **whole}, "bare": {"kind": "bare", **whole}}
    with Side(trainers.pythons["ours"], "vlm_steps.py") as side:
        seconds = _step_times(trainers, sizes, shards, asked, dict.fromkeys(asked, side))
    ratios = [one / two for one, two in zip(seconds["ours"], seconds["bare"], strict=True)]
    return {"seconds": _medians(seconds), "ratio": median(ratios), "runs": seconds}


def split_cost(trainers: Trainers, sizes: Sizes, shards: list[str]) -> dict[str, Any]:
    """Milliseconds per sample of an undivided batch, of a larger one in micro-batches of that size, and undivided.

    Each in its own process, alternating step by step.
    """
    say(f"split: {sizes.split:,} in micro-batches of {sizes.batch:,} …")
    cases = {
        "undivided": (sizes.batch, sizes.batch),
        "in parts": (sizes.split, sizes.batch),
        "large, undivided": (sizes.split, sizes.split),
    }
    asked = {name: {"kind": "ours", "batch": batch, "micro": micro} for name, (batch, micro) in cases.items()}
    sides = {name: Side(trainers.pythons["ours"], "vlm_steps.py") for name in cases}
    seconds = _step_times(trainers, sizes, shards, asked, sides)
    for side in sides.values():
        side.close()
    each = {name: [second / cases[name][0] * 1e3 for second in found] for name, found in seconds.items()}
    ratios = {
        name: median(one / two for one, two in zip(each["in parts"], each[name], strict=True))
        for name in ("undivided", "large, undivided")
    }
    return {"ms_a_sample": _medians(each), "ratio": ratios, "runs": each}


def overcount(trainers: Trainers) -> dict[str, Any]:
    """Gradients of temperature and bias in k micro-batches on both sides, on a small network in double precision."""
    say("overcount: gradients of temperature and bias in micro-batches …")
    config = json.dumps(_TINY.values())
    with tempfile.TemporaryDirectory() as folder:
        found = str(Path(folder) / "gradients.pt")
        splits = json.dumps(_OVERCOUNT_SPLITS)
        theirs = [str(BENCH / "open_clip_accumulation.py"), config, str(_OVERCOUNT_SAMPLES), splits, found]
        _said([str(trainers.pythons["open_clip"]), *theirs])
        return json.loads(_said([str(trainers.pythons["ours"]), str(BENCH / "vlm_accumulation.py"), config, found]))


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise VlmError(f"{' '.join(command[:2])} … failed: {done.stderr[-2000:]}")
    return done.stdout


def _step_times(
    trainers: Trainers,
    sizes: Sizes,
    shards: list[str],
    asked: dict[str, dict[str, Any]],
    sides: dict[str, Side],
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    with tempfile.TemporaryDirectory() as folder:
        same = {"shards": shards, "models": str(trainers.models), "network": NETWORK, "folder": folder}
        for name, request in asked.items():
            sides[name].ask(**same, **request)
        for number in range(sizes.steps * sizes.repeats):
            for name in _in_turn(tuple(asked), number):
                seconds[name].append(sides[name].ask(**same, **asked[name])["seconds"])
    return seconds


def _medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in found.items()}


def _in_turn(names: Sequence[Any], number: int) -> Sequence[Any]:
    """Reverse the order every other time, so that no side is always first."""
    return names if number % 2 == 0 else names[::-1]
