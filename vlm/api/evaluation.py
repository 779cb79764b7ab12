"""`vlm.evaluate`: a model to its scores, as tables, JSON and a page."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from vlm.api.data import Shards, join_shards
from vlm.api.inference import Model, encoder_of
from vlm.data.pack import shards_at
from vlm.data.shards import expand_shards
from vlm.errors import UsageError, os_errors_explained
from vlm.evaluation.caption_accuracy import measure_caption_truth
from vlm.evaluation.caption_evaluator import CaptionMetrics
from vlm.evaluation.eval_report import EvalData, Evaluation, write_report
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.retrieval import evaluate_retrieval
from vlm.evaluation.zero_shot import evaluate_zero_shot
from vlm.files import write_text
from vlm.models.model import VisionLanguageModel
from vlm.pages import Provenance
from vlm.text_lists import text_list

logger = logging.getLogger(__name__)


@os_errors_explained()
def evaluate(
    model: str | Path | Model | VisionLanguageModel,
    *,
    retrieval: Shards | None = None,
    classes: str | Path | None = None,
    label: str = "label",
    class_names: str | Path | Sequence[str] = (),
    templates: str | Sequence[str] = (),
    class_descriptions: str | Path | Mapping[str, Sequence[str]] = "",
    captions: Shards | None = None,
    prompt: str = "",
    meteor: bool = False,
    languages: Sequence[str] = (),
    captions_each: int = 0,
    out: str | Path | None = None,
    workers: int = 1,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Evaluation:
    """Measure a model: retrieval, zero-shot classification, captions, as `vlm eval` does.

    Args:
        retrieval: shards for image-text retrieval, with `captions_each` captions (0: all) per image and language.
        classes: class folders, or shards with the class in the metadata field `label`; `class_names` are the
            candidates, those of the data if not given, and `templates` the prompts: sentences with {}, files of them,
            or names of sets such as `openai` and `simple`. `class_descriptions`: sentences by class name, or a JSON
            file of them, as prompts beside the templates given, or alone. Names and templates may be JSON files with a
            list for each language.
        captions: shards whose images the model captions, beginning with `prompt`; compared with their captions
            (`meteor`: by METEOR, too, which needs Java), or, of synthetic shapes, checked against the scene.
        out: folder for evaluation.json and report.html.

    Raises:
        UsageError: there is nothing to evaluate, or no such model or data.
        VlmError: the model's weights cannot be loaded, or have diverged.
    """
    if not (retrieval or classes or captions):
        raise UsageError("Nothing to evaluate: give --retrieval SHARDS, --classes FOLDER or --captions SHARDS.")
    model = encoder_of(model, device=device, precision=precision)
    measured = Evaluation(model=model.name, fingerprint=model.fingerprint)
    if retrieval:
        result = evaluate_retrieval(
            model,
            shards_at(join_shards(retrieval)),
            languages=tuple(languages),
            captions_each=captions_each,
            workers=workers,
        )
        measured = replace(measured, retrieval=result)
    if classes:
        zero_shot = evaluate_zero_shot(
            model,
            str(classes),
            label=label,
            names=class_names,
            templates=text_list(templates, "templates"),
            descriptions=class_descriptions,
            workers=workers,
        )
        measured = replace(measured, zero_shot=zero_shot)
    if captions:
        evaluator = CaptionMetrics(prompt=prompt, languages=tuple(languages), meteor=meteor)
        measured = _measure_captions(measured, model, join_shards(captions), evaluator, workers)
    if out is not None:
        data = EvalData(
            retrieval=join_shards(retrieval) if retrieval else "",
            zero_shot=str(classes or ""),
            captions=join_shards(captions) if captions else "",
        )
        _write_evaluation(measured, Path(out), data)
    return measured


def _measure_captions(
    measured: Evaluation, model: VisionLanguageModel, captions: str, evaluator: CaptionMetrics, workers: int
) -> Evaluation:
    """Against the scenes of drawn images; against the captions of others."""
    data = open_evaluation_set(captions)
    if "scene" in data.metadata[0]:
        shards = expand_shards(captions)
        truth = measure_caption_truth(model, shards, prompt=evaluator.prompt, workers=workers)
        return replace(measured, caption_truth=truth)
    measurement = evaluator.run(EvaluatedModel(model, workers=workers), data)
    return replace(measured, captions=measurement.details)


def _write_evaluation(evaluation: Evaluation, out: Path, data: EvalData) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "evaluation.json", json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False) + "\n")
    write_report(evaluation, out / "report.html", data=data, provenance=Provenance.current())
    logger.info(f"Report: {out / 'report.html'}")
