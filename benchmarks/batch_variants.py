#!/usr/bin/env python
"""What distinct and hard batches and the global losses gain over plain CLIP at a small batch: seeds, intervals, time.

    benchmarks/run batch_variants TRAIN_SHARDS VAL_SHARDS TOKENIZER OUT [--seeds 0 1 2] [--epochs 4] [--batch-size 128]

Every variant trains the preset `fashion` at the same batch size on equally many samples; variants take turns, so that
a busy machine slows all alike. Hard batches take their neighbours from a first run of plain CLIP with another seed,
whose time is reported apart. Finished runs are kept in OUT and not repeated.
"""

import json
import math
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import tyro

from vlm.console import show_json, show_table

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say

VARIANTS: dict[str, list[str]] = {
    "clip": [],
    "clip, same ignored": ["--same-pairs", "ignore"],
    "clip, distinct": ["--batches", "distinct"],
    "clip, hard": ["--batches", "hard"],
    "sogclr": ["--objective", "sogclr", "--temperature", "0.03"],
    "fastclip": ["--objective", "fastclip"],
}
"""Options of each variant in addition to those of the first."""

METRICS = ("text_to_image_recall@1", "text_to_image_recall@10", "image_to_text_recall@1")
_FIRST_SEED = 1000
# of Student's distribution at 97.5%, by degrees of freedom
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    train: tyro.conf.Positional[str]
    """Training shards."""

    val: tyro.conf.Positional[str]
    """Shards to measure retrieval on."""

    tokenizer: tyro.conf.Positional[Path]
    """SentencePiece model."""

    out: tyro.conf.Positional[Path]
    """Folder of the runs."""

    preset: str = "fashion"
    """Preset of all variants."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants; the first is what the others are compared with."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds."""

    epochs: float = 4.0
    """Epochs of each run."""

    batch_size: int = 128
    """Batch size."""

    hard_cluster: int = 8
    """Mutually similar samples that stand together in hard batches."""

    json: Annotated[bool, tyro.conf.arg(help="Print the results as JSON.")] = False


def main(arguments: Arguments) -> None:
    """Run what is missing and show the table."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    first = run_once(arguments, "clip", _FIRST_SEED, [])
    relations = relate(arguments)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.variants}
    for seed in arguments.seeds:
        for name in arguments.variants:
            options = VARIANTS[name]
            if "--batches" in options:
                options = [*options, "--relations", str(relations), "--hard-cluster", str(arguments.hard_cluster)]
            results[name].append(run_once(arguments, name, seed, options))
            show(arguments, results)
    if arguments.json:
        show_json({"first_run": first, "results": results})


def run_once(arguments: Arguments, name: str, seed: int, options: list[str]) -> dict[str, Any]:
    """The last values of one run, with its processor time; trained unless it was already."""
    run = arguments.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    record = run.with_suffix(".json")
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    say(f"{run.name} …")
    words = ["train", arguments.preset, "--data", arguments.train, "--val", arguments.val]
    words += ["--tokenizer", str(arguments.tokenizer), "--run", str(run), "--seed", str(seed)]
    words += ["--epochs", str(arguments.epochs), "--batch-size", str(arguments.batch_size)]
    words += ["--evaluate-every", "100000", "--checkpoint-every", "100000", "--workers", "0"]
    seconds = vlm([*words, *options])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = lines[-1]
    result = {metric: last[metric] for metric in METRICS}
    result |= {"loss": last["loss"], "logit_scale": last["logit_scale"], "cpu_seconds": seconds, "seen": last["seen"]}
    record.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def relate(arguments: Arguments) -> Path:
    """Equal captions and images of the training shards, and neighbours by the first run."""
    relations = arguments.out / "train.relations"
    if not relations.is_file():
        embeddings = arguments.out / "embeddings"
        seconds = vlm(["embed", str(arguments.out / f"clip-{_FIRST_SEED}"), arguments.train, str(embeddings)])
        seconds += vlm(["relate", arguments.train, str(relations), "--embeddings", str(embeddings)])
        say(f"Embedding and relating took {seconds:.0f} s of processor time.")
    return relations


def vlm(words: list[str]) -> float:
    """Run one verb; returns its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "vlm", "--quiet", *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def show(arguments: Arguments, results: dict[str, list[dict[str, Any]]]) -> None:
    """A row for each variant: means, and the differences to the first at equal seeds with 95% intervals."""
    base = results[arguments.variants[0]]
    rows: list[list[Any]] = []
    for name, runs in results.items():
        if not runs:
            continue
        row: list[Any] = [name, len(runs)]
        for metric in METRICS:
            row.append(f"{100 * mean(run[metric] for run in runs):.1f}")
        differences = [100 * (own[METRICS[0]] - other[METRICS[0]]) for own, other in zip(runs, base, strict=False)]
        row.append(interval(differences) if name != arguments.variants[0] else "")
        ratios = [own["cpu_seconds"] / other["cpu_seconds"] for own, other in zip(runs, base, strict=False)]
        row += [f"{mean(ratios):.2f}", f"{mean(run['loss'] for run in runs):.3f}"]
        row.append(f"{mean(run['logit_scale'] for run in runs):.1f}")
        rows.append(row)
    columns = ["variant", "seeds", "t→i@1", "t→i@10", "i→t@1", "t→i@1 less first", "time", "loss", "1/τ"]
    show_table(columns, rows, title=f"{arguments.epochs:g} epochs, batch {arguments.batch_size}")


def interval(differences: list[float]) -> str:
    """Mean and 95% interval by Student's t over seeds."""
    if len(differences) < 2:
        return f"{mean(differences):+.1f}"
    half = _STUDENT.get(len(differences) - 1, 1.96) * stdev(differences) / math.sqrt(len(differences))
    return f"{mean(differences):+.1f} ± {half:.1f}"


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
