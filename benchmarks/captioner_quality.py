#!/usr/bin/env python
"""A captioner over a frozen pretrained image tower, the same decoder from scratch, and what its captions are worth.

    benchmarks/run captioner_quality shared/datasets/flickr8k/train-*.tar shared/datasets/flickr8k/val-*.tar OUT
        [--epochs 8] [--scratch-epochs 10] [--recaption] [--seeds 0] [--json]

CIDEr-D of both on val beside a retrieval baseline: the first caption of the training photo that is nearest by the
frozen tower. The epochs from scratch take about as long as those of the frozen tower. With --recaption the captioner
writes new captions of the training photos, and towers for retrieval are trained with and without them mixed in, at
equal seeds. Weights come by the extra local-weights. What is in OUT is not done again, so that an interrupted
benchmark goes on where it was. Quote the patterns of shards.
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import VlmError
from vlm.evaluation.caption_metrics import caption_metrics
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedModel, FeatureCache
from vlm.models.load import load_model

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say

WEIGHTS = "package:efficientnet-lite2"
DECODER = "coca:256x1x2@256"
SIDES: dict[str, list[str]] = {
    "frozen": [
        "--architecture",
        f"timm:tf_efficientnet_lite2,image_size=224,initial_weights={WEIGHTS}+{DECODER}",
        *("--image-size", "224", "--lock", "image", "--locked-features-gb", "2", "--crop-scale", "1", "1"),
    ],
    # a tower that learns from 6,000 photos in minutes, with the crops and flips of the preset flickr8k
    "scratch": [
        "--architecture",
        f"timm:test_convnext3,image_size=128+{DECODER}",
        *("--image-size", "128", "--crop-scale", "0.6", "1", "--flip", "0.5"),
    ],
}
"""What differs between the captioners."""

RECIPE = [
    *("--context-length", "20", "--resize-mode", "squash", "--batch-size", "64", "--learning-rate", "1e-3"),
    *("--objective", "clip + 2*caption", "--same-pairs", "positive", "--label-smoothing", "0.1", "--dropout", "0.15"),
    *("--warmup-steps", "100", "--weight-decay", "0.1", "--average-decay", "0.99", "--log-every", "20"),
    *("--workers", "0", "--seed", "0", "--checkpoint-every", "200"),
]
"""What they share."""

# the text tower is trained, since cached features of captions know no new ones
RETRIEVAL = [
    *("--architecture", f"timm:tf_efficientnet_lite2,initial_weights={WEIGHTS},residual=1024,head_dropout=0.3+bag@512"),
    *("--lock", "image", "--caption-blend", "0", "--workers", "0", "--checkpoint-every", "100000"),
]
METRICS = ("text_to_image_recall@1", "text_to_image_recall@10", "image_to_text_recall@1", "image_to_text_recall@10")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    train: tyro.conf.Positional[str]
    """Training shards with several captions an image."""

    val: tyro.conf.Positional[str]
    """Shards to caption."""

    out: tyro.conf.Positional[Path]
    """Folder of the runs and results."""

    sides: tuple[str, ...] = tuple(SIDES)
    """Captioners: frozen, scratch."""

    epochs: float = 8.0
    """Epochs over the frozen tower."""

    scratch_epochs: float = 10.0
    """Epochs from scratch."""

    recaption: bool = False
    """Also measure what the captions of the frozen side, mixed into training, change in retrieval."""

    captioner: str = ""
    """MODEL that writes them; empty takes the frozen side."""

    retrieval_epochs: float = 20.0
    """Epochs of the towers for retrieval."""

    retrieval_batch: int = 512
    """Their batch size."""

    caption_mix: float = 0.5
    """Probability of a new caption."""

    seeds: tuple[int, ...] = (0,)
    """Random seeds of the towers for retrieval."""

    examples: int = 8
    """Captions that are shown."""

    json: bool = False
    """Print the results as JSON."""


def main(arguments: Arguments) -> None:
    """Run what is missing and show the tables."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    words = arguments.out / "words.model"
    if not words.is_file():
        vlm("tokenizer", "train", arguments.train, str(words), "--vocabulary", "4096", "--languages", "en")
    captioners: dict[str, dict[str, Any]] = {}
    for side in arguments.sides:
        run = arguments.out / f"{side}-0"
        epochs = arguments.epochs if side == "frozen" else arguments.scratch_epochs
        common = ["--data", arguments.train, "--tokenizer", str(words), *RECIPE, "--epochs", str(epochs)]
        seconds = train(run, ["tiny-coca", *common, *SIDES[side]])
        captioners[side] = {"epochs": epochs, "cpu_seconds": seconds, "report": captions_of(run, arguments)}
    result: dict[str, Any] = {"captioners": captioners}
    if "frozen" in arguments.sides:
        result["nearest"] = cached(arguments.out / "nearest.json", lambda: nearest_caption(arguments))
    if arguments.recaption:
        result["retrieval"] = [mixed_and_not(arguments, seed) for seed in arguments.seeds]
    if arguments.json:
        show_json(result)
    else:
        show(arguments, result)


