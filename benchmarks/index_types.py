#!/usr/bin/env python
"""Every index type on real embeddings: text and image recall, time and bytes, and whether recall targets hold.

    benchmarks/run index_types [--data flickr8k] [--model RUN] [--copies 8 --rows 200000] [--json]

A model trained by its preset embeds the images of a data set, augmented copies of them, and synthetic shapes. The
queries are the captions of the held-out images, which it never saw in training: one half tunes every index type for a
recall, the other half measures it. Slow results are cached and computed once.
"""

import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from vlm.console import show_json, show_table
from vlm.data.shards import count_samples, expand_shards
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_write
from vlm.index.embed import EmbedOptions, embed_into
from vlm.manifest import is_complete
from vlm.models.load import load_model

sys.path.insert(0, str(Path(__file__).parent))
from parts.index_type_rows import embed_copies, split_texts
from parts.index_type_trials import AT, IMAGES, TEXTS, Material, effort_of, keep_promises, try_kinds
from parts.messages import say
from parts.quality_data import DataSet, prepare

Trials = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the index type benchmark."""

    data: Literal["flickr8k", "fashion"] = "flickr8k"
    """Data set of images and captions."""

    model: str = ""
    """MODEL trained on it; empty trains one by the preset of that name and keeps it."""

    copies: int = 8
    """Augmented views per image, embedded by the model."""

    scenes: int = 8000
    """Number of synthetic shapes images among the rows."""

    rows: int = 200_000
    """Total rows; the remainder are image embeddings shifted the way augmentation shifted others."""

    questions: int = 1000
    """Texts in each half, and images held out as queries."""

    promises: tuple[float, ...] = (0.9, 0.95, 0.99)
    """Targets of text-to-image recall@10."""

    shown: float = 0.95
    """Target for which the table of index types shows the results."""

    sample: int = 50_000
    """Rows on which the autotuner tries configurations before extrapolating to all rows."""

    figure: Path | None = None
    """PNG file for a plot of recall against latency."""

    cache: Path = Path.home() / ".cache" / "vlm"
    """Folder of the shards, the model (bench-quality) and the embeddings (bench-kinds)."""

    seed: int = 0
    """Random seed of halves, training samples and k-means."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Embed what is missing, run the measurements, print the results."""
    cache = arguments.cache.expanduser()
    data = prepare(arguments.data, cache / "bench-quality", shards=0)
    folder = cache / "bench-kinds" / arguments.data
    folder.mkdir(parents=True, exist_ok=True)
    spec = arguments.model or _trained(data, folder)
    images, planned, asked = _embedded(arguments, data, spec, folder)
    material = Material.of(images, planned, asked, questions=arguments.questions, seed=arguments.seed)
    trials = list(try_kinds(material, arguments.promises, seed=arguments.seed))
    with tempfile.TemporaryDirectory() as name:
        found = keep_promises(Path(name), images, planned, asked, arguments.promises, sample=arguments.sample)
        plans = list(found)
    if arguments.figure:
        _draw(trials, arguments.figure)
    if arguments.json:
        show_json({"rows": len(material.rows), "trials": trials, "plans": plans})
    else:
        _show(arguments, material, trials, plans)


def _trained(data: DataSet, folder: Path) -> str:
    """The run of the preset; resumed if it is unfinished."""
    out = folder / "run"
    if not is_complete(out):
        say(f"Training {data.name} by its preset …")
        words = ["--data", data.train, "--val", data.val, "--tokenizer", str(data.tokenizer), "--run", str(out)]
        resume = ["--resume"] if out.exists() else []
        _vlm("train", data.name, *words, *resume)
    return str(out)


def _embedded(arguments: Arguments, data: DataSet, spec: str, folder: Path) -> tuple[Path, Path, Path]:
    """Embeddings folders of the rows and of both halves of the texts."""
    model, shards, scenes = load_model(spec), expand_shards(f"{data.train}::{data.val}"), folder / "scenes"
    if not (scenes / "manifest.json").is_file():
        _vlm("pack", "scenes", str(scenes), "--scenes.number", str(arguments.scenes))
    drawn = expand_shards(str(scenes))
    image_rows = sum(count_samples(shards))
    moved = arguments.rows - image_rows * (arguments.copies + 1) - arguments.scenes
    if moved < 0:
        raise UsageError(f"{image_rows:,} images with {arguments.copies} copies are more than {arguments.rows:,} rows.")
    name = f"{model.fingerprint}-{arguments.copies}-{arguments.rows}"
    say(f"Embedding {image_rows:,} images {arguments.copies + 1} times and {arguments.scenes:,} synthetic shapes …")
    images = embed_copies(
        model, shards, drawn, folder / f"images-{name}", spec=spec, copies=arguments.copies, moved=moved
    )
    texts = folder / f"texts-{model.fingerprint}"
    if not is_complete(texts):
        embed_into(model, expand_shards(data.val), {"text": texts}, EmbedOptions(model_spec=spec))
    halves = [folder / f"{half}-{model.fingerprint}-{arguments.questions}" for half in ("planned", "asked")]
    split_texts(texts, halves, most=arguments.questions, seed=arguments.seed)
    return images, halves[0], halves[1]


