#!/usr/bin/env python
"""vlm embed compared with clip-retrieval's inference and with the bare model: images and texts of the same shards.

    benchmarks/run embedding [--shards flickr8k] [--pairs 3000] [--json]

All sides use the same weights, batches, readers and threads; each run has its own process, and runs alternate. `vlm
embed` runs by the model's ONNX export, which is made beforehand, and by torch. The vectors of both tools, and of both
backends, are compared. The bare model sees one batch repeatedly and reads nothing. In a minute:
--pairs 256 --repeats 1 --batch-size 64 --bare-seconds 2 --width 64 --layers 1.
"""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.embedding_data import Network, write_model, write_shards
from parts.embedding_runs import (
    PROCESSOR,
    WHOLE_CALL,
    WORK,
    Setting,
    agreement,
    export_ours,
    run_clip_retrieval,
    run_ours,
    vectors_of_clip_retrieval,
    vectors_of_ours,
)
from parts.isolated_environment import CLIP_RETRIEVAL, own_python, same_torch
from parts.measure_process import Side
from parts.messages import say
from parts.open_clip_environment import shards_of

OURS = "vlm embed"
OURS_BY_TORCH = "vlm embed --backend torch"
SIDES: dict[str, Callable[[Setting], dict[str, float]]] = {
    "clip-retrieval": run_clip_retrieval,
    OURS: partial(run_ours, backend="onnx"),
    OURS_BY_TORCH: partial(run_ours, backend="torch"),
}
Rates = dict[str, dict[str, float]]
"""Pairs per second by name and kind."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the embedding benchmark."""

    shards: str = "flickr8k"
    """flickr8k or clothing of ../shared/datasets, or any shards of JPEGs with captions."""

    pairs: int = 3000
    """Number of images with one caption each; the shards are repeated as often as necessary."""

    tars: int = 6
    """Number of shards they are written to."""

    width: int = 192
    """Width of both towers."""

    layers: int = 4
    """Number of layers of each tower."""

    batch_size: int = 256
    """Batch size in pairs."""

    workers: int = 1
    """Reader processes, on both sides."""

    threads: int = os.cpu_count() or 1
    """Threads of the model, on all sides."""

    repeats: int = 3
    """Runs per side; the sides alternate."""

    bare_seconds: float = 10.0
    """Seconds for which the bare model is measured each time."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of clip-retrieval's environment (bench-clip-retrieval)."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the measurements and print the results."""
    with tempfile.TemporaryDirectory() as name:
        result = _measure(arguments, Path(name)) | {
            "command": shlex.join(["benchmarks/run", "embedding", *sys.argv[1:]])
        }
    if arguments.json:
        show_json(result)
    else:
        _show(arguments, result)


def _measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    cache = arguments.cache.expanduser()
    python = own_python(cache / "bench-clip-retrieval", (*CLIP_RETRIEVAL, *same_torch()))
    (sources,) = shards_of((arguments.shards,), cache, workers=1).values()
    say(f"Writing {arguments.pairs:,} pairs and the model …")
    captions = write_shards(sources, folder / "shards", pairs=arguments.pairs, shards=arguments.tars)
    model, weights, config = write_model(Network(width=arguments.width, layers=arguments.layers), folder)
    setting = Setting(
        folder=folder,
        model=model,
        weights=weights,
        config=config,
        shards=folder / "shards",
        python=python,
        pairs=arguments.pairs,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        threads=arguments.threads,
    )
    asked = {"model": str(model), "captions": captions[: arguments.batch_size], "seconds": arguments.bare_seconds}
    say("Exporting the model to ONNX …")
    export = export_ours(setting)
    rates: list[Rates] = []
    with Side(sys.executable, "bare_embedding.py", threads=arguments.threads) as side:
        for repeat in range(arguments.repeats):
            found: Rates = {}
            for name in list(SIDES)[:: -1 if repeat % 2 else 1]:
                say(f"{name}, run {repeat + 1} of {arguments.repeats} …")
                found[name] = SIDES[name](setting)
            say("The bare model, and reading …")
            alone = side.ask(shard=str(setting.shards / "00000.tar"), **asked)
            rates.append(found | _bounds(alone, arguments.threads))
    ours = vectors_of_ours(setting, "onnx")
    return {
        "pairs_per_s": _medians(rates),
        "ours_to": _ratios(rates),
        "runs": rates,
        "export": export,
        "agreement": agreement(ours, vectors_of_clip_retrieval(setting)),
        "agreement_of_backends": agreement(ours, vectors_of_ours(setting, "torch")),
    }


def _bounds(alone: dict[str, float], cores: int) -> Rates:
    """Upper bounds from the parts; the last is for a model and readers that share the cores and never wait."""

    def with_reading(rate: float) -> float:
        return 1 / (1 / rate + 1 / (alone["reading"] * cores))

    return {
        "bare model": {WORK: alone["whole"]},
        "bare model, texts trimmed": {WORK: alone["cut"]},
        "bare model, texts trimmed, and reading on its cores": {WORK: with_reading(alone["cut"])},
        "bare export, texts by length": {WORK: alone["export"]},
        "bare export, texts by length, and reading on its cores": {WORK: with_reading(alone["export"])},
        "one reader": {WORK: alone["reading"]},
    }


def _medians(rates: list[Rates]) -> Rates:
    return {name: {kind: median(one[name][kind] for one in rates) for kind in rates[0][name]} for name in rates[0]}


def _ratios(rates: list[Rates]) -> Rates:
    """Our rate relative to each other side: the median of the ratios of neighbours in time."""
    others = [name for name in rates[0] if name not in (OURS, "one reader")]
    return {
        name: {kind: median(one[OURS][kind] / one[name][kind] for one in rates) for kind in rates[0][name]}
        for name in others
    }


def _show(arguments: Arguments, result: dict[str, Any]) -> None:
    kinds = (WHOLE_CALL, WORK, PROCESSOR)

    def cells(figures: Rates, form: str) -> list[list[str]]:
        return [
            [name, *(format(of[kind], form) if kind in of else "–" for kind in kinds)] for name, of in figures.items()
        ]

    title = f"{arguments.pairs:,} pairs of {arguments.shards}, batches of {arguments.batch_size}, {arguments.workers} "
    title += f"readers, {arguments.threads} threads: pairs/s"
    show_table(["", *kinds], cells(result["pairs_per_s"], ".1f"), title=title)
    show_table(["", *kinds], cells(result["ours_to"], ".2f"), title="vlm embed to")
    for key, names in (("agreement", "ours and theirs"), ("agreement_of_backends", "ours by both backends")):
        agrees = result[key]
        rows = [[what, *(f"{value:.7f}" for value in found.values())] for what, found in agrees.items()]
        show_table([f"cosine of both vectors of a sample, {names}", *agrees["image"]], rows)
    export = result["export"]
    print(
        f"The export: {export['seconds']:.1f} s, {export['processor_seconds']:.1f} of the processor, once for a model."
    )
    print(f"To repeat: {result['command']}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