def cached(path: Path, compute: Any) -> Any:
    """A result as JSON, computed unless it is there."""
    if not path.is_file():
        path.write_text(json.dumps(compute()) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def train(run: Path, options: list[str]) -> float:
    """Train unless that was done; the processor seconds of all tries, in NaN where a try was ended by force."""
    record = run.with_suffix(".seconds.json")
    if not (run / "model").is_dir():
        say(f"{run.name} …")
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else 0.0
        # a run that was begun without a record is resumed, too, and its time is not known
        before = float("nan") if run.is_dir() and not record.is_file() else before
        seconds = vlm("train", *options, "--run", str(run), *(["--resume"] if run.is_dir() else []))
        record.write_text(json.dumps(before + seconds), encoding="utf-8")
    return float(json.loads(record.read_text(encoding="utf-8"))) if record.is_file() else float("nan")


def vlm(*words: str) -> float:
    """Run one verb; returns its processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "vlm", *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise VlmError(f"vlm {' '.join(words[:2])} … ended with {done.returncode}; start again to go on.")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def captions_of(run: Path, arguments: Arguments) -> dict[str, Any]:
    """Figures and examples of a captioner on val."""
    folder = arguments.out / f"{run.name}-eval"
    if not (folder / "evaluation.json").is_file():
        say(f"Captions of {run.name} …")
        vlm("eval", str(run), "--captions", arguments.val, "--languages", "en", "--workers", "0", "--out", str(folder))
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["captions"]


def nearest_caption(arguments: Arguments) -> dict[str, Any]:
    """Figures of the first caption of the training photo that is nearest by what the frozen tower pools."""
    say("Nearest training photos …")
    model = EvaluatedModel(load_model(str(arguments.out / "frozen-0")), cache=FeatureCache(arguments.out / "features"))
    train_set, train_rows = model.image_features(open_evaluation_set(arguments.train), layer="pooled")
    val_set, val_rows = model.image_features(open_evaluation_set(arguments.val), layer="pooled")
    nearest = np.argmax(unit_rows(val_rows) @ unit_rows(train_rows).T, axis=1)
    captions = [english(train_set, row)[0] for row in nearest.tolist()]
    references = [english(val_set, row) for row in range(len(val_set))]
    scores = caption_metrics(captions, references).to_json()
    return {
        "cider_d": scores["cider_d"],
        "bleu": scores["bleu"],
        "captions": dict(zip(val_set.keys, captions, strict=True)),
    }


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def english(data: EvaluationSet, row: int) -> list[str]:
    """The English captions of an image, or those of its only language."""
    captions = data.captions[row]
    return list(captions.get("en") or next(iter(captions.values())))


def mixed_and_not(arguments: Arguments, seed: int) -> dict[str, Any]:
    """Retrieval with new captions mixed into training less without, on the same queries, with 95% intervals."""
    captions = arguments.out / "captions"
    if not (captions / "manifest.json").is_file():
        say("New captions of the training photos …")
        captioner = arguments.captioner or str(arguments.out / "frozen-0")
        options = ["--no-repeat-ngram", "2", "--workers", "0"]
        vlm("caption", captioner, arguments.train, "--out", str(captions), *options)
    common = ["lit-local", "--data", arguments.train, *RETRIEVAL, "--seed", str(seed)]
    common += ["--epochs", str(arguments.retrieval_epochs), "--batch-size", str(arguments.retrieval_batch)]
    common += ["--feature-folder", str(arguments.out / "retrieval-features")]
    own, mixed = arguments.out / f"own-{seed}", arguments.out / f"mixed-{seed}"
    train(own, common)
    train(mixed, [*common, "--captions-from", str(captions), "--caption-mix", str(arguments.caption_mix)])
    suite = arguments.out / "retrieval.toml"
    data = json.dumps(str(Path(arguments.val).absolute()))
    suite.write_text(
        f'[data.val]\npath = {data}\n\n[[evaluate]]\nevaluator = "retrieval"\ndata = "val"\nlanguages = ["en"]\n'
    )
    folder = arguments.out / f"retrieval-{seed}"
    if not (folder / "evaluation.json").is_file():
        say(f"Retrieval of seed {seed} …")
        vlm("eval", str(own), str(mixed), "--suite", str(suite), "--workers", "0", "--out", str(folder))
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    differences = {entry["value"]: entry for entry in evaluation["differences"]}
    values = [model["measurements"][0]["values"] for model in evaluation["models"]]
    rows: dict[str, Any] = {}
    for name in METRICS:
        rows[name] = {"own": values[0][name]["value"], "mixed": values[1][name]["value"], **differences[name]}
    return {"seed": seed, "values": rows}


def show(arguments: Arguments, result: dict[str, Any]) -> None:
    """Tables: the captioners beside the nearest photo's caption, examples, retrieval."""
    rows: list[list[Any]] = []
    for side, values in result["captioners"].items():
        scores = values["report"]["scores"]
        minutes = f"{values['cpu_seconds'] / 60:.1f}"
        different = values["report"]["num_different"]
        rows.append([side, f"{values['epochs']:g}", minutes, *figures(scores), different])
    if "nearest" in result:
        rows.append(["nearest training photo's caption", "", "", *figures(result["nearest"]), ""])
    if rows:
        show_table(["captions", "epochs", "CPU min", "CIDEr-D", "BLEU-4", "different"], rows)
    if "frozen" in result["captioners"] and "nearest" in result:
        examples: list[list[Any]] = []
        for example in result["captioners"]["frozen"]["report"]["examples"][: arguments.examples]:
            near = result["nearest"]["captions"][example["key"]]
            examples.append([example["caption"], near, example["references"][0]])
        show_table(["written", "nearest photo's", "by a person"], examples)
    for entry in result.get("retrieval", ()):
        rows = []
        for name, row in entry["values"].items():
            spread = f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
            rows.append([name, f"{100 * row['own']:.1f}", f"{100 * row['mixed']:.1f}", spread])
        show_table(["retrieval", "own captions", "mixed", "difference, points"], rows, title=f"seed {entry['seed']}")


def figures(scores: dict[str, Any]) -> list[str]:
    """CIDEr-D and BLEU-4 with their 95% intervals."""
    shown: list[str] = []
    for figure in (scores["cider_d"], scores["bleu"][3]):
        shown.append(f"{figure['value']:.3f} ({figure['low']:.3f}–{figure['high']:.3f})")
    return shown


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
