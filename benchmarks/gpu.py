#!/usr/bin/env python
"""Training on one GPU in under eight minutes: ViT-B/32 and ViT-B/16 at 224 pixels, bf16, compiled, the real loader.

    benchmarks/run gpu_training [--shards ADDRESS] [--batch 1024] [--global-batch 65536] [--json]

Reports samples/s, MFU and data wait for each model: alone, on one batch in memory, and fed by the loader. For the last
model also the largest undivided batch, the gradient in micro-batches compared with that of the whole batch, and steps
of a very large global batch in micro-batches. Each part has a time limit; results up to then are reported. Without
--shards, synthetic shapes are drawn. --tiny tries everything on a CPU in two minutes; its figures are meaningless.
"""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError, VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say
from parts.time_limit import Outcome, Part, run_limited

GOALS = {"alone": 0.45, "fed": 0.40}
LIMITS_S = {"device": 10.0, "speed": 100.0, "exact": 140.0, "equality": 25.0, "largest": 45.0}
"""Time limit of each part; with two models and the drawing of images the total stays under eight minutes."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the GPU benchmark."""

    models: tuple[str, ...] = ("ViT-B-32", "ViT-B-16")
    """Architectures; the last is also measured for its largest batch and the large global batch."""

    shards: str = ""
    """Shards to train on; empty draws synthetic shapes."""

    scenes: int = 2048
    """Number of images drawn; they are reused in every epoch."""

    scene_pixels: int = 256
    """Their size in pixels."""

    batch: int = 1024
    """Micro-batch size."""

    global_batch: int = 65_536
    """Size of the large global batch, in micro-batches of --batch."""

    workers: int = 0
    """Loader processes; 0 uses all cores but two."""

    decode_on_device: bool = False
    """Decode JPEGs on the GPU instead of in the workers."""

    seconds: float = 12.0
    """Seconds of timed steps per figure."""

    objective: str = "clip"
    """Objective."""

    tiny: bool = False
    """Run the script on a small network, on any device, without compiling."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the measurements and print the results.

    Raises:
        UsageError: there is no GPU.
    """
    began = time.monotonic()
    from parts import gpu_measurements

    device = run_limited(gpu_measurements.device_name, limit_s=LIMITS_S["device"])
    if not arguments.tiny and not device.rows:
        raise UsageError("torch finds no GPU; --tiny runs the script on a CPU.")
    if arguments.global_batch % arguments.batch:
        raise UsageError(f"--global-batch {arguments.global_batch} is not a multiple of --batch {arguments.batch}.")
    with tempfile.TemporaryDirectory() as folder:
        shards = arguments.shards or draw_scenes(arguments, Path(folder) / "scenes")
        settings = settings_of(arguments, shards)
        models = ("tiny",) if arguments.tiny else arguments.models
        outcomes: dict[str, Outcome] = {}
        for name, part, limit_s in planned(models, gpu_measurements):
            say(f"{name}, at most {limit_s:.0f} s …")
            outcomes[name] = run_limited(part, settings, name.split(": ")[0], limit_s=limit_s)
    result = {
        "command": shlex.join(["benchmarks/run", "gpu_training", *sys.argv[1:]]),
        "device": device.rows,
        "seconds": time.monotonic() - began,
        "parts": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def planned(models: tuple[str, ...], parts: Any) -> Iterator[tuple[str, Part, float]]:
    """The parts in order: name, generator of results, time limit."""
    for model in models:
        yield f"{model}: speed", parts.speed, LIMITS_S["speed"]
    last = models[-1]
    yield f"{last}: exact", parts.exact, LIMITS_S["exact"]
    for precision in ("fp32", "bf16"):
        yield f"{last}: equality, {precision}", partial(parts.equality, precision=precision), LIMITS_S["equality"]
    yield f"{last}: largest", parts.largest, LIMITS_S["largest"]


def settings_of(arguments: Arguments, shards: str) -> Any:
    """Settings shared by all parts; small ones with --tiny."""
    from parts.gpu_measurements import Settings

    is_tiny = arguments.tiny
    return Settings(
        shards=shards,
        batch=8 if is_tiny else arguments.batch,
        global_batch=64 if is_tiny else arguments.global_batch,
        workers=1 if is_tiny else arguments.workers or max(1, (os.cpu_count() or 1) - 2),
        is_compiled=not is_tiny,
        decode_on_device=arguments.decode_on_device,
        seconds=1.0 if is_tiny else arguments.seconds,
        warm_up=2 if is_tiny else 5,
        most=32 if is_tiny else arguments.global_batch,
        equal=16 if is_tiny else arguments.batch // 2,
        objective=arguments.objective,
    )


def draw_scenes(arguments: Arguments, folder: Path) -> str:
    """Synthetic shapes packed into shards."""
    from vlm.data.pack import PackConfig, pack
    from vlm.data.sources.source import SceneOptions, SourceOptions
    from vlm.data.sources.source_registry import open_source

    number, pixels = (64, 64) if arguments.tiny else (arguments.scenes, arguments.scene_pixels)
    say(f"Drawing {number:,} synthetic shapes of {pixels} × {pixels} pixels …")
    options = SourceOptions(scenes=SceneOptions(number=number, pixels=pixels))
    pack(open_source("scenes", options), folder, PackConfig(samples_per_shard=max(1, number // 32), verify=False))
    return str(folder)


def _show(result: dict[str, Any]) -> None:
    rows = [(name, row) for name, outcome in result["parts"].items() for row in outcome["rows"]]
    show_table(
        ["part", "what", "samples/s", "MFU", "data wait", "GB", "goal"],
        [_speed_row(name, row) for name, row in rows if "samples_per_second" in row],
        title="Training",
    )
    show_table(
        ["part", "what", "found"],
        [[name, row["what"], _found(row)] for name, row in _last_of_each(rows) if "samples_per_second" not in row],
        title="Sizes and equality",
    )
    show_table(
        ["part", "seconds", "problem"],
        [[name, f"{outcome['seconds']:.0f}", outcome["problem"]] for name, outcome in result["parts"].items()],
        title=f"Time: {result['seconds']:.0f} s in all",
    )
    for device in result["device"]:
        print(f"{device['name']}, {device['memory_bytes'] / 1e9:.0f} GB")
    print(f"To repeat: {result['command']}")


def _last_of_each(rows: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """A search yields a row per batch that fits; the last one counts."""
    return list({(name, row["what"]): (name, row) for name, row in rows}.values())


def _speed_row(name: str, row: dict[str, Any]) -> list[str]:
    goal = GOALS.get(row["what"], 0.0)
    return [
        name.split(": ")[0],
        row["what"],
        f"{row['samples_per_second']:,.0f}",
        f"{row['mfu']:.1%}" if "mfu" in row else "",
        f"{row['data_wait']:.1%}",
        f"{row['memory_bytes'] / 1e9:.1f}",
        f"≥ {goal:.0%}" if goal else "",
    ]


def _found(row: dict[str, Any]) -> str:
    if "batch" in row:
        return f"{row['batch']:,}{'' if row['is_limit'] else ' at least'}"
    if "difference" in row:
        shared = ", ".join(f"{name.removeprefix('network.')} × {times:.6f}" for name, times in row["times"].items())
        return f"difference {row['difference']:.1e} of the gradient's norm; {shared}"
    return f"{row['seconds']:.1f} s; MFU is of: {row['peak']}"


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
