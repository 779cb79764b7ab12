#!/usr/bin/env python
"""The trainer compared with open_clip's own trainer and with a bare PyTorch loop, in one run.

    benchmarks/run training [--only throughput step memory split overcount] [--shards clothing flickr8k] [--json]

Same network, optimizer, batches and shards on both sides, every side in its own process, runs alternating; medians and
ratios of one session are reported, whoever wins. In a minute: --steps 2 --repeats 1 --margin 1 --width 32 --layers 1
--text-layers 1 --image-size 32 --patch-size 8 --batch 16 --large 64 --split 32.
"""

import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError, VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts import training_measurements
from parts.open_clip_environment import open_clip_python, shards_of
from parts.training_runs import ALLOCATORS, Network, Trainers

Part = Literal["throughput", "step", "memory", "split", "overcount"]
PARTS: tuple[Part, ...] = ("throughput", "step", "memory", "split", "overcount")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the trainer benchmark."""

    only: tuple[Part, ...] = PARTS
    """Measurements to run."""

    shards: tuple[str, ...] = ("clothing", "flickr8k")
    """Data sets: clothing (packed unchanged), flickr8k, or any shards; all but throughput use the first."""

    steps: int = 8
    """Timed steps per run."""

    margin: int = 5
    """Untimed steps before and after, while the loaders' queues fill and drain (ours: 4 batches, open_clip's: 2)."""

    repeats: int = 3
    """Runs per side; the sides alternate."""

    batch: int = 256
    """Batch size, and size of the micro-batches."""

    large: int = 4096
    """Batch in micro-batches whose memory is compared with that of one batch."""

    split: int = 1024
    """Batch in micro-batches whose time is compared with that of one batch."""

    allocators: tuple[Literal["default", "raised"], ...] = ("default", "raised")
    """Settings of glibc's allocator, the same on both sides: the defaults, or both thresholds raised."""

    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32",)
    """Precisions of the forward pass, the same on both sides, of throughput."""

    width: int = 192
    """Width of both towers and of the embedding."""

    layers: int = 6
    """Number of layers of the image tower."""

    text_layers: int = 4
    """Number of layers of the text tower."""

    image_size: int = 112
    """Size of the views in pixels."""

    patch_size: int = 16
    """Patch size in pixels."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of open_clip's environment (bench-open-clip) and the packed photos."""

    json: bool = False
    """Print the results as JSON."""

    @property
    def sizes(self) -> training_measurements.Sizes:
        """Sizes and repetitions of the measurements.

        Raises:
            UsageError: a batch cannot be divided into micro-batches.
        """
        for name, value in (("--large", self.large), ("--split", self.split)):
            if value % self.batch:
                raise UsageError(f"{name} {value} is not a multiple of --batch {self.batch}.")
        return training_measurements.Sizes(
            steps=self.steps,
            repeats=self.repeats,
            margin=self.margin,
            batch=self.batch,
            large=self.large,
            split=self.split,
            allocators=self.allocators,
            precisions=self.precisions,
        )

    @property
    def network(self) -> Network:
        """The network that both sides train."""
        return Network(
            width=self.width,
            layers=self.layers,
            text_layers=self.text_layers,
            image_size=self.image_size,
            patch_size=self.patch_size,
            context_length=77,
        )


def run(arguments: Arguments) -> None:
    """Run the measurements and print the results."""
    sizes, cache = arguments.sizes, arguments.cache.expanduser()
    shards = shards_of(arguments.shards, cache, workers=1)
    first = next(iter(shards.values()))
    with tempfile.TemporaryDirectory() as models:
        arguments.network.write(Path(models))
        pythons = {"ours": Path(sys.executable), "open_clip": open_clip_python(cache / "bench-open-clip")}
        trainers = Trainers(pythons=pythons, models=Path(models))  # pyright: ignore[reportArgumentType]
        measure = {
            "throughput": lambda: training_measurements.throughput(trainers, sizes, shards),
            "step": lambda: training_measurements.step_cost(trainers, sizes, first),
            "memory": lambda: training_measurements.memory(trainers, sizes, first),
            "split": lambda: training_measurements.split_cost(trainers, sizes, first),
            "overcount": lambda: training_measurements.overcount(trainers),
        }
        result: dict[str, Any] = {part: measure[part]() for part in arguments.only}
    result["command"] = shlex.join(["benchmarks/run", "training", *sys.argv[1:]])
    result["threads"] = torch.get_num_threads()
    if arguments.json:
        show_json(result)
    else:
        _show(result, arguments)


