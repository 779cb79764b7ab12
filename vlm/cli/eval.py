"""`vlm eval`: what a model can do, as tables, JSON and a page."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.cli.options import DeviceOption, JsonOption, ModelArguments, PrecisionOption, call_options
from vlm.console import percent, pluralize, show_json, show_table
from vlm.errors import UsageError, VlmError

if TYPE_CHECKING:
    from vlm.api.evaluation import Evaluation
    from vlm.evaluation.caption_evaluator import CaptionReport, CaptionTruth
    from vlm.evaluation.measurement import Value
    from vlm.evaluation.reject_evaluator import RejectionResult
    from vlm.evaluation.retrieval_metrics import RetrievalResult
    from vlm.evaluation.suite import SuiteEvaluation
    from vlm.evaluation.zero_shot import ZeroShot

_HARDEST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluate models: one by retrieval, zero-shot classification and caption accuracy, or several by a suite."""

    models: ModelArguments

    suite: str = ""
    """Suite: drawn-scenes, small-sets, clip-benchmark, datacomp, or a TOML file that names data and evaluators."""

    data_root: Path = Path()
    """Folder below which the data of the suite lies."""

    features: Path | None = None
    """Folder in which features are kept for the next command; OUT/features if not given."""

    retrieval: str = ""
    """Shards for image-text retrieval."""

    classes: str = ""
    """Class folders (CLASS/image), or shards with --label, for zero-shot classification."""

    label: str = "label"
    """Metadata field with the class of a sample; dots select nested fields."""

    class_names: str = ""
    """Candidate classes: a,b,c, a file with one per line, a JSON file with a list for each language, or imagenet; empty
    uses the classes of the data."""

    templates: tuple[str, ...] = ()
    """Prompt templates with {} or {c} for the class name, files with one per line, a JSON file with a list for each
    language, or names of sets: openai (80), simple (7), cifar, pets, food, aircraft, flowers, satellite, texture; empty
    uses three common ones."""

    class_descriptions: str = ""
    """JSON file with a list of sentences for each class, as prompts beside the templates given, or alone."""

    out_of_distribution: str = ""
    """Images of none of the classes (a folder, shards): how well similarity and whitened LDA tell them apart; OUT gets
    the threshold for vlm classify --reject."""

    captions: str = ""
    """Shards to caption: compared with their captions (BLEU, ROUGE-L, CIDEr), or checked against synthetic scenes."""

    meteor: bool = False
    """Compare captions by METEOR, too; needs Java and pip install 'vlm-pipeline[meteor]'."""

    prompt: str = ""
    """Prefix of every generated caption, e.g. "a picture of"."""

    languages: tuple[str, ...] = ()
    """Caption languages for retrieval and as references; empty uses the first of each sample."""

    captions_each: int = 0
    """Captions per image and language for retrieval, the first ones; 0 uses all."""

    out: Path | None = None
    """Folder for evaluation.json, report.html and samples/, a table for each measurement."""

    heat_maps: bool = False
    """Show in report.html, beside the images of the worst mistakes, where they match a text. Needs --out; takes a
    second for each image of a large model on the CPU."""

    workers: int = 1
    """Workers that read and decode: processes, or threads where an ONNX export is evaluated; 0 uses the main
    process."""

    device: DeviceOption = "auto"

    precision: PrecisionOption = "fp32"

    backend: Annotated[str, tyro.conf.arg(metavar="auto|onnx|torch")] = ""
    """onnx: the model's ONNX export (vlm export MODEL --to onnx), which needs no torch; torch; or auto, the export
    where it is up to date, in float32, and gives all that is measured. Default: VLM_BACKEND, else auto."""

    json: JsonOption = False

    def run(self) -> None:
        """Evaluate, show."""
        if not self.models:
            raise UsageError("No model is given: vlm eval MODEL …")
        if not (self.retrieval or self.classes or self.captions or self.suite):
            raise UsageError(
                "Nothing to evaluate: give --retrieval SHARDS, --classes FOLDER or --captions SHARDS, or --suite NAME."
            )
        if self.heat_maps and self.out is None:
            raise UsageError("--heat-maps are shown in the report: give --out FOLDER, too.")
        # after the checks, which should not wait for torch
        from vlm.api.evaluation import evaluate
        from vlm.evaluation.suite import SuiteEvaluation

        options = call_options(self, suite=self.suite or None)
        evaluation = evaluate(list(options.pop("models")), **options)
        if self.json:
            show_json(evaluation)
        elif isinstance(evaluation, SuiteEvaluation):
            show_suite(evaluation)
        else:
            show_evaluation(evaluation)
        if isinstance(evaluation, SuiteEvaluation) and evaluation.failed:
            first = evaluation.failed[0]
            raise VlmError(
                f"{pluralize(len(evaluation.failed), 'evaluation')} failed, first {first.evaluator} on {first.data} of "
                f"{first.model}: {first.error}"
            )


