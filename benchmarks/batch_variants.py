#!/usr/bin/env python
"""What distinct and hard batches and the global losses gain over plain CLIP at a small batch, by samples and by time.

    benchmarks/run batch_variants TRAIN_SHARDS VAL_SHARDS OUT --tokenizer FILE [--epochs 3] [--batch-size 128]
    benchmarks/run batch_variants TRAIN_SHARDS VAL_SHARDS OUT --tokenizer FILE --equal time
    benchmarks/run batch_variants TRAIN_SHARDS VAL_SHARDS OUT --preset lit-local --feature-folder features

All variants train one preset at one batch size, each seed in turn, so that a busy machine slows all alike. By default
they see equally many samples. With `--equal time` they spend the processor time of the first: a step of each is timed
in short runs that take turns, what must be computed before (`vlm relate`) is taken off, and the rest is spent on steps.
Hard batches take their neighbours from a run of the first variant with another seed; that run and its embeddings are
not taken off, since any model at hand will do. Finished runs are kept in OUT and not repeated.

With a preset over locked towers (`--feature-folder`), the val features are cached as well, and retrieval is measured
by the trained heads on them.
"""

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated, Any, Literal

import torch
import tyro
from linear_baseline import Arguments as FeatureArguments
from linear_baseline import read_features
from torch.nn import functional as F

import vlm
from vlm.console import show_json, show_table
from vlm.data.shards import count_samples, expand_shards
from vlm.evaluation.retrieval_metrics import RetrievalResult, measure_retrieval
from vlm.models.load import load_model

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say

VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip, same ignored": {"same_pairs": "ignore"},
    "clip, distinct": {"batches": "distinct"},
    "clip, hard": {"batches": "hard"},
    "sogclr": {"objective": "sogclr", "temperature": 0.03},
    "fastclip": {"objective": "fastclip", "rho": 2.0},
}
"""Settings of each variant in addition to those of the first."""

METRICS = ("text_to_image_recall@1", "text_to_image_recall@10", "image_to_text_recall@1")
_FIRST_SEED = 1000
# a step is timed by the difference of a long and a short run, in which the start and the end are equal
_TIMED_STEPS = (8, 72)
_NEVER = 1_000_000
# of Student's distribution at 97.5%, by degrees of freedom
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    train: tyro.conf.Positional[str]
    """Training shards."""

    val: tyro.conf.Positional[str]
    """Shards to measure retrieval on."""

    out: tyro.conf.Positional[Path]
    """Folder of the runs."""

    tokenizer: str = ""
    """Tokenizer; empty uses the preset's."""

    preset: str = "fashion"
    """Preset of all variants."""

    feature_folder: str = ""
    """Folder with the cached features of the preset's locked towers; empty if it locks none."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants; the first is what the others are compared with."""

    equal: Literal["samples", "time"] = "samples"
    """What the runs of all variants have in common: samples seen, or processor time."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds."""

    epochs: float = 4.0
    """Epochs of the first variant."""

    batch_size: int = 128
    """Batch size."""

    hard_cluster: int = 8
    """Mutually similar samples that stand together in hard batches."""

    rounds: int = 2
    """Rounds in which the steps of all variants are timed."""

    json: Annotated[bool, tyro.conf.arg(help="Print the results as JSON.")] = False


def main(arguments: Arguments) -> None:
    """Run what is missing and show the table."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    first_steps = round(arguments.epochs * sum(count_samples(expand_shards(arguments.train))) / arguments.batch_size)
    before = {name: relate(arguments)[1] if "batches" in VARIANTS[name] else 0.0 for name in arguments.variants}
    steps = dict.fromkeys(arguments.variants, first_steps)
    if arguments.equal == "time":
        steps = equal_time_steps(arguments, first_steps, before)
        say(f"Steps at equal time: {steps}")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.variants}
    for seed in arguments.seeds:
        for name in arguments.variants:
            results[name].append(run_once(arguments, name, seed, steps[name]))
            show(arguments, results, before)
    if arguments.json:
        show_json({"steps": steps, "results": results})


def equal_time_steps(arguments: Arguments, first_steps: int, before: dict[str, float]) -> dict[str, int]:
    """Steps of each variant in the processor time of the first one's, less the seconds before its first step."""
    record = arguments.out / f"step-seconds-{arguments.batch_size}.json"
    if not record.is_file():
        record.write_text(json.dumps(time_steps(arguments)) + "\n", encoding="utf-8")
    seconds = json.loads(record.read_text(encoding="utf-8"))
    budget = first_steps * seconds[arguments.variants[0]]
    steps: dict[str, int] = {}
    for name in arguments.variants:
        steps[name] = round((budget - before[name]) / seconds[name])
    return steps


