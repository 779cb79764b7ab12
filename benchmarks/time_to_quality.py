#!/usr/bin/env python
"""Minutes until open_clip's quality is reached: its trainer to the end, ours in runs of ever more epochs beside it.

    benchmarks/run time_to_quality [--data fashion flickr8k] [--epochs 2 3 4] [--precision bf16] [--json]

Whole commands, start and end included, on the same shards; both are evaluated by the same code on val. Each side trains
the network of its choice (ours: OWN_CHOICE in parts/quality_settings.py); the same network on both sides is compared by
benchmarks/run quality. Each of our runs is one that a user would make, with a warm-up and a decay of its own length;
the last is meant to take as long as open_clip's. --pretrained adds a run that begins with the image tower of the extra
local-weights (fashion alone) and computes its features within its time. Results are kept with those of the quality
benchmark (--keep FOLDER).
To try it: --shards 1 --epochs 1 --full-epochs 1 --their-epochs 1.
"""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from vlm.cli.main import print_error
from vlm.console import percent, show_json, show_table
from vlm.errors import UsageError, VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.open_clip_environment import open_clip_python
from parts.quality_data import DataSet, prepare, write_network
from parts.quality_plan import configuration, recipe_run
from parts.quality_runs import Bench, Run
from parts.quality_settings import BATCH_SIZE, OWN_CHOICE

THEIR_EPOCHS = {"fashion": 16, "flickr8k": 12}
METRIC = "text_to_image_recall@10"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of time to quality."""

    data: tuple[Literal["fashion", "flickr8k"], ...] = ("fashion", "flickr8k")
    """Data sets."""

    epochs: tuple[int, ...] = (2, 3, 4)
    """Lengths of our short runs."""

    full_epochs: int = -1
    """Length of our last run; -1: meant to take open_clip's time; 0: no such run."""

    pretrained: bool = False
    """Add a run from weights trained by others (pip install 'vlm-pipeline[local-weights]')."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of our forward pass (open_clip's is fp32); a CPU without bfloat16 instructions is slower with bf16."""

    their_epochs: int = 0
    """Length of open_clip's run; 0: 16 epochs on fashion, 12 on Flickr8k."""

    seed: int = 0
    """Random seed of all runs."""

    shards: int = 0
    """Number of training shards used, the first ones; 0 uses all."""

    keep: Path = Path.home() / ".cache" / "vlm" / "bench-quality"
    """Folder of the packed data, the runs and results.jsonl."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of open_clip's environment (bench-open-clip)."""

    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run beside open_clip's.

    share: its minutes as a part of theirs. recall: text→image recall@10. is_reached: whether that is at least theirs.
    """

    data: str
    run: str
    epochs: float
    minutes: float
    share: float
    recall: float
    image_to_text: float
    zero_shot: float | None
    is_reached: bool


def run(arguments: Arguments) -> None:
    """Make the missing runs, theirs first, then print all."""
    if min(arguments.epochs, default=1) < 1 or arguments.their_epochs < 0 or arguments.full_epochs < -1:
        raise UsageError(
            f"--epochs {' '.join(map(str, arguments.epochs))}, --their-epochs {arguments.their_epochs}, --full-epochs "
            f"{arguments.full_epochs}: give --epochs of 1 or more, --their-epochs from 0, --full-epochs from -1."
        )
    keep = arguments.keep.expanduser().absolute()
    python = open_clip_python(arguments.cache.expanduser() / "bench-open-clip")
    bench = Bench(folder=keep, open_clip=python, models=keep / "models")
    write_network(bench.models)
    rows: list[Row] = []
    for name in arguments.data:
        rows += _rows(bench, prepare(name, keep, shards=arguments.shards), arguments)
    if arguments.json:
        show_json([asdict(row) for row in rows])
        return
    table: list[list[object]] = []
    for row in rows:
        recalls = [percent(row.recall), percent(row.image_to_text), percent(row.zero_shot)]
        reached = "yes" if row.is_reached else "no"
        table.append(
            [row.data, row.run, f"{row.epochs:g}", f"{row.minutes:.1f}", f"{row.share:.2f}", *recalls, reached]
        )
    columns = ["data", "run", "epochs", "minutes", "of open_clip's", "text→image recall@10", "image→text", "zero-shot"]
    show_table([*columns, "reaches it"], table)
    print("To repeat: " + shlex.join(["benchmarks/run", "time_to_quality", *sys.argv[1:]]))


def _rows(bench: Bench, data: DataSet, arguments: Arguments) -> list[Row]:
    their_epochs = arguments.their_epochs or THEIR_EPOCHS[data.name]
    theirs = recipe_run(data, "open_clip", seed=arguments.seed, epochs=their_epochs, batch_size=BATCH_SIZE)
    runs = [theirs, *_our_runs(data, arguments)]
    results = [bench.result(each) for each in runs]
    target = results[0]
    rows: list[Row] = []
    for each, result in zip(runs, results, strict=True):
        rows.append(
            Row(
                data=data.name,
                run=each.name,
                epochs=each.epochs,
                minutes=result.minutes,
                share=result.minutes / target.minutes,
                recall=result.metrics[METRIC],
                image_to_text=result.metrics["image_to_text_recall@10"],
                zero_shot=result.zero_shot,
                is_reached=result.metrics[METRIC] >= target.metrics[METRIC],
            )
        )
    return rows


def _our_runs(data: DataSet, arguments: Arguments) -> list[Run]:
    choice = OWN_CHOICE[data.name]
    words = ("--precision", arguments.precision, *choice.words)
    full_epochs = choice.full_epochs if arguments.full_epochs < 0 else arguments.full_epochs
    lengths = [("ours", epochs, choice.short_words) for epochs in arguments.epochs]
    if full_epochs:
        lengths.append(("ours, at its full time", full_epochs, choice.full_words))
    runs = [
        Run(
            data=data,
            trainer="ours",
            name=name,
            seed=arguments.seed,
            words=(*words, *added),
            epochs=epochs,
            batch_size=BATCH_SIZE,
            preset=choice.preset,
        )
        for name, epochs, added in lengths
    ]
    if arguments.pretrained and choice.pretrained is not None:
        preset, batch_size, epochs = choice.pretrained
        runs.append(
            Run(
                data=data,
                trainer="ours",
                name=f"ours, {preset}",
                seed=arguments.seed,
                words=(),
                epochs=epochs,
                batch_size=batch_size,
                preset=preset,
            )
        )
    for run in runs:
        configuration(run)
    return runs


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
