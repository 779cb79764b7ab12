#!/usr/bin/env python
"""vlm eval compared with CLIP_benchmark: time of the whole command and the figures, same model, same WebDataset sets.

    benchmarks/run evaluation [--model FOLDER] [--repeats 3] [--json]

CIFAR-10's test images with 80 templates (zero-shot) and Flickr8k's val photos with five captions each (retrieval), in
CLIP_benchmark's layout, are measured in float32 by both. CLIP_benchmark runs in an environment of its own; they take
turns, so that a busy machine slows all. The model is open_clip's: its network and its tokenizer, read from one folder,
of which vlm eval reads the ONNX export (made before, not timed) and, a third command, the weights by torch. Without
--model one is trained for a minute, so that the figures are not those of chance.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError, VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.clip_benchmark_sets import CLASSIFICATION, DATASETS, RETRIEVAL, write_sets
from parts.isolated_environment import own_python, same_torch
from parts.messages import say

# its release needs requests without saying so, and fails with NumPy 2.4 (2026-11)
CLIP_BENCHMARK = ("clip-benchmark==1.6.2", "open_clip_torch==3.3.0", "numpy<2.4", "requests")
OURS = "vlm eval"
OURS_BY_TORCH = "vlm eval --backend torch"
THEIRS = "CLIP_benchmark"
# the file that each command's figures of a task are in
FILES = {OURS: "ours", OURS_BY_TORCH: "torch", THEIRS: "theirs"}
SETS = {"zero-shot": CLASSIFICATION, "retrieval": RETRIEVAL}
# CLIP_benchmark's names of the figures, and ours
FIGURES = {
    "zero-shot": {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class"},
    "retrieval": {
        f"{modality}_retrieval_recall@{k}": f"{direction}_recall@{k}"
        for modality, direction in (("image", "text_to_image"), ("text", "image_to_text"))
        for k in (1, 5, 10)
    },
}
SUITE = """
[data.set]
path = "{path}"
layout = "clip-benchmark"

[[evaluate]]
evaluator = "{evaluator}"
data = "set"
{settings}
"""
# positives are an image's own captions there; figures by rank of all positives are not among CLIP_benchmark's
SETTINGS = {"zero-shot": "", "retrieval": 'same_text = "negative"\nevery_positive = false'}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the evaluation benchmark."""

    model: Path | None = None
    """Model folder of open_clip (vlm export MODEL OUT) with CLIP's tokenizer; a copy of it is used."""

    steps: int = 60
    """Training steps of the model where none is given."""

    large: bool = False
    """Measure on the 5,000 and 6,000 images of the training splits instead of the 2,000 and 1,000 held out."""

    repeats: int = 3
    """Rounds; the two take turns."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of CLIP_benchmark's environment (bench-clip-benchmark)."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Measure both and print the results."""
    with tempfile.TemporaryDirectory() as name:
        result = _measure(arguments, Path(name))
    result["command"] = shlex.join(["benchmarks/run", "evaluation", *sys.argv[1:]])
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def _measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    python = own_python(arguments.cache.expanduser() / "bench-clip-benchmark", (*CLIP_BENCHMARK, *same_torch()))
    model = folder / "model"
    if arguments.model:
        if not (arguments.model / "open_clip_config.json").is_file():
            raise UsageError(
                f"{arguments.model} is no model folder of open_clip (it has no open_clip_config.json), which "
                "CLIP_benchmark needs. Make one: vlm export MODEL OUT."
            )
        shutil.copytree(arguments.model, model)
    else:
        _train(folder, model, arguments.steps)
    _run_vlm(["export", str(model), "--to", "onnx"])
    write_sets(folder / "sets", is_large=arguments.large)
    rows: list[dict[str, Any]] = []
    figures: list[dict[str, Any]] = []
    for task in SETS:
        commands = {
            THEIRS: _their_command(python, model, folder, task),
            OURS: _our_command(model, folder, task),
            OURS_BY_TORCH: [*_our_command(model, folder, task), "--backend", "torch"],
        }
        costs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for number in range(arguments.repeats):
            for name, command in commands.items():
                say(f"{task}, round {number + 1}: {name} …")
                costs[name].append(_cost(command, folder))
                if name != THEIRS:
                    (folder / "stdout").rename(_figures_file(folder, task, name))
        rows += [_summary(task, name, of_name) for name, of_name in costs.items()]
        figures += _figures(task, folder)
    return {"rows": rows, "figures": figures, "model": str(arguments.model or f"{arguments.steps} steps")}


