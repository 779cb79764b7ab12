#!/usr/bin/env python
"""What a larger batch gains at equal samples: runs that differ in the batch alone, each in the same micro-batches.

    benchmarks/run batch_sizes --data SHARDS --val SHARDS [--preset tiny] [--sizes 64 128 256] [--seeds 0 1 2]

After BASIC (Pham et al. 2021, §5): since a batch in micro-batches has the gradient of the whole batch, its size needs
no more memory, and every run here goes through the network --micro samples at a time. The learning rate is the preset's
at its own batch size, and changes by the root of the ratio (--rate sqrt), by the ratio (linear) or not (same).
Finished runs in --keep are not trained again. In a minute: --sizes 32 64 --seeds 0 --epochs 0.2.
"""

import sys
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Literal

import tyro

import vlm
from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError, VlmError
from vlm.train.history import METRICS, read_metrics
from vlm.train.presets import open_preset
from vlm.train.run_config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say
from parts.quality_intervals import half_width

METRICS_SHOWN = ("image_to_text_recall@1", "text_to_image_recall@1")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the sweep."""

    data: str
    """Training shards."""

    val: str
    """Shards on which retrieval is measured."""

    preset: str = "tiny"
    """Preset, or TOML file, with the settings that stay the same."""

    sizes: tuple[int, ...] = (64, 128, 256, 512)
    """Batch sizes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds; one run per size and seed."""

    epochs: float = 0.0
    """Epochs of every run; 0 uses the preset's."""

    micro: int = 32
    """Micro-batch of every run: a divisor of each size."""

    rate: Literal["sqrt", "linear", "same"] = "sqrt"
    """How the learning rate follows the batch size."""

    tokenizer: str = ""
    """Tokenizer of every run; empty uses the preset's."""

    keep: Path = Path.home() / ".cache" / "vlm" / "bench-batch-sizes"
    """Folder of the runs."""

    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """A batch size. values: of each metric, by seed."""

    batch_size: int
    steps: int
    seconds: float
    values: dict[str, list[float]]


def run(arguments: Arguments) -> None:
    """Train what is missing, then show every size."""
    for size in arguments.sizes:
        if size < 2 or size % arguments.micro:
            raise UsageError(f"sizes: {size} is no multiple of the micro-batch of {arguments.micro}; give others.")
    results: list[SizeResult] = []
    for size in arguments.sizes:
        results.append(_of_size(arguments, size))
    if arguments.json:
        show_json({"preset": arguments.preset, "sizes": [vars(result) for result in results]})
        return
    rows: list[list[object]] = []
    for result in results:
        figures = [_figure(result.values[metric]) for metric in METRICS_SHOWN]
        rows.append([result.batch_size, result.steps, f"{result.seconds:.0f}", *figures])
    show_table(["batch", "steps", "seconds", *METRICS_SHOWN], rows, title=f"{arguments.preset}, equal samples")


def _of_size(arguments: Arguments, size: int) -> SizeResult:
    values: dict[str, list[float]] = {metric: [] for metric in METRICS_SHOWN}
    seconds: list[float] = []
    steps = 0
    for seed in arguments.seeds:
        folder = arguments.keep / f"{arguments.preset}-{arguments.rate}-{size}-{seed}"
        if not (folder / "manifest.json").exists():
            say(f"batch {size}, seed {seed} → {folder}")
            vlm.train(configuration(arguments, size, seed, folder), resume=folder.exists())
        lines = read_metrics(folder / METRICS)
        steps = lines[-1]["step"]
        seconds.append(lines[-1]["seconds"])
        for metric in METRICS_SHOWN:
            measured = [line[metric] for line in lines if metric in line]
            values[metric].append(measured[-1])
    return SizeResult(batch_size=size, steps=steps, seconds=fmean(seconds), values=values)


def configuration(arguments: Arguments, size: int, seed: int, folder: Path) -> TrainConfig:
    """The preset with another batch size, at equal samples and equal warm-up samples."""
    config = open_preset(arguments.preset)
    ratio = size / config.batch_size
    factor = {"sqrt": sqrt(ratio), "linear": ratio, "same": 1.0}[arguments.rate]
    optimizer = replace(
        config.optimizer,
        learning_rate=config.optimizer.learning_rate * factor,
        warmup_steps=max(1, round(config.optimizer.warmup_steps / ratio)),
    )
    return replace(
        config,
        data=arguments.data,
        val=arguments.val,
        run=str(folder),
        batch_size=size,
        micro_batch=arguments.micro,
        epochs=arguments.epochs or config.epochs,
        seed=seed,
        evaluate_every=10**9,
        optimizer=optimizer,
        model=replace(config.model, tokenizer=arguments.tokenizer or config.model.tokenizer),
    )


def _figure(values: list[float]) -> str:
    """The mean over seeds in percent, with half of its 95% interval by Student's t."""
    width = half_width(values)
    return f"{fmean(values):.1%}" + ("" if width is None else f" ±{width:.1%}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