def _vlm(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "vlm", *words], capture_output=True, text=True)
    if done.returncode:
        raise VlmError(f"vlm {' '.join(words[:2])} … failed: {(done.stderr or done.stdout)[-2000:]}")


def _show(arguments: Arguments, material: Material, trials: Trials, plans: Trials) -> None:
    counts = (1, 10, 100)
    ways = [f"{way} R@{count}" for way in ("t→i", "i→i") for count in counts]
    columns = ["kind", "setting", "build s", "B/row", "mapped", *ways, "p50 ms", "p95 ms", "p99 ms"]
    cells = [
        [
            trial["kind"],
            effort_of(trial),
            f"{trial['build_s']:.1f}",
            f"{trial['index_bytes']:.0f}",
            f"{trial['mapped_bytes']}",
            *(f"{trial['recall'][way][count]:.3f}" for way in (TEXTS, IMAGES) for count in counts),
            *(f"{trial[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms")),
        ]
        for trial in trials
        if trial["promise"] == arguments.shown and "failed" not in trial
    ]
    show_table(columns, cells, title=_title(arguments, material))
    columns = ["index type", *(f"target {promise:g}" for promise in arguments.promises)]
    kinds = dict.fromkeys(trial["kind"] for trial in trials)
    cells = [[kind, *(_kept(trial) for trial in trials if trial["kind"] == kind)] for kind in kinds]
    show_table(columns, cells, title=f"t→i recall@{AT} of {len(material.judge[0].vectors):,} unseen texts, p50 ms")
    columns = ["target", "chosen", "parameters", "autotuner's estimate (≥, 95%)", "measured (≥, 95%)"]
    show_table(columns, [_planned(plan) for plan in plans], title=f"The autotuner on {arguments.sample:,} of all rows")
    print(f"To repeat: {shlex.join(['benchmarks/run', 'index_types', *sys.argv[1:]])}")


def _title(arguments: Arguments, material: Material) -> str:
    return (
        f"{len(material.rows):,} × {material.rows.dimension}: {arguments.data}, {arguments.copies} augmented views of "
        f"each image, {arguments.scenes:,} synthetic shapes images, the rest "
        "shifted in embedding space as augmentation shifted other images; "
        f"tuned for t→i recall@{AT} {arguments.shown:g}; one thread"
    )


def _kept(trial: dict[str, Any]) -> str:
    if "failed" in trial:
        return trial["failed"]
    recall = trial["recall"][TEXTS][AT]
    return f"{recall:.4f}{'' if recall >= trial['promise'] else ' MISSED'}, {trial['p50_ms']:.2f} ms"


def _planned(plan: dict[str, Any]) -> list[str]:
    if "failed" in plan:
        return [f"{plan['promise']:g}", plan["failed"], "–", "–", "–"]
    broken = "" if plan["measured"] >= plan["promise"] else " MISSED"
    tuned = ", ".join(f"{name} {value}" for name, value in plan["tuned"].items()) or "–"
    expected = f"{plan['expected']:.4f} (≥ {plan['expected_bound']:.4f})"
    measured = f"{plan['measured']:.4f} (≥ {plan['bound']:.4f}){broken}"
    return [f"{plan['promise']:g}", plan["chosen"], tuned, expected, measured]


def _draw(trials: Trials, path: Path) -> None:
    """Plot recall on unseen texts against median latency, one line per index type."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind in dict.fromkeys(trial["kind"] for trial in trials):
        own = [trial for trial in trials if trial["kind"] == kind and "failed" not in trial]
        recalls = [trial["recall"][TEXTS][AT] for trial in own]
        axes.plot([trial["p50_ms"] for trial in own], recalls, marker="o", markersize=4, linewidth=1.2, label=kind)
    axes.set(xscale="log", xlabel="median latency per query on one thread, ms", ylabel=f"text→image recall@{AT}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)


if __name__ == "__main__":
    run(tyro.cli(Arguments))
