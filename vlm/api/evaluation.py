"""`vlm.evaluate`: models to their scores, as tables, JSON and a page."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, overload

from vlm.api.data import Shards, join_shards
from vlm.api.inference import Model, encoder_of
from vlm.data.pack import shards_at
from vlm.data.shards import expand_shards
from vlm.errors import UsageError, os_errors_explained
from vlm.evaluation.caption_accuracy import measure_caption_truth
from vlm.evaluation.caption_evaluator import CaptionMetrics
from vlm.evaluation.eval_report import EvalData, Evaluation, write_report
from vlm.evaluation.evaluation_page import write_evaluation_page
from vlm.evaluation.evaluation_set import open_evaluation_set
from vlm.evaluation.features import EvaluatedModel, FeatureCache
from vlm.evaluation.retrieval import evaluate_retrieval
from vlm.evaluation.sample_files import write_samples
from vlm.evaluation.suite import OpenSets, SuiteEvaluation, evaluate_models, read_suite
from vlm.evaluation.zero_shot import evaluate_zero_shot
from vlm.files import write_text
from vlm.models.model import VisionLanguageModel
from vlm.pages import Provenance
from vlm.text_lists import text_list

logger = logging.getLogger(__name__)

ModelLike = str | Path | Model | VisionLanguageModel
"""A model, or what names one (MODEL as for `vlm.load`)."""


@overload
def evaluate(
    model: ModelLike,
    *,
    suite: None = None,
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
) -> Evaluation: ...


@overload
def evaluate(
    model: ModelLike | Sequence[ModelLike],
    *,
    suite: str | Path,
    data_root: str | Path = ".",
    features: str | Path | None = None,
    out: str | Path | None = None,
    workers: int = 1,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> SuiteEvaluation: ...


@os_errors_explained()
def evaluate(
    model: ModelLike | Sequence[ModelLike],
    *,
    suite: str | Path | None = None,
    data_root: str | Path = ".",
    features: str | Path | None = None,
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
) -> Evaluation | SuiteEvaluation:
    """Measure a model, or several side by side, as `vlm eval` does.

    With a suite, all that it names; else retrieval, zero-shot classification and captions of one model.

    Args:
        suite: name of a suite of this package, or a TOML file (docs/evaluation.md). data_root: folder of its data.
            features: folder in which features are kept for the next time; OUT/features if not given.
        retrieval: shards for image-text retrieval, with `captions_each` captions (0: all) per image and language.
        classes: class folders, or shards with the class in the metadata field `label`; `class_names` are the
            candidates, those of the data if not given, and `templates` the prompts: sentences with {}, files of them,
            or names of sets such as `openai` and `simple`. `class_descriptions`: sentences by class name, or a JSON
            file of them, as prompts beside the templates given, or alone. Names and templates may be JSON files with a
            list for each language.
        captions: shards whose images the model captions, beginning with `prompt`; compared with their captions
            (`meteor`: by METEOR, too, which needs Java), or, of synthetic shapes, checked against the scene.
        out: folder for evaluation.json, report.html and, of a suite, the table of each measurement's samples.

    Raises:
        UsageError: there is nothing to evaluate, or no such model or data.
        VlmError: the model's weights cannot be loaded, or have diverged.
    """
    models = [model] if isinstance(model, str | Path | Model | VisionLanguageModel) else list(model)
    request = _Request(
        retrieval=join_shards(retrieval) if retrieval else "",
        classes=str(classes or ""),
        captions=join_shards(captions) if captions else "",
        languages=tuple(languages),
        workers=workers,
    )
    request.check(has_suite=suite is not None, num_models=len(models))
    if suite is not None:
        load = partial(_evaluated, device=device, precision=precision, workers=workers)
        folders = _Folders.of(data_root, out, features)
        return _evaluate_suite(models, str(suite), folders, load)
    encoder = encoder_of(models[0], device=device, precision=precision)
    measured = Evaluation(model=encoder.name, fingerprint=encoder.fingerprint)
    if retrieval:
        measured = request.measure_retrieval(encoder, measured, captions_each)
    if classes:
        zero_shot = evaluate_zero_shot(
            encoder,
            request.classes,
            label=label,
            names=class_names,
            templates=text_list(templates, "templates"),
            descriptions=class_descriptions,
            workers=workers,
        )
        measured = replace(measured, zero_shot=zero_shot)
    if captions:
        measured = request.measure_captions(encoder, measured, prompt, meteor=meteor)
    if out is not None:
        request.write(measured, Path(out))
    return measured


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is measured of one model, by the addresses of its data; they are empty where nothing is."""

    retrieval: str
    classes: str
    captions: str
    languages: tuple[str, ...]
    workers: int

    def check(self, *, has_suite: bool, num_models: int) -> None:
        is_empty = not (self.retrieval or self.classes or self.captions)
        if has_suite and not is_empty:
            raise UsageError("A suite names its data itself: omit --retrieval, --classes and --captions.")
        if is_empty and not has_suite:
            raise UsageError(
                "Nothing to evaluate: give --retrieval SHARDS, --classes FOLDER or --captions SHARDS, or --suite NAME."
            )
        if not num_models:
            raise UsageError("No model is given: vlm eval MODEL [MODEL ...] --suite NAME|FILE.")
        if num_models > 1 and not has_suite:
            raise UsageError(f"{num_models} models are compared by a suite: give --suite NAME|FILE.")

    def measure_retrieval(self, model: VisionLanguageModel, measured: Evaluation, captions_each: int) -> Evaluation:
        shards = shards_at(self.retrieval)
        options = {"languages": self.languages, "captions_each": captions_each, "workers": self.workers}
        return replace(measured, retrieval=evaluate_retrieval(model, shards, **options))

    def measure_captions(
        self, model: VisionLanguageModel, measured: Evaluation, prompt: str, *, meteor: bool
    ) -> Evaluation:
        """Against the scenes of drawn images; against the captions of others."""
        data = open_evaluation_set(self.captions)
        if "scene" in data.metadata[0]:
            shards = expand_shards(self.captions)
            truth = measure_caption_truth(model, shards, prompt=prompt, workers=self.workers)
            return replace(measured, caption_truth=truth)
        evaluator = CaptionMetrics(prompt=prompt, languages=self.languages, meteor=meteor)
        measurement = evaluator.run(EvaluatedModel(model, workers=self.workers), data)
        return replace(measured, captions=measurement.details)

    def write(self, evaluation: Evaluation, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "evaluation.json", json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False) + "\n")
        data = EvalData(retrieval=self.retrieval, zero_shot=self.classes, captions=self.captions)
        write_report(evaluation, out / "report.html", data=data, provenance=Provenance.current())
        logger.info(f"Report: {out / 'report.html'}")


