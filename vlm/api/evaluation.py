"""`vlm.evaluate`: models to their scores, as tables, JSON and a page; `vlm.caption_metrics`: of captions alone."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np

from vlm.api.explanation import explainer
from vlm.api.image_batches import Images
from vlm.api.inference import Model, encoder_of, load
from vlm.config import text_list
from vlm.data.pack import shards_at
from vlm.data.shards import Shards, join_shards
from vlm.errors import UsageError, os_errors_explained
from vlm.evaluation import caption_metrics as metrics
from vlm.evaluation.caption_evaluator import CaptionAccuracy, CaptionMetrics, CaptionReport, CaptionTruth
from vlm.evaluation.comparison import Comparison, ModelMeasurements, compare
from vlm.evaluation.evaluation_page import write_evaluation_page
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedModel, FeatureCache
from vlm.evaluation.measurement import Evaluator, Measurement
from vlm.evaluation.mistakes import Explain
from vlm.evaluation.reject_evaluator import Rejection, RejectionResult, open_outside
from vlm.evaluation.retrieval import Retrieval
from vlm.evaluation.retrieval_metrics import RetrievalResult
from vlm.evaluation.sample_files import write_samples
from vlm.evaluation.suite import OpenSets, SuiteEvaluation, evaluate_models, read_suite
from vlm.evaluation.zero_shot import ZeroShot, ZeroShotClassification, open_labelled_set
from vlm.files import write_text
from vlm.pages import Provenance
from vlm.results import Result, json_values
from vlm.service.query import Backend, load_bulk_encoder

if TYPE_CHECKING:
    from vlm.models.model import VisionLanguageModel

logger = logging.getLogger(__name__)


ModelLike: TypeAlias = "str | Path | Model | VisionLanguageModel"
"""A model, or what names one (MODEL as for `vlm.load`)."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Result):
    """Everything measured of one model; None where it was not requested. measurements: the same with intervals."""

    model: str
    fingerprint: str
    retrieval: RetrievalResult | None = None
    zero_shot: ZeroShot | None = None
    caption_truth: CaptionTruth | None = None
    captions: CaptionReport | None = None
    rejection: RejectionResult | None = None
    measurements: tuple[Measurement, ...] = ()

    @classmethod
    def of(cls, model: EvaluatedModel, measurements: Sequence[Measurement]) -> "Evaluation":
        """The results of the measurements, each in its place."""
        places = {
            RetrievalResult: "retrieval",
            ZeroShot: "zero_shot",
            CaptionTruth: "caption_truth",
            CaptionReport: "captions",
            RejectionResult: "rejection",
        }
        results = {places[type(measurement.details)]: measurement.details for measurement in measurements}
        return cls(model=model.name, fingerprint=model.fingerprint, measurements=tuple(measurements), **results)

    def alone(self) -> Comparison:
        """A comparison of this model with none, for the page."""
        single = ModelMeasurements(model=self.model, fingerprint=self.fingerprint, measurements=self.measurements)
        return compare([single], rng=np.random.default_rng(0))

    def to_json(self) -> dict[str, Any]:
        """The results; of each measurement all but its samples, and its details, which are the results."""
        values = json_values(asdict(replace(self, measurements=())))
        measurements = [measurement.to_json() for measurement in self.measurements]
        for measurement in measurements:
            del measurement["details"]
        return values | {"measurements": measurements}


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
    out_of_distribution: str | Path | None = None,
    captions: Shards | None = None,
    prompt: str = "",
    meteor: bool = False,
    languages: Sequence[str] = (),
    captions_each: int = 0,
    out: str | Path | None = None,
    heat_maps: bool = False,
    workers: int = 1,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    backend: Backend | Literal[""] = "",
) -> Evaluation: ...


@overload
def evaluate(
    model: "ModelLike | Sequence[ModelLike]",
    *,
    suite: str | Path,
    data_root: str | Path = ".",
    features: str | Path | None = None,
    out: str | Path | None = None,
    heat_maps: bool = False,
    workers: int = 1,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    backend: Backend | Literal[""] = "",
) -> SuiteEvaluation: ...