def _show(result: dict[str, Any], arguments: Arguments) -> None:
    shown = {
        "throughput": _show_throughput,
        "step": _show_step,
        "memory": _show_memory,
        "split": _show_split,
        "overcount": _show_overcount,
    }
    for part in arguments.only:
        shown[part](result[part], arguments)
    print(f"{result['threads']} threads. To repeat: {result['command']}")


def _show_throughput(rows: list[dict[str, Any]], arguments: Arguments) -> None:
    show_table(
        ["shards", "allocator", "precision", "ours", "open_clip", "× open_clip", "ratio of each run"],
        [
            [
                row["shards"],
                row["allocator"],
                row["precision"],
                *(f"{row['samples_per_s'][side]:.1f}" for side in ("ours", "open_clip")),
                f"{row['ratio']:.2f}",
                " ".join(
                    f"{one / two:.2f}" for one, two in zip(row["runs"]["ours"], row["runs"]["open_clip"], strict=True)
                ),
            ]
            for row in rows
        ],
        title=f"Samples per second in training, batch {arguments.batch:,}, 1 worker (goal: ≥ 1.2 ×)",
    )
    for name in arguments.allocators:
        settings = " ".join(f"{variable}={value}" for variable, value in ALLOCATORS[name].items())
        print(f"Allocator {name}, both sides: {settings or 'glibc defaults'}")


def _show_step(found: dict[str, Any], arguments: Arguments) -> None:
    show_table(
        ["ours s", "bare s", "ours / bare"],
        [[f"{found['seconds']['ours']:.3f}", f"{found['seconds']['bare']:.3f}", f"{found['ratio']:.3f}"]],
        title=f"A step on a batch of {arguments.batch:,} in memory (goal: ≤ 1.05)",
    )


def _show_memory(found: dict[str, Any], arguments: Arguments) -> None:
    show_table(
        [
            "trainer",
            f"batch {arguments.batch:,}",
            f"{arguments.large:,} in micro-batches of {arguments.batch:,}",
            "ratio",
        ],
        [
            [side, *(f"{peak:.0f}" for peak in found["peak_mb"][side].values()), f"{found['ratio'][side]:.2f}"]
            for side in found["peak_mb"]
        ],
        title="Peak memory of all processes in MB, shared pages counted once (goal: ratio ≤ 1.3)",
    )
    show_table(
        ["trainer", "KB per sample", *(f"{room} GB" for room in training_measurements.MEMORY_GB)],
        [
            [side, f"{line['kb_a_sample']:.0f}", *(f"{batch:,}" for batch in line["largest"].values())]
            for side, line in found["lines"].items()
        ],
        title=f"Largest batch in micro-batches of {arguments.batch:,} by memory, extrapolated linearly from these two",
    )


def _show_split(found: dict[str, Any], arguments: Arguments) -> None:
    each, ratios = found["ms_a_sample"], found["ratio"]
    part, whole = f"{arguments.batch:,}", f"{arguments.split:,}"
    show_table(
        [part, f"{whole} in parts", f"{whole} undivided", f"in parts / {part}", f"in parts / {whole} undivided"],
        [[*(f"{each[name]:.2f}" for name in each), *(f"{ratio:.2f}" for ratio in ratios.values())]],
        title=f"Milliseconds per sample, micro-batches of {part} (goal: in parts / {part} ≤ 1.4)",
    )


def _show_overcount(found: dict[str, Any], _: Arguments) -> None:
    rows = [
        [objective, side, parts, name, f"{value:.6f}", f"{one['times'][name]:.6f}", f"{one['others']:.1e}"]
        for objective, sides in found.items()
        for side, by_parts in sides.items()
        for parts, one in by_parts.items()
        for name, value in one["gradients"].items()
    ]
    show_table(
        [
            "objective",
            "trainer",
            "parts",
            "weight",
            "gradient",
            "× undivided",
            "largest difference of all other weights",
        ],
        rows,
        title="Gradients of one batch in micro-batches (float64; correct is 1 ×)",
    )


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