@dataclass(frozen=True, kw_only=True)
class _Folders:
    """Of a suite: where its data lies, where results and features go."""

    data: Path
    out: Path | None
    features: Path | None

    @classmethod
    def of(cls, data: str | Path, out: str | Path | None, features: str | Path | None) -> "_Folders":
        folder = None if out is None else Path(out)
        if features is None and folder is not None:
            features = folder / "features"
        return cls(data=Path(data), out=folder, features=None if features is None else Path(features))


def _evaluated(model: ModelLike, cache: FeatureCache, *, device: str, precision: str, workers: int) -> EvaluatedModel:
    # an ONNX export is a model as good as any here
    encoder = model.query_encoder if isinstance(model, Model) else encoder_of(model, device=device, precision=precision)
    return EvaluatedModel(encoder, cache=cache, workers=workers)  # pyright: ignore[reportArgumentType]


def _evaluate_suite(
    models: Sequence[ModelLike],
    suite: str,
    folders: _Folders,
    load: Callable[[ModelLike, FeatureCache], EvaluatedModel],
) -> SuiteEvaluation:
    cache = FeatureCache(folders.features)
    sets = OpenSets(suite=read_suite(suite), root=folders.data, cache=folders.features)
    # loaded one after the other: two large ones need not fit into memory together
    evaluation = evaluate_models((load(model, cache) for model in models), sets)
    if folders.out is not None:
        out = folders.out
        out.mkdir(parents=True, exist_ok=True)
        write_samples(out / "samples", evaluation.comparison.models)
        write_text(out / "evaluation.json", json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False) + "\n")
        page = out / "report.html"
        write_evaluation_page(evaluation.comparison, page, sets=sets.opened, provenance=Provenance.current())
        logger.info(f"Report: {page}")
    return evaluation