@os_errors_explained()
def evaluate(
    model: "ModelLike | Sequence[ModelLike]",
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
    out_of_distribution: str | Path | None = None,
    captions: Shards | None = None,
    prompt: str = "",
    meteor: bool = False,
    languages: Sequence[str] = (),
    captions_each: int = 0,
    out: str | Path | None = None,
    heat_maps: bool = False,
    workers: int = 1,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    backend: Backend | Literal[""] = "",
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
        out_of_distribution: images of none of these classes; how well they are told apart, and, in `out`, the rule to
            reject by for `Model.classify` (reject.safetensors).
        captions: shards whose images the model captions, beginning with `prompt`; compared with their captions
            (`meteor`: by METEOR, too, which needs Java), or, of synthetic shapes, checked against the scene.
        out: folder for evaluation.json, report.html and the table of each measurement's samples.
        heat_maps: the report shows, beside the images of the worst mistakes, where they match a text; models that are
            named are loaded by torch for it.
        workers: that read and decode, processes for torch and threads for an ONNX export; 0 does it in this one.
        backend: `onnx` is the model's ONNX export (`vlm.export`), which starts without torch and runs on the CPU;
            empty is what VLM_BACKEND says, else `auto`: the export where it is up to date and in float32, there is no
            GPU, and nothing more than unit vectors is asked for (no captions, no features before the projection).

    Raises:
        UsageError: there is nothing to evaluate, or no such model or data.
        VlmError: the model's weights cannot be loaded, or have diverged.
    """
    models = list(model) if isinstance(model, Sequence) and not isinstance(model, str) else [model]
    request = _Request(
        retrieval=join_shards(retrieval) if retrieval else "",
        classes=str(classes or ""),
        captions=join_shards(captions) if captions else "",
        outside=str(out_of_distribution or ""),
    )
    request.check(has_suite=suite is not None, num_models=len(models))
    opening = _Opening(device=device, precision=precision, backend=backend, workers=workers)
    explainers = _explainers(models, opening, out) if heat_maps else []
    if suite is not None:
        return _evaluate_suite(models, str(suite), _Folders.of(data_root, out, features), opening, explainers)
    languages = tuple(text_list(languages, "languages"))
    evaluated = opening.open(models[0], FeatureCache(), needs_network=bool(request.captions))
    sets: dict[str, EvaluationSet] = {}
    measurements: list[Measurement] = []
    for evaluator, data in request.evaluations(
        retrieval=Retrieval(languages=languages, captions_each=captions_each),
        zero_shot=_zero_shot(class_names, text_list(templates, "templates"), class_descriptions),
        label=label,
        scene_captions=CaptionAccuracy(prompt=prompt),
        caption_metrics=CaptionMetrics(prompt=prompt, languages=languages, meteor=meteor),
    ):
        measurement = evaluator.run(evaluated, data)
        if isinstance(evaluator, Rejection) and out is not None:
            logger.info(f"Threshold for vlm classify --reject: {evaluator.write_rule(evaluated, data, Path(out))}")
        for warning in measurement.warnings:
            logger.warning(warning)
        sets[data.name] = data
        measurements.append(measurement)
    measured = Evaluation.of(evaluated, measurements)
    if out is not None:
        _write(Path(out), measured, measured.alone(), sets, explainers)
    return measured


def _zero_shot(
    class_names: str | Path | Sequence[str],
    templates: Sequence[str],
    descriptions: str | Path | Mapping[str, Sequence[str]],
) -> ZeroShotClassification:
    return ZeroShotClassification(
        class_names=str(class_names) if isinstance(class_names, str | Path) else tuple(class_names),
        templates=tuple(templates),
        class_descriptions=str(descriptions) if isinstance(descriptions, Path) else descriptions,
    )


def _rejection(zero_shot: ZeroShotClassification, outside: str) -> Rejection:
    """By the same classes and prompts."""
    return Rejection(
        outside=open_outside(outside),
        class_names=zero_shot.class_names,
        templates=zero_shot.templates,
        class_descriptions=zero_shot.class_descriptions,
    )


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is measured of one model, by the addresses of its data; they are empty where nothing is."""

    retrieval: str
    classes: str
    captions: str
    outside: str

    def check(self, *, has_suite: bool, num_models: int) -> None:
        is_empty = not (self.retrieval or self.classes or self.captions)
        if has_suite and not is_empty:
            raise UsageError("A suite names its data itself: omit --retrieval, --classes and --captions.")
        if is_empty and not has_suite:
            raise UsageError(
                "Nothing to evaluate: give --retrieval SHARDS, --classes FOLDER or --captions SHARDS, or --suite NAME."
            )
        if self.outside and not self.classes:
            raise UsageError("Images out of distribution are told from images of classes: give --classes FOLDER, too.")
        if not num_models:
            raise UsageError("No model is given: vlm eval MODEL [MODEL ...] --suite NAME|FILE.")
        if num_models > 1 and not has_suite:
            raise UsageError(f"{num_models} models are compared by a suite: give --suite NAME|FILE.")

    def evaluations(
        self,
        *,
        retrieval: Retrieval,
        zero_shot: ZeroShotClassification,
        label: str,
        scene_captions: CaptionAccuracy,
        caption_metrics: CaptionMetrics,
    ) -> Iterator[tuple[Evaluator, EvaluationSet]]:
        """Each evaluator with its set, opened when it is its turn."""
        if self.retrieval:
            yield retrieval, open_evaluation_set("::".join(shards_at(self.retrieval)), name=self.retrieval)
        if self.classes:
            data = open_labelled_set(self.classes, label=label, class_names=zero_shot.class_names)
            data = replace(data, name=self.classes)
            yield zero_shot, data
            if self.outside:
                yield _rejection(zero_shot, self.outside), data
        if self.captions:
            data = open_evaluation_set(self.captions)
            # drawn images are checked against their scenes, others compared with their captions
            yield (scene_captions if "scene" in data.metadata[0] else caption_metrics), data


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


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """How models are opened for evaluation."""

    device: str
    precision: Literal["fp32", "bf16"]
    backend: Backend | Literal[""]
    workers: int

    def open(self, model: ModelLike, cache: FeatureCache, *, needs_network: bool) -> EvaluatedModel:
        """The model by torch, or its ONNX export.

        needs_network: more is asked of the model than unit vectors, which are all that an export gives.
        """
        if isinstance(model, Model):
            encoder = model.query_encoder
        else:
            encoder = model
            if isinstance(model, str | Path):
                encoder = load_bulk_encoder(
                    str(model),
                    device=self.device,
                    precision=self.precision,
                    backend=self.backend,
                    needs_network=needs_network,
                )
        return EvaluatedModel(encoder, cache=cache, workers=self.workers)  # pyright: ignore[reportArgumentType]

    def with_network(self, model: ModelLike) -> Model:
        """The model by torch, whatever evaluates it."""
        if isinstance(model, Model):
            return model
        return Model(encoder_of(model, device=self.device, precision=self.precision))


def _explainers(models: Sequence[ModelLike], opening: _Opening, out: str | Path | None) -> list[Explain]:
    """What makes heat maps of each model, which is loaded when the first is asked for."""
    if out is None:
        raise UsageError("heat_maps are shown in the report: give the folder for it, out, too.")
    return [explainer(partial(opening.with_network, model)) for model in models]


def _evaluate_suite(
    models: Sequence[ModelLike],
    suite: str,
    folders: _Folders,
    opening: _Opening,
    explainers: Sequence[Explain],
) -> SuiteEvaluation:
    names = [str(model) for model in models if isinstance(model, str | Path)]
    if len(set(names)) < len(names):
        raise UsageError(f"A model is given twice: {', '.join(names)}; compare different ones.")
    sets = OpenSets(suite=read_suite(suite), root=folders.data, cache=folders.features)
    needs_network = any(entry.needs_network for entry in sets.suite.entries)
    # loaded one after the other, with features of their own: two large ones need not fit into memory together
    evaluated = (opening.open(model, FeatureCache(folders.features), needs_network=needs_network) for model in models)
    evaluation = evaluate_models(evaluated, sets)
    if folders.out is not None:
        _write(folders.out, evaluation, evaluation.comparison, sets.opened, explainers)
    return evaluation


def _write(
    out: Path,
    result: Result,
    comparison: Comparison,
    sets: Mapping[str, EvaluationSet],
    explainers: Sequence[Explain],
) -> None:
    """The figures, the samples and the page. explainers: none, or one for each model of the comparison."""
    out.mkdir(parents=True, exist_ok=True)
    write_samples(out / "samples", comparison.models)
    write_text(out / "evaluation.json", json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n")
    page = out / "report.html"
    by_model = dict(zip((model.model for model in comparison.models), explainers, strict=False))
    write_evaluation_page(comparison, page, sets=sets, provenance=Provenance.current(), explainers=by_model)
    logger.info(f"Report: {page}")


@os_errors_explained()
def caption_metrics(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    images: Images | None = None,
    model: str | Path | Model | None = None,
    meteor: bool = False,
    seed: int = 0,
) -> metrics.CaptionScores:
    """BLEU, ROUGE-L, CIDEr and CIDEr-D of captions, and where asked for METEOR, CLIP score and RefCLIPScore.

    On the words of COCO's tokenizer, whose rules need no Java here. With images and a model, CLIP score is that
    model's; published figures are those of OpenAI's ViT-B/32.

    Args:
        candidates: a caption for each image.
        references: for each image its references, or one.
        images: the images, in the same order. model: MODEL as for `vlm.load`, or a model.
        meteor: compute METEOR, by the Java program that comes with pycocoevalcap.
        seed: of the bootstrap that gives the intervals.

    Raises:
        UsageError: there are no captions, not as many references or images, or METEOR cannot run.

    >>> scores = caption_metrics(["a dog runs", "two cats"], [["a dog runs"], ["a cat", "two cats sleep"]])
    >>> scores.cider_d.value > scores.bleu[3].value
    True
    """
    if (images is None) != (model is None):
        raise UsageError("CLIP score needs images and a model: give both, or neither.")
    scores = metrics.caption_metrics(candidates, references, meteor=meteor, seed=seed)
    if images is None or model is None:
        return scores
    judge = model if isinstance(model, Model) else load(model)
    rows = judge.embed_images(images)
    if len(rows) != len(candidates):
        raise UsageError(f"{len(candidates):,} captions for {len(rows):,} images: give a caption for each.")
    return metrics.add_clip_scores(
        scores, candidates, references, images=rows, embed_texts=judge.embed_texts, seed=seed
    )