def _figures_file(folder: Path, task: str, command: str) -> Path:
    return folder / f"{task}.{FILES[command]}.json"


def _train(folder: Path, model: Path, steps: int) -> None:
    say(f"Training a model with CLIP's tokenizer for {steps} steps …")
    shards = str(DATASETS / "flickr8k" / "train-*.tar")
    words = ["train", "flickr8k", "--data", shards, "--tokenizer", "clip", "--run", str(folder / "run")]
    _run_vlm([*words, "--steps", str(steps)])
    _run_vlm(["export", str(folder / "run"), str(model)])


def _run_vlm(words: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "vlm", *words], capture_output=True, text=True)
    if done.returncode:
        raise VlmError(f"vlm {words[0]} failed: {done.stderr[-2000:]}")


def _their_command(python: Path, model: Path, folder: Path, task: str) -> list[str]:
    return [
        *(str(python.parent / "clip_benchmark"), "eval", "--dataset", f"wds/{SETS[task].removeprefix('wds_')}"),
        *(
            "--dataset_root",
            str(folder / "sets" / SETS[task]),
            "--model",
            f"local-dir:{model}",
            "--pretrained",
            "local",
        ),
        *("--no_amp", "--recall_k", "1", "5", "10", "--output", str(_figures_file(folder, task, THEIRS))),
    ]


def _our_command(model: Path, folder: Path, task: str) -> list[str]:
    suite = folder / f"{task}.toml"
    suite.write_text(SUITE.format(path=SETS[task], evaluator=task, settings=SETTINGS[task]), encoding="utf-8")
    words = ["eval", str(model), "--suite", str(suite), "--data-root", str(folder / "sets"), "--json"]
    return [sys.executable, "-m", "vlm", *words]


def _cost(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds and processor seconds of a command; what it prints is kept in a file."""
    # both read what the machine says about its cores
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        raise VlmError(f"{command[0]} failed: {(folder / 'stderr').read_text()[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "megabytes": usage.ru_maxrss / 1024}


def _summary(task: str, name: str, costs: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(cost[key] for cost in costs) for key in costs[0]}
    return {"task": task, "command": name} | medians | {"all_seconds": [cost["seconds"] for cost in costs]}


def _figures(task: str, folder: Path) -> list[dict[str, Any]]:
    theirs = json.loads(_figures_file(folder, task, THEIRS).read_text())["metrics"]
    rows: list[dict[str, Any]] = []
    for command in (OURS, OURS_BY_TORCH):
        measured = json.loads(_figures_file(folder, task, command).read_text())["models"][0]["measurements"][0]
        for their_name, our_name in FIGURES[task].items():
            figure = measured["values"][our_name]["value"]
            row = {"task": task, "command": command, "figure": our_name, "theirs": theirs[their_name], "ours": figure}
            # CLIP_benchmark's are of float32
            rows.append(row | {"equal": abs(figure - theirs[their_name]) < 1e-6})
    return rows


def _show(result: dict[str, Any]) -> None:
    rows: list[list[object]] = []
    costs = {(row["task"], row["command"]): row for row in result["rows"]}
    for row in result["rows"]:
        theirs = costs[row["task"], THEIRS]
        ratios = [f"{theirs[key] / row[key]:.1f}×" for key in ("seconds", "cpu_seconds")]
        rows.append([*(row[key] for key in ("task", "command", "seconds", "cpu_seconds", "megabytes")), *ratios])
    show_table(["task", "command", "seconds", "CPU seconds", "MB", "faster", "by CPU"], rows)
    figures = [[*list(row.values())[:-1], "yes" if row["equal"] else "no"] for row in result["figures"]]
    show_table(["task", "command", "figure", THEIRS, "ours", "equal"], figures)


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