def show_suite(evaluation: "SuiteEvaluation") -> None:
    """The main value of every measurement, a column for each model; what is absent, and what failed."""
    from vlm.evaluation.comparison import format_difference, format_value
    from vlm.evaluation.evaluation_page import short_names

    comparison = evaluation.comparison
    first = comparison.models[0].model
    columns = ["evaluator", "data", "value"]
    for model, name in zip(comparison.models, short_names([model.model for model in comparison.models]), strict=True):
        columns += [name] if model.model == first else [name, "difference"]
    rows: list[list[object]] = []
    for evaluator, data in comparison.measured():
        measurements = [model.find(evaluator, data) for model in comparison.models]
        value = next(next(iter(measurement.values)) for measurement in measurements if measurement)
        row: list[object] = [evaluator, data, value]
        for model, measurement in zip(comparison.models, measurements, strict=True):
            row.append(format_value(value, measurement.values[value]) if measurement else "–")
            if model.model != first:
                entry = comparison.find(evaluator, data, value, model.model)
                row.append(
                    f"{format_difference(value, entry.difference)}{' *' * entry.is_significant}" if entry else "–"
                )
        rows.append(row)
    title = f"{evaluation.title}{' (* p < 0.05 after correction)' if len(comparison.models) > 1 else ''}"
    show_table(columns, rows, title=title)
    if evaluation.averages:
        averages: list[list[object]] = []
        for figure in evaluation.averages:
            shown = (
                format_value(figure.name, figure.value)
                if figure.value
                else f"not measured: {', '.join(figure.missing)}"
            )
            averages.append([figure.name, figure.model, shown])
        show_table(["average", "model", "value"], averages)
    if evaluation.absent:
        rows = [[absent.name, absent.reason, absent.fetch] for absent in evaluation.absent]
        show_table(["left out", "because", "fetch it by"], rows)
    if evaluation.failed:
        failures = [[failed.model, failed.evaluator, failed.data, failed.error] for failed in evaluation.failed]
        show_table(["failed", "evaluator", "data", "because"], failures)


def show_evaluation(evaluation: "Evaluation") -> None:
    """A table for each evaluation."""
    values: dict[str, Value] = {}
    for measurement in evaluation.measurements:
        values |= measurement.values
    if evaluation.retrieval:
        _show_retrieval(evaluation.retrieval, values)
    if evaluation.zero_shot:
        _show_zero_shot(evaluation.zero_shot, values)
    if evaluation.rejection:
        _show_rejection(evaluation.rejection)
    if evaluation.caption_truth:
        _show_caption_truth(evaluation.caption_truth, values)
    if evaluation.captions:
        _show_captions(evaluation.captions)


def _with_interval(values: Mapping[str, "Value"], name: str, figure: float) -> str:
    """The figure with half of its interval's width, where it was measured with one."""
    from vlm.evaluation.comparison import format_figure, format_value

    return format_value(name, values[name]) if name in values else format_figure(name, figure)


def _show_retrieval(retrieval: "RetrievalResult", values: Mapping[str, "Value"]) -> None:
    columns = ["retrieval", *(f"recall@{k}" for k in retrieval.text_to_image.recall), "median rank", "queries"]
    rows: list[list[object]] = []
    for name, direction in (("text → image", retrieval.text_to_image), ("image → text", retrieval.image_to_text)):
        prefix = name.replace(" → ", "_to_")
        recalls = [_with_interval(values, f"{prefix}_recall@{k}", recall) for k, recall in direction.recall.items()]
        median = _with_interval(values, f"{prefix}_median_rank", direction.median_rank)
        rows.append([name, *recalls, median, direction.num_queries])
    show_table(columns, rows, title=f"{retrieval.num_images:,} images, {retrieval.num_texts:,} captions")


