"""The whole loop on drawn scenes: draw, pack, train, evaluate, embed, index, search, in minutes on two CPU cores.

Every step is a command that is printed before it runs, so that it can be repeated by hand on other data.
"""

import json
import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_json, show_table
from vlm.data.synthetic.shapes import shape_colour_classes
from vlm.files import write_text
from vlm.manifest import is_complete

logger = logging.getLogger(__name__)

NUM_TRAIN, NUM_VAL = 16_000, 1_000
CLASSES = "classes.txt"
QUERIES = (
    ("two green stars at the top",),
    ("a small blue heart on a white background",),
    ("three orange triangles",),
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm quickstart`."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = Path("quickstart-out")
    """Folder for everything; what is finished in it is not done again."""

    scenes: int = NUM_TRAIN
    """Scenes drawn for training."""

    steps: int = -1
    """Training steps; -1 takes the preset's."""

    json: bool = False
    """Print the figures as JSON at the end."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the loop, and the file or folder it leaves."""

    title: str
    words: list[str]
    leaves: Path

    @property
    def is_done(self) -> bool:
        """Whether what it leaves is there, whole."""
        return self.leaves.is_file() or is_complete(self.leaves)


def run(arguments: Arguments) -> None:
    """Run the steps, ask a few questions, say what came out and what to type next."""
    from vlm.cli.main import run_verb, split_verb

    out, started = arguments.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CLASSES, "\n".join(shape_colour_classes()) + "\n")
    seconds: dict[str, float] = {}
    for step in plan_steps(arguments):
        if step.is_done:
            logger.info(f"✓ {step.title}: already in {step.leaves}")
            continue
        seconds[step.title] = _timed(lambda step=step: run_verb(*split_verb(step.words)), step.title, step.words)
    seconds["searching"] = _timed(lambda: run_queries(out), "searching", ["search", str(out / "index"), "…"])
    figures = collect_figures(out) | {"seconds": seconds | {"all": time.monotonic() - started}}
    write_text(out / "quickstart.json", json.dumps(figures, indent=2) + "\n")
    if arguments.json:
        show_json(figures)
    else:
        show_figures(figures)
    logger.info(next_steps(out))


def plan_steps(arguments: Arguments) -> list[Step]:
    """The commands, in order."""
    out = arguments.out
    train, val, tokenizer = f"{out}/shards/train", f"{out}/shards/val", f"{out}/tokenizer.model"
    length = ["--steps", str(arguments.steps)] if arguments.steps >= 0 else []

    def step(title: str, leaves: str, *words: str) -> Step:
        return Step(title=title, words=list(words), leaves=Path(leaves))

    drawn = ["--scenes.number", str(arguments.scenes)]
    distinct = ["--scenes.split", "val", "--scenes.number", str(NUM_VAL), "--scenes.is-distinct"]
    return [
        step("drawing training scenes", train, "pack", "scenes", train, *drawn),
        step("drawing held-out scenes", val, "pack", "scenes", val, *distinct),
        step(
            "learning words",
            tokenizer,
            "tokenizer",
            "train",
            train,
            tokenizer,
            "--vocabulary",
            "256",
            "--languages",
            "en",
        ),
        step(
            "training",
            f"{out}/run",
            *["train", "tiny", "--data", train, "--val", val, "--run", f"{out}/run", "--tokenizer", tokenizer, *length],
        ),
        step(
            "evaluating",
            f"{out}/evaluation/report.html",
            *["eval", f"{out}/run", "--retrieval", val, "--captions-each", "1", "--languages", "en"],
            *["--classes", val, "--class-names", f"{out}/{CLASSES}"],
            *["--templates", "{}", "a picture of a {}", "--out", f"{out}/evaluation"],
        ),
        step("embedding", f"{out}/embeddings", "embed", f"{out}/run", f"{train}::{val}", f"{out}/embeddings"),
        step("indexing", f"{out}/index", "index", "build", f"{out}/embeddings", f"{out}/index"),
    ]


def run_queries(out: Path) -> None:
    """Three texts, a picture with a text, and a text less another; answers as tables and as one page."""
    from vlm.cli.search import show_result
    from vlm.service.gallery import write_gallery
    from vlm.service.images import read_image_bytes
    from vlm.service.search import Query, SearchService

    service = SearchService.open(out / "index")
    queries = [Query(texts=texts, top=8) for texts in QUERIES]
    queries.append(Query(texts=("a red circle",), minus=("something large",), top=8))
    results = [service.search(query) for query in queries]
    image = read_image_bytes(results[0].hits[0].entry)
    results.append(service.search(Query(images=(image,), texts=("a yellow background",), top=8)))
    for result in results:
        show_result(result)
    write_gallery(out / "gallery.html", results, title="Drawn scenes", info=service.index.info())


def collect_figures(out: Path) -> dict[str, float | int]:
    """The figures of merit from the evaluation's JSON."""
    values = json.loads((out / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    return {
        "zero_shot_top1": values["zero_shot"]["top1"],
        "zero_shot_classes": values["zero_shot"]["num_classes"],
        "text_to_image_recall@1": values["retrieval"]["text_to_image"]["recall"]["1"],
        "image_to_text_recall@1": values["retrieval"]["image_to_text"]["recall"]["1"],
        "held_out_scenes": values["retrieval"]["num_images"],
    }


def show_figures(figures: dict) -> None:
    """The figures beside what is expected of them, and where the time went."""
    classes, scenes = figures["zero_shot_classes"], figures["held_out_scenes"]
    rows = [
        [f"zero-shot among {classes} shapes × colours, combinations never trained on", figures["zero_shot_top1"], 0.9],
        [f"text→image recall@1 among {scenes:,} held-out scenes", figures["text_to_image_recall@1"], 0.5],
        [f"image→text recall@1 among {scenes:,} captions", figures["image_to_text_recall@1"], 0.5],
    ]
    show_table(["measured on scenes never seen", "is", "expected ≥"], rows)
    show_table(["step", "seconds"], [[name, round(value, 1)] for name, value in figures["seconds"].items()])


def next_steps(out: Path) -> str:
    """What to type after the quickstart."""
    return "\n".join(
        [
            "",
            f"Look at:  {out}/gallery.html · {out}/evaluation/report.html · {out}/run/curves.png",
            "Ask it:",
            f'  vlm search {out}/index "three purple crosses on the left" --html answer.html',
            f"  vlm classify {out}/run PICTURE --classes 'red circle,blue star,green heart'",
            "Train one that writes captions (about 5 minutes), and check what it writes:",
            f"  vlm train tiny-coca --data {out}/shards/train --val {out}/shards/val --run {out}/captioner "
            f"--tokenizer {out}/tokenizer.model",
            f"  vlm eval {out}/captioner --captions {out}/shards/val --prompt 'a picture of'",
            "Your own data:",
            "  vlm pack FOLDER shards && vlm train tiny --data shards --run runs/mine",
        ]
    )


def _timed(work: Callable[[], None], title: str, words: list[str]) -> float:
    logger.info(f"\n▸ {title}:  vlm {shlex.join(words)}")
    before = time.monotonic()
    work()
    return time.monotonic() - before