def time_steps(arguments: Arguments) -> dict[str, float]:
    """Processor seconds of a step of each variant: the median over rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in arguments.variants}
    short, long = _TIMED_STEPS
    # the first run of a process imports what the others find
    timed_run(arguments, arguments.variants[0], short)
    for number in range(arguments.rounds):
        for name in arguments.variants if number % 2 else reversed(arguments.variants):
            spent = timed_run(arguments, name, long) - timed_run(arguments, name, short)
            seconds[name].append(spent / (long - short))
    return {name: median(values) for name, values in seconds.items()}


def timed_run(arguments: Arguments, name: str, steps: int) -> float:
    """Processor seconds of a run without evaluation."""
    folder = arguments.out / "timed"
    shutil.rmtree(folder, ignore_errors=True)
    started = time.process_time()
    train(arguments, name, folder, steps=steps, seed=_FIRST_SEED, val="")
    return time.process_time() - started


def run_once(arguments: Arguments, name: str, seed: int, steps: int) -> dict[str, Any]:
    """The last values of one run, with its processor time; trained unless it was already."""
    kind = f"{name.replace(', ', '-').replace(' ', '-')}-{arguments.batch_size}-{steps}-{seed}"
    folder = arguments.out / kind
    record = arguments.out / f"{kind}.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    say(f"{kind} …")
    shutil.rmtree(folder, ignore_errors=True)
    started = time.process_time()
    train(arguments, name, folder, steps=steps, seed=seed, val="" if arguments.feature_folder else arguments.val)
    seconds = time.process_time() - started
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    if arguments.feature_folder:
        last |= evaluate_heads(arguments, folder)
    result = {metric: last[metric] for metric in METRICS}
    result |= {"loss": last["loss"], "logit_scale": last["logit_scale"], "cpu_seconds": seconds, "seen": last["seen"]}
    record.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def train(arguments: Arguments, name: str, folder: Path, *, steps: int, seed: int, val: str) -> None:
    """One run in this process, so that its processor time is all its own."""
    settings = dict(VARIANTS[name])
    if "batches" in settings:
        settings |= {"relations": str(relate(arguments)[0]), "hard_cluster": arguments.hard_cluster}
    if arguments.tokenizer:
        settings["tokenizer"] = arguments.tokenizer
    if arguments.feature_folder:
        settings["feature_folder"] = arguments.feature_folder
    settings |= {"steps": steps, "seed": seed, "batch_size": arguments.batch_size, "workers": 0}
    settings |= {"evaluate_every": _NEVER, "checkpoint_every": _NEVER}
    vlm.train(arguments.preset, data=arguments.train, val=val or None, run=folder, **settings)


def relate(arguments: Arguments) -> tuple[Path, float]:
    """Equal captions and images of the training shards with neighbours by a first run; seconds of the former."""
    path = arguments.out / "train.relations"
    record = arguments.out / "relate-seconds.json"
    if not record.is_file():
        first = arguments.out / "first"
        if not (first / "manifest.json").is_file():
            epoch = sum(count_samples(expand_shards(arguments.train))) // arguments.batch_size
            train(arguments, "clip", first, steps=round(arguments.epochs * epoch), seed=_FIRST_SEED, val="")
        embeddings = arguments.out / "embeddings"
        vlm.embed(first, arguments.train, embeddings, workers=0)
        path.unlink(missing_ok=True)
        started = time.process_time()
        vlm.relate(arguments.train, path, embeddings=embeddings, workers=0)
        record.write_text(json.dumps(time.process_time() - started) + "\n", encoding="utf-8")
    return path, json.loads(record.read_text(encoding="utf-8"))


def evaluate_heads(arguments: Arguments, run: Path) -> dict[str, float]:
    """Retrieval by the heads of a run on the cached features of val."""
    model = load_model(str(run), device="cpu")
    options = FeatureArguments(
        train="", val="", preset=arguments.preset, feature_folder=arguments.feature_folder, json=False
    )
    data = read_features(arguments.val, options, model)
    visual: Any = model.network.get_submodule("visual")
    text: Any = model.network.get_submodule("text")
    assert data.texts is not None
    with torch.inference_mode():
        images = F.normalize(visual.project(torch.from_numpy(data.pixels)), dim=-1).numpy()
        texts = F.normalize(text.project(torch.from_numpy(data.texts)), dim=-1).numpy()
    result: RetrievalResult = measure_retrieval(images, texts, data.captions, every_positive=False)
    values: dict[str, float] = {}
    for direction in ("text_to_image", "image_to_text"):
        for count, recall in getattr(result, direction).recall.items():
            values[f"{direction}_recall@{count}"] = recall
    return values


def show(arguments: Arguments, results: dict[str, list[dict[str, Any]]], before: dict[str, float]) -> None:
    """A row for each variant: means, and the differences to the first at equal seeds with 95% intervals.

    Time is that of the runs with what each needs before its first step, relative to the first variant's.
    """
    base = results[arguments.variants[0]]
    rows: list[list[Any]] = []
    for name, runs in results.items():
        if not runs:
            continue
        row: list[Any] = [name, len(runs), f"{mean(run['seen'] for run in runs):,.0f}"]
        for metric in METRICS:
            row.append(f"{100 * mean(run[metric] for run in runs):.1f}")
        for metric in METRICS[:1] + METRICS[2:]:
            differences = [100 * (own[metric] - other[metric]) for own, other in zip(runs, base, strict=False)]
            row.append(interval(differences) if name != arguments.variants[0] else "")
        ratios: list[float] = []
        for own, other in zip(runs, base, strict=False):
            ratios.append((own["cpu_seconds"] + before[name]) / other["cpu_seconds"])
        row += [f"{mean(ratios):.2f}", f"{mean(run['loss'] for run in runs):.3f}"]
        row.append(f"{mean(run['logit_scale'] for run in runs):.1f}")
        rows.append(row)
    columns = ["variant", "seeds", "samples", "t→i@1", "t→i@10", "i→t@1", "t→i@1 less first", "i→t@1 less first"]
    title = f"{arguments.epochs:g} epochs of the first, batch {arguments.batch_size}, equal {arguments.equal}"
    show_table([*columns, "time", "loss", "1/τ"], rows, title=title)


def interval(differences: list[float]) -> str:
    """Mean and 95% interval by Student's t over seeds."""
    if len(differences) < 2:
        return f"{mean(differences):+.1f}"
    half = _STUDENT.get(len(differences) - 1, 1.96) * stdev(differences) / math.sqrt(len(differences))
    return f"{mean(differences):+.1f} ± {half:.1f}"


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
