#!/usr/bin/env python
"""Loader throughput beside open_clip's training pipeline, Energon, mosaicml-streaming and bare decoding, in one run.

    benchmarks/run loading [--shards clothing flickr8k] [--workers 1 2] [--before CHECKOUT] [--json]

Every side has its own process; runs alternate, and medians and ratios of one session are reported. Energon and
mosaicml-streaming read copies that they convert first; they get open_clip's crop by Pillow and torchvision, and
"ours, float" does the same work (and tokenises). Also: time to the first batch, memory over 20 epochs, and the cost of
the sampler for 10^4 to 10^7 samples.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from vlm.console import show_json, show_table

sys.path.insert(0, str(Path(__file__).parent))
from parts.isolated_environment import CONVERTING_LOADERS, own_python, same_torch
from parts.measure_process import BENCH, Side
from parts.messages import say
from parts.open_clip_environment import open_clip_python, shards_of

OURS = ("ours", "ours, float")
BARE = {"bare": "torch", "bare, own filter": "own", "bare, Pillow": "Pillow"}
"""What the sides that only decode resize by."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the loader benchmark."""

    shards: tuple[str, ...] = ("clothing", "flickr8k")
    """Data sets: clothing (packed unchanged), flickr8k, or any shards."""

    size: int = 224
    """Size of the views in pixels."""

    batch: int = 64
    """Batch size in images."""

    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers; each is measured."""

    batches: int = 40
    """Batches per run."""

    skip: int = 4
    """Warm-up batches of a run, not timed."""

    repeats: int = 3
    """Runs per side; the sides alternate."""

    epochs: int = 20
    """Epochs over which memory is tracked, on the first data set; 0 skips it."""

    plan_samples: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """Sizes of the simulated corpora; none skips them."""

    before: Path | None = None
    """Another checkout of this project, whose loader is one more side."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of the environments (bench-open-clip, bench-streams) and the packed photos."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the measurements and print the results."""
    cache = arguments.cache.expanduser()
    shards = shards_of(arguments.shards, cache, max(arguments.workers))
    others = own_python(cache / "bench-streams", (*CONVERTING_LOADERS, *same_torch(), "psutil"))
    ours = Side(sys.executable, "vlm_loader.py", threads=1)
    bare = Side(sys.executable, "bare_decoding.py", threads=1)
    theirs = {
        "open_clip": Side(open_clip_python(cache / "bench-open-clip"), "open_clip_pipeline.py", threads=1),
        "Energon": Side(others, "energon_pipeline.py", threads=1),
        "mosaicml": Side(others, "mosaicml_pipeline.py", threads=1),
    }
    if arguments.before is not None:
        # its own script: what it imports of the library may have been called otherwise
        script = arguments.before.resolve() / "benchmarks" / "parts" / "vlm_loader.py"
        theirs["before"] = Side(sys.executable, script, threads=1, checkout=arguments.before)
    asked = {"ours": ours, "ours, float": ours, **theirs, **dict.fromkeys(BARE, bare)}
    with tempfile.TemporaryDirectory() as copies:
        speed = [
            _compare(arguments, asked, name=name, shards=found, workers=workers, copies=f"{copies}/{name}")
            for name, found in shards.items()
            for workers in arguments.workers
        ]
    result = {
        "command": shlex.join(["benchmarks/run", "loading", *sys.argv[1:]]),
        "speed": speed,
        "imports_s": {"ours": ours.start_s, **{name: side.start_s for name, side in theirs.items()}},
        "memory_mb": _memory(arguments, ours, next(iter(shards.values()))),
        "plans": [_plan(samples) for samples in arguments.plan_samples],
    }
    for side in (ours, bare, *theirs.values()):
        side.close()
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def _compare(
    arguments: Arguments, asked: dict[str, Side], *, name: str, shards: list[str], workers: int, copies: str
) -> dict[str, Any]:
    request = {field: getattr(arguments, field) for field in ("size", "batch", "batches", "skip")}
    request["copies"] = copies
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in asked}
    for repeat in range(arguments.repeats):
        say(f"{name}, {workers} workers, run {repeat + 1} of {arguments.repeats} …")
        for side in asked:
            how = {"is_float": side == "ours, float", "filter": BARE.get(side)}
            answer = asked[side].ask(**request, **how, shards=shards, workers=workers)
            runs[side].append(answer)
    medians = {side: {field: median(run[field] for run in found) for field in found[0]} for side, found in runs.items()}
    # each of our runs compared with its neighbours in time, since noise on a shared machine affects those ratios least
    ratios = {
        f"{mine} / {other}": median(
            one["images_per_s"] / two["images_per_s"] for one, two in zip(runs[mine], runs[other], strict=True)
        )
        for other in asked
        if other not in OURS
        for mine in OURS
    }
    return {"shards": name, "workers": workers, "medians": medians, "ratios": ratios, "runs": runs}


def _memory(arguments: Arguments, ours: Side, shards: list[str]) -> list[float]:
    if not arguments.epochs:
        return []
    say(f"{arguments.epochs} epochs of {arguments.shards[0]} …")
    workers = max(arguments.workers)
    request = {"shards": shards, "size": arguments.size, "batch": arguments.batch, "workers": workers}
    return ours.ask(**request, epochs=arguments.epochs, is_float=False)["memory_mb"]


def _plan(samples: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(BENCH / "sampler_memory.py"), str(samples), "10000", folder]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _show(result: dict[str, Any]) -> None:
    show_table(
        ["shards", "workers", "side", "images/s", *(f"{mine} ÷ it" for mine in OURS)],
        [_speed_row(row, side) for row in result["speed"] for side in row["medians"]],
        title="Images per second",
    )
    show_table(
        ["shards", "workers", "side", "converted before s", "first batch s", "with imports s", "memory MB"],
        [
            _start_row(row, side, imports_s)
            for row in result["speed"]
            for side, imports_s in result["imports_s"].items()
        ],
        title="Start, and memory of all processes",
    )
    if result["memory_mb"]:
        print(f"MB at the end of each epoch: {' '.join(f'{value:.0f}' for value in result['memory_mb'])}")
    show_table(
        ["samples", "sampler", "build s", "µs per sample", "ms per seek", "anonymous MB"],
        [_plan_row(plan, kind) for plan in result["plans"] for kind in ("plain", "selected")],
        title="Sampler of a simulated corpus",
    )
    print(f"To repeat: {result['command']}")


def _speed_row(row: dict[str, Any], side: str) -> list[Any]:
    ratios = [row["ratios"].get(f"{mine} / {side}") for mine in OURS]
    cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    return [row["shards"], row["workers"], side, round(row["medians"][side]["images_per_s"]), *cells]


def _start_row(row: dict[str, Any], side: str, imports_s: float) -> list[Any]:
    found = row["medians"][side]
    first = found["first_s"]
    converted = f"{found['prepare_s']:.1f}" if "prepare_s" in found else "–"
    times = [converted, f"{first:.2f}", f"{first + imports_s:.1f}"]
    return [row["shards"], row["workers"], side, *times, round(found["memory_mb"])]


def _plan_row(plan: dict[str, Any], kind: str) -> list[Any]:
    costs = plan[kind]
    shown = (f"{costs['build_s']:.2f}", f"{costs['sample_us']:.1f}", f"{costs['jump_ms']:.1f}")
    return [f"{plan['samples']:,}", kind, *shown, f"{costs['anonymous_mb']:.1f}"]


if __name__ == "__main__":
    run(tyro.cli(Arguments))
