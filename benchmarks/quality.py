#!/usr/bin/env python
"""Quality at equal samples seen: our recipe compared with open_clip's own trainer and its defaults.

    benchmarks/run quality [--data fashion flickr8k] [--seeds 0 1 2] [--ablate] [--plot FILE.png] [--json]

Same data, batches, steps and towers; both sides are evaluated by the same code on val. Results are cached
(--keep FOLDER, results.jsonl). The settings of each side are in parts/quality_settings.py.
To try it in two minutes: --shards 1 --epochs 1 --seeds 0 --keep FOLDER.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json
from vlm.errors import UsageError, VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say
from parts.open_clip_environment import open_clip_python
from parts.quality_data import DataSet, prepare, write_network
from parts.quality_plan import ablated_runs, recipe_run, their_variants
from parts.quality_runs import Bench, Run, Trainer
from parts.quality_settings import BATCH_SIZE, EPOCHS
from parts.quality_tables import Row, all_ratios, draw, show_ablations, show_queries, show_sides

SIDES: tuple[Trainer, ...] = ("ours", "open_clip")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the quality benchmark."""

    data: tuple[Literal["fashion", "flickr8k"], ...] = ("fashion", "flickr8k")
    """Data sets."""

    sides: tuple[Trainer, ...] = SIDES
    """Trainers."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds; one run per side and seed."""

    ablate: bool = False
    """Also revert each of our defaults that differs from open_clip's, one at a time and all at once, and run open_clip
    with our learning rate."""

    ablation_seeds: tuple[int, ...] = (0,)
    """Random seeds of those runs."""

    epochs: int = 0
    """Epochs on each data set; 0 uses the table in parts/quality_settings.py."""

    batch_size: int = BATCH_SIZE
    """Batch size of both sides."""

    shards: int = 0
    """Number of training shards used, the first ones; 0 uses all."""

    keep: Path = Path.home() / ".cache" / "vlm" / "bench-quality"
    """Folder of the packed data, the runs and results.jsonl."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of open_clip's environment (bench-open-clip)."""

    plot: Path | None = None
    """Image file for a plot of the headline metric of both sides, with intervals."""

    json: bool = False
    """Print the results as JSON."""

    def check(self) -> None:
        """Reject settings that cannot be run.

        Raises:
            UsageError: a value is invalid; the message has the value and the cure.
        """
        for name, values in (("--data", self.data), ("--sides", self.sides), ("--seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"{name} {' '.join(map(str, values))}: at least one value, each only once.")
        for name, value, least in (("--epochs", self.epochs, 0), ("--shards", self.shards, 0)):
            if value < least:
                raise UsageError(f"{name} {value} is out of range; it must be at least {least}.")
        if self.batch_size < 2:
            raise UsageError(f"--batch-size {self.batch_size} is out of range; it must be at least 2.")
        if self.ablate and not (self.ablation_seeds and "ours" in self.sides):
            raise UsageError("--ablate needs our side in --sides and at least one value in --ablation-seeds.")


def run(arguments: Arguments) -> None:
    """Make the missing runs, then print the results."""
    arguments.check()
    keep = arguments.keep.expanduser().absolute()
    bench = Bench(
        folder=keep,
        open_clip=open_clip_python(arguments.cache.expanduser() / "bench-open-clip"),
        models=keep / "models",
    )
    write_network(bench.models)
    data = [prepare(name, keep, shards=arguments.shards) for name in arguments.data]
    planned = {(one.name, side): _recipe_runs(arguments, one, side, arguments.seeds) for side in SIDES for one in data}
    ablations = [_ablations(arguments, one) for one in data] if arguments.ablate else []
    # seeds outermost, so that an interrupted benchmark has results for every setting
    for number in range(len(arguments.seeds)):
        for (_, side), runs in planned.items():
            if side in arguments.sides:
                bench.result(runs[number])
    rows = [_row(bench, side, planned[one.name, side]) for one in data for side in arguments.sides]
    ablated = [
        (_row(bench, "ours", full), [_row(bench, each[0].name, each) for each in found]) for full, found in ablations
    ]
    _print(arguments, rows, ablated)


def _recipe_runs(arguments: Arguments, data: DataSet, trainer: Trainer, seeds: Sequence[int]) -> list[Run]:
    epochs = arguments.epochs or EPOCHS[data.name]
    return [recipe_run(data, trainer, seed=seed, epochs=epochs, batch_size=arguments.batch_size) for seed in seeds]


def _ablations(arguments: Arguments, data: DataSet) -> tuple[list[Run], list[list[Run]]]:
    """The runs of our recipe and of each row of the ablation table, one per seed."""
    full = _recipe_runs(arguments, data, "ours", arguments.ablation_seeds)
    found = [ablated_runs(one) for one in full]
    theirs = _recipe_runs(arguments, data, "open_clip", arguments.ablation_seeds)
    variants = [their_variants(one) for one in theirs] if "open_clip" in arguments.sides else []
    return full, [list(each) for side in (found, variants) if side for each in zip(*side, strict=True)]


def _row(bench: Bench, name: str, runs: Sequence[Run]) -> Row:
    return Row(data=runs[0].data.name, name=name, results=tuple(bench.result(one) for one in runs))


def _print(arguments: Arguments, rows: list[Row], ablated: list[tuple[Row, list[Row]]]) -> None:
    found = all_ratios(rows)
    command = shlex.join(["benchmarks/run", "quality", *sys.argv[1:]])
    if arguments.plot:
        draw(rows, arguments.plot)
        say(f"Plot: {arguments.plot}")
    if arguments.json:
        result: dict[str, Any] = {"command": command, "threads": torch.get_num_threads()}
        result |= {"sides": [row.values_for_machines() for row in rows], "ratios": found}
        result["ablations"] = [row.values_for_machines() for full, each in ablated for row in (full, *each)]
        show_json(result)
        return
    show_sides(rows, found)
    show_queries(rows)
    for full, each in ablated:
        show_ablations(full, each)
    print(f"{torch.get_num_threads()} threads. To repeat: {command}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
