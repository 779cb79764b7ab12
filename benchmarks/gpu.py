#!/usr/bin/env python
"""Everything that a GPU does here, built, checked and timed in under eight minutes on an H100 or H200.

    benchmarks/run gpu [--shards ADDRESS] [--batch 1024] [--global-batch 65536] [--json]
    benchmarks/run gpu --tiny           (the whole script on small networks, on any device, as the tests run it)

Training of ViT-B/32, B/16 and L/14 in bf16, compiled: samples/s, MFU and data wait on one batch in memory and fed by
the loader, beside open_clip's network, loss and step; for B/16 also the largest undivided batch, gradients in
micro-batches compared with the whole batch's, and steps of a very large batch in micro-batches. Then decoding,
embedding, captioning and exact search, each checked against the CPU. Each part has a time limit; what it measured up
to then is reported. `benchmarks/run index_gpu` compares FAISS's index types.
"""

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
LIMITS_S = {
    "device": 10.0,
    "speed": 55.0,
    "open_clip": 30.0,
    "exact": 80.0,
    "equality": 15.0,
    "largest": 25.0,
    "inference": 15.0,
}
"""Time limit of each part; with three models and the drawing of images the total stays under eight minutes."""


# what the device gives beside the CPU, within what rounding to bf16 or another resampling may change
BOUNDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "equal, fp32": lambda row: row["difference"] < 1e-4,
    "equal, bf16": lambda row: row["difference"] < 5e-2,
    "decode, mean difference of pixels": lambda row: row["value"] < 2,
    "least cosine with float32 on the CPU": lambda row: row["value"] > 0.99,
    "exact search, equal results": lambda row: row["value"] > 0.99,
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the GPU benchmark."""

    models: tuple[str, ...] = ("ViT-B-32", "ViT-L-14", "ViT-B-16")
    """Architectures; the last is also measured for its largest batch, the large global batch, and without training."""

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

    rows: int = 1_000_000
    """Rows of 512 numbers that are searched."""

    seconds: float = 6.0
    """Seconds of timed steps per figure."""

    objective: str = "clip"
    """Objective."""

    tiny: bool = False
    """Run the script on a small network, on any device, without compiling."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> int:
    """Run the measurements and print the results; 1 if a part failed or its results are out of bounds, else 0.

    Raises:
        UsageError: there is no GPU.
    """
    began = time.monotonic()
    from parts import gpu_inference, gpu_training

    device = run_limited(gpu_training.device_name, limit_s=LIMITS_S["device"])
    if not arguments.tiny and not device.rows:
        raise UsageError("torch finds no GPU; --tiny runs the script on a CPU.")
    if arguments.global_batch % arguments.batch and not arguments.tiny:
        raise UsageError(f"--global-batch {arguments.global_batch} is not a multiple of --batch {arguments.batch}.")
    with tempfile.TemporaryDirectory() as folder:
        shards = arguments.shards or draw_scenes(arguments, Path(folder) / "scenes")
        settings = settings_of(arguments, shards)
        models = ("tiny",) if arguments.tiny else arguments.models
        outcomes: dict[str, Outcome] = {}
        for name, part, limit_s in planned(models, gpu_training, gpu_inference):
            say(f"{name}, at most {limit_s:.0f} s …")
            outcomes[name] = run_limited(part, settings, name.split(": ")[0], limit_s=limit_s)
    result = {
        "command": shlex.join(["benchmarks/run", "gpu", *sys.argv[1:]]),
        "device": device.rows,
        "seconds": time.monotonic() - began,
        "parts": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "wrong": wrong_results(outcomes),
    }
    if arguments.json:
        show_json(result)
    else:
        _show(result)
    return 1 if result["wrong"] else 0


def wrong_results(outcomes: dict[str, Outcome]) -> list[str]:
    """Parts that failed, and results out of bounds; what only ran out of its time is neither."""
    wrong: list[str] = []
    for name, outcome in outcomes.items():
        if outcome.problem and not outcome.ran_out_of_time:
            wrong.append(f"{name}: {outcome.problem}")
        for row in outcome.rows:
            is_within = BOUNDS.get(row["what"])
            if is_within and not is_within(row):
                wrong.append(f"{name}: {row['what']} is {_found(row)}")
    return wrong


def planned(models: tuple[str, ...], training: Any, inference: Any) -> Iterator[tuple[str, Part, float]]:
    """The parts in order: name, generator of results, time limit. What takes longest and is least wanted comes last."""
    for model in models:
        yield f"{model}: speed", training.speed, LIMITS_S["speed"]
        yield f"{model}: open_clip", inference.open_clip_step, LIMITS_S["open_clip"]
    last = models[-1]
    for part in ("decode", "embed", "caption", "search"):
        yield f"{last}: {part}", getattr(inference, part), LIMITS_S["inference"]
    for precision in ("fp32", "bf16"):
        yield f"{last}: equality, {precision}", partial(training.equality, precision=precision), LIMITS_S["equality"]
    yield f"{last}: exact", training.exact, LIMITS_S["exact"]
    yield f"{last}: largest", training.largest, LIMITS_S["largest"]


def settings_of(arguments: Arguments, shards: str) -> Any:
    """Settings shared by all parts; small ones with --tiny."""
    from parts.gpu_training import Settings

    is_tiny = arguments.tiny
    return Settings(
        shards=shards,
        batch=8 if is_tiny else arguments.batch,
        global_batch=16 if is_tiny else arguments.global_batch,
        workers=1 if is_tiny else arguments.workers or max(1, (os.cpu_count() or 1) - 2),
        is_compiled=not is_tiny,
        decode_on_device=arguments.decode_on_device,
        seconds=0.1 if is_tiny else arguments.seconds,
        warm_up=1 if is_tiny else 5,
        most=16 if is_tiny else arguments.global_batch,
        equal=8 if is_tiny else arguments.batch // 2,
        rows=1000 if is_tiny else arguments.rows,
        objective=arguments.objective,
        is_tiny=is_tiny,
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
        title="Speed",
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
    for sentence in result["wrong"]:
        print(f"Wrong: {sentence}")
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
        f"{row['data_wait']:.1%}" if "data_wait" in row else "",
        f"{row['memory_bytes'] / 1e9:.1f}" if "memory_bytes" in row else "",
        f"≥ {goal:.0%}" if goal else "",
    ]


def _found(row: dict[str, Any]) -> str:
    if "note" in row:
        return row["note"]
    if "value" in row:
        return f"{row['value']:.4f}"
    if "batch" in row:
        return f"{row['batch']:,}{'' if row['is_limit'] else ' at least'}"
    if "difference" in row:
        shared = ", ".join(f"{name.removeprefix('network.')} × {times:.6f}" for name, times in row["times"].items())
        return f"difference {row['difference']:.1e} of the gradient's norm; {shared}"
    return f"{row['seconds']:.1f} s; MFU is of: {row['peak']}"


if __name__ == "__main__":
    try:
        sys.exit(run(tyro.cli(Arguments, description=__doc__)))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
