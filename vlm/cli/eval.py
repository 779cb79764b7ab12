"""Measure a model: retrieval on shards, zero-shot on class folders or labelled shards, truth of captions on scenes."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import read_text, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.evaluation.eval_report import Evaluation
    from vlm.evaluation.zero_shot import ZeroShot
    from vlm.models.model import VisionLanguageModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm eval`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run folder, model folder, or open_clip NAME:WEIGHTS."""

    retrieval: str = ""
    """Shards whose pictures and captions are searched for each other."""

    classes: str = ""
    """Folder of CLASS/picture, or shards with --label, to classify by class names alone."""

    label: str = "label"
    """Metadata field that holds the class of a sample; dots look inside."""

    class_names: str = ""
    """Candidate classes: a,b,c or a file with one a line; empty takes those that occur."""

    templates: tuple[str, ...] = ()
    """Sentences with {} for the class name; empty takes three common ones."""

    captions: str = ""
    """Shards of drawn scenes that the model captions, each caption checked against its scene."""

    prompt: str = ""
    """Words every caption begins with, such as "a picture of"."""

    languages: tuple[str, ...] = ()
    """Languages of the captions used in retrieval; empty takes the first of each sample."""

    captions_each: int = 0
    """Captions of a picture used in retrieval, in each language: the first so many; 0 uses all."""

    out: Path | None = None
    """Folder for evaluation.json and report.html."""

    workers: int = 1
    """Processes that read and decode."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …"""

    precision: str = "fp32"
    """fp32 or bf16."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Load the model, measure what was asked, show it."""
    if not (arguments.retrieval or arguments.classes or arguments.captions):
        raise UsageError("Nothing to measure: give --retrieval SHARDS, --classes FOLDER or --captions SHARDS.")
    from vlm.models.load import load_model

    model = load_model(arguments.model, device=arguments.device, precision=arguments.precision)
    evaluation = evaluate(model, arguments)
    values = asdict(evaluation)
    if arguments.out:
        from vlm.evaluation.eval_report import write_report
        from vlm.files import write_text

        arguments.out.mkdir(parents=True, exist_ok=True)
        write_text(arguments.out / "evaluation.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        write_report(evaluation, arguments.out / "report.html")
        logger.info(f"Report: {arguments.out / 'report.html'}")
    if arguments.json:
        show_json(values)
    else:
        show_evaluation(evaluation)


def evaluate(model: "VisionLanguageModel", arguments: Arguments) -> "Evaluation":
    """Run the evaluators that were asked for."""
    from vlm.data.shards import expand_shards
    from vlm.evaluation.caption_accuracy import measure_caption_truth
    from vlm.evaluation.eval_report import Evaluation
    from vlm.evaluation.retrieval import evaluate_retrieval

    workers = arguments.workers
    return Evaluation(
        model=model.name,
        fingerprint=model.fingerprint,
        retrieval=evaluate_retrieval(
            model,
            expand_shards(arguments.retrieval),
            languages=arguments.languages,
            captions_each=arguments.captions_each,
            workers=workers,
        )
        if arguments.retrieval
        else None,
        zero_shot=zero_shot(model, arguments) if arguments.classes else None,
        caption_truth=measure_caption_truth(
            model, expand_shards(arguments.captions), prompt=arguments.prompt, workers=workers
        )
        if arguments.captions
        else None,
    )


def zero_shot(model: "VisionLanguageModel", arguments: Arguments) -> "ZeroShot":
    """Embed the labelled pictures once, then classify them by the class names."""
    import torch

    from vlm.evaluation.zero_shot import DEFAULT_TEMPLATES, class_embeddings, measure_zero_shot, read_labelled

    labelled = read_labelled(arguments.classes, arguments.label, model.view, workers=arguments.workers)
    batches = [(model.embed_images(torch.from_numpy(images)).numpy(), labels) for images, labels in labelled]
    names = read_names(arguments.class_names) or sorted({label for _, labels in batches for label in labels})
    classifier = class_embeddings(model, names, arguments.templates or DEFAULT_TEMPLATES)
    return measure_zero_shot(batches, classifier, names)


def read_names(given: str) -> list[str]:
    """Class names from a file with one a line, whatever it contains, or from `a,b,c`; a name given twice is one.

    Raises:
        UsageError: the text is neither, or the file is no UTF-8 text.
    """
    if given and _is_file(given):
        lines = read_text(Path(given)).splitlines()
    elif given and "," not in given:
        raise UsageError(f"There is no file {given!r} of class names; give one, or names as a,b,c.")
    else:
        lines = given.split(",")
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _is_file(given: str) -> bool:
    """Whether the text is the name of a file; a long list of names is longer than a file name may be."""
    try:
        return Path(given).is_file()
    except OSError:
        return False


def show_evaluation(evaluation: "Evaluation") -> None:
    """Tables for people."""
    if evaluation.retrieval:
        found = evaluation.retrieval
        columns = ["retrieval", *(f"recall@{k}" for k in found.text_to_image.recall), "median rank", "queries"]
        rows: list[Sequence[object]] = [
            [name, *direction.recall.values(), direction.median_rank, direction.num_queries]
            for name, direction in (("text → image", found.text_to_image), ("image → text", found.image_to_text))
        ]
        show_table(columns, rows, title=f"{found.num_images:,} pictures, {found.num_texts:,} captions")
    if evaluation.zero_shot:
        shot = evaluation.zero_shot
        columns = ["zero-shot", "top-1", "top-5", "mean per class", "largest class", "pictures", "classes"]
        row = [shot.top1, shot.top5, shot.mean_per_class, shot.majority, shot.num_images, shot.num_classes]
        show_table(columns, [["overall", *row]])
        hardest = sorted(shot.classes, key=lambda score: (score.accuracy, -score.num_images))[:10]
        show_table(["hardest classes", "pictures", "right"], [[s.name, s.num_images, s.accuracy] for s in hardest])
    if evaluation.caption_truth:
        truth = evaluation.caption_truth
        show_table(["captions", "true", "checked"], [["drawn scenes", truth.true, truth.num_captions]])
        show_table(
            ["scene", "caption", "verdict"], [[e["key"], e["caption"], e["reason"] or "true"] for e in truth.examples]
        )
