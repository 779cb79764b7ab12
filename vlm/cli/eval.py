"""`vlm eval`: what a model can do, as tables, JSON and a page."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.options import DeviceOption, JsonOption, ModelArgument, PrecisionOption, WorkersOption
from vlm.console import show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.evaluation.caption_accuracy import CaptionTruth
    from vlm.evaluation.eval_report import Evaluation
    from vlm.evaluation.retrieval import Retrieval
    from vlm.evaluation.zero_shot import ZeroShot
    from vlm.models.model import VisionLanguageModel

logger = logging.getLogger(__name__)

_HARDEST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate a model: image-text retrieval, zero-shot classification, caption accuracy on synthetic shapes."""

    model: ModelArgument

    retrieval: str = ""
    """Shards for image-text retrieval."""

    classes: str = ""
    """Class folders (CLASS/image), or shards with --label, for zero-shot classification."""

    label: str = "label"
    """Metadata field with the class of a sample; dots select nested fields."""

    class_names: str = ""
    """Candidate classes: a,b,c or a file with one per line; empty uses the classes of the data."""

    templates: tuple[str, ...] = ()
    """Prompt templates with {} for the class name; empty uses three common ones."""

    captions: str = ""
    """Shards of synthetic shapes to caption; each caption is checked against its scene."""

    prompt: str = ""
    """Prefix of every generated caption, e.g. "a picture of"."""

    languages: tuple[str, ...] = ()
    """Caption languages for retrieval; empty uses the first of each sample."""

    captions_each: int = 0
    """Captions per image and language for retrieval, the first ones; 0 uses all."""

    out: Path | None = None
    """Folder for evaluation.json and report.html."""

    workers: WorkersOption = 1

    device: DeviceOption = "auto"

    precision: PrecisionOption = "fp32"

    json: JsonOption = False

    def run(self) -> None:
        """Load the model, evaluate, show."""
        if not (self.retrieval or self.classes or self.captions):
            raise UsageError("Nothing to evaluate: give --retrieval SHARDS, --classes FOLDER or --captions SHARDS.")
        # after the check, which should not wait for torch
        from vlm.models.load import load_model

        model = load_model(self.model, device=self.device, precision=self.precision)
        evaluation = self._evaluate(model)
        values = asdict(evaluation)
        # the page before the tables, so that a closed pipe (vlm eval … | head) does not lose it
        if self.out:
            from vlm.evaluation.eval_report import EvalData, write_report
            from vlm.files import write_text
            from vlm.pages import Provenance

            self.out.mkdir(parents=True, exist_ok=True)
            write_text(self.out / "evaluation.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            data = EvalData(retrieval=self.retrieval, zero_shot=self.classes, captions=self.captions)
            write_report(evaluation, self.out / "report.html", data=data, provenance=Provenance.current())
            logger.info(f"Report: {self.out / 'report.html'}")
        if self.json:
            show_json(values)
        else:
            show_evaluation(evaluation)

    def _evaluate(self, model: "VisionLanguageModel") -> "Evaluation":
        from vlm.data.pack import shards_at
        from vlm.data.shards import expand_shards
        from vlm.evaluation.caption_accuracy import measure_caption_truth
        from vlm.evaluation.eval_report import Evaluation
        from vlm.evaluation.retrieval import evaluate_retrieval
        from vlm.evaluation.zero_shot import DEFAULT_TEMPLATES, evaluate_zero_shot, read_class_list

        retrieval = zero_shot = caption_truth = None
        if self.retrieval:
            retrieval = evaluate_retrieval(
                model,
                shards_at(self.retrieval),
                languages=self.languages,
                captions_each=self.captions_each,
                workers=self.workers,
            )
        if self.classes:
            zero_shot = evaluate_zero_shot(
                model,
                self.classes,
                label=self.label,
                names=read_class_list(self.class_names),
                templates=self.templates or DEFAULT_TEMPLATES,
                workers=self.workers,
            )
        if self.captions:
            shards = expand_shards(self.captions)
            caption_truth = measure_caption_truth(model, shards, prompt=self.prompt, workers=self.workers)
        return Evaluation(
            model=model.name,
            fingerprint=model.fingerprint,
            retrieval=retrieval,
            zero_shot=zero_shot,
            caption_truth=caption_truth,
        )


def show_evaluation(evaluation: "Evaluation") -> None:
    """A table for each evaluation."""
    if evaluation.retrieval:
        _show_retrieval(evaluation.retrieval)
    if evaluation.zero_shot:
        _show_zero_shot(evaluation.zero_shot)
    if evaluation.caption_truth:
        _show_caption_truth(evaluation.caption_truth)


def _show_retrieval(retrieval: "Retrieval") -> None:
    columns = ["retrieval", *(f"recall@{k}" for k in retrieval.text_to_image.recall), "median rank", "queries"]
    rows: list[list[object]] = []
    for name, direction in (("text → image", retrieval.text_to_image), ("image → text", retrieval.image_to_text)):
        rows.append([name, *direction.recall.values(), direction.median_rank, direction.num_queries])
    show_table(columns, rows, title=f"{retrieval.num_images:,} images, {retrieval.num_texts:,} captions")


def _show_zero_shot(zero_shot: "ZeroShot") -> None:
    columns = ["zero-shot", "top-1", "top-5", "mean per class", "largest class", "images", "classes"]
    shares = [zero_shot.top1, zero_shot.top5, zero_shot.mean_per_class, zero_shot.majority]
    show_table(columns, [["overall", *shares, zero_shot.num_images, zero_shot.num_classes]])
    # of classes with equal accuracy first those with more images, where it is less of an accident
    hardest = sorted(zero_shot.classes, key=lambda score: (score.accuracy, -score.num_images))[:_HARDEST_SHOWN]
    rows = [[score.name, score.num_images, score.accuracy] for score in hardest]
    show_table(["hardest classes", "images", "accuracy"], rows)


def _show_caption_truth(truth: "CaptionTruth") -> None:
    show_table(["captions", "accuracy", "checked"], [["synthetic shapes", truth.true, truth.num_captions]])
    rows = [[example["key"], example["caption"], example["reason"] or "correct"] for example in truth.examples]
    show_table(["sample", "caption", "verdict"], rows)