def _show_zero_shot(zero_shot: "ZeroShot", values: Mapping[str, "Value"]) -> None:
    columns = ["zero-shot", "top-1", "top-5", "mean per class", "largest class", "images", "classes"]
    shares = {"top1": zero_shot.top1, "top5": zero_shot.top5, "mean_per_class": zero_shot.mean_per_class}
    shown = [_with_interval(values, name, share) for name, share in shares.items()]
    counts = [zero_shot.num_images, zero_shot.num_classes]
    row: list[object] = ["overall", *shown, percent(zero_shot.majority), *counts]
    if zero_shot.mean_average_precision is not None:
        columns.append("mAP")
        row.append(percent(zero_shot.mean_average_precision))
    if zero_shot.calibration:
        columns.append("calibration error")
        row.append(percent(zero_shot.calibration.error))
    show_table(columns, [row])
    if zero_shot.languages:
        by_language = [[entry.language, percent(entry.top1), percent(entry.top5)] for entry in zero_shot.languages]
        show_table(["language", "top-1", "top-5"], by_language)
    # of classes with equal accuracy first those with more images, where it is less of an accident
    hardest = sorted(zero_shot.classes, key=lambda score: (score.accuracy, -score.num_images))[:_HARDEST_SHOWN]
    rows = [[score.name, score.num_images, percent(score.accuracy)] for score in hardest]
    show_table(["hardest classes", "images", "accuracy"], rows)
    if zero_shot.confusion:
        pairs: list[list[object]] = []
        for pair in zero_shot.confusion[:_HARDEST_SHOWN]:
            pairs.append([pair.truth, pair.prediction, pair.num_images, percent(pair.share)])
        show_table(["images of", "taken for", "images", "share of the class"], pairs)


def _show_rejection(rejection: "RejectionResult") -> None:
    rows: list[list[object]] = []
    for name, separation in (("similarity", rejection.similarity), ("whitened LDA", rejection.whitened_lda)):
        if separation:
            rows.append([name, percent(separation.auroc), percent(separation.fpr_at_95_tpr), separation.threshold])
    title = f"{rejection.num_inside:,} images of classes, {rejection.num_outside:,} of none of them"
    show_table(["rejection", "AUROC", "pass although of none", "threshold"], rows, title=title)


def _show_caption_truth(truth: "CaptionTruth", values: Mapping[str, "Value"]) -> None:
    accuracy = _with_interval(values, "accuracy", truth.true)
    show_table(["captions", "accuracy", "checked"], [["synthetic shapes", accuracy, truth.num_captions]])
    rows = [[example["key"], example["caption"], example["reason"] or "correct"] for example in truth.examples]
    show_table(["sample", "caption", "verdict"], rows)


def _show_captions(report: "CaptionReport") -> None:
    scores = report.scores
    rows: list[list[object]] = []
    for name, figure in scores.figures().items():
        ends = "" if figure.low is None or figure.high is None else f"{figure.low:.4f} to {figure.high:.4f}"
        rows.append([_CAPTION_METRICS.get(name, name), f"{figure.value:.4f}", ends])
    title = f"{scores.num_images:,} captions, {report.num_different:,} of them different; CLIP score by {report.judge}"
    show_table(["captions", "figure", "95% interval"], rows, title=title)
    examples = [[example.key, example.caption, example.references[0]] for example in report.examples]
    show_table(["sample", "caption", "reference"], examples)


_CAPTION_METRICS = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L (COCO's)",
    "rouge_l_single": "ROUGE-L (single reference)",
    "cider": "CIDEr (plain)",
    "cider_d": "CIDEr-D (COCO's CIDEr)",
    "meteor": "METEOR",
    "clip_score": "CLIP score",
    "ref_clip_score": "RefCLIPScore",
}
