"""Captions a model writes: compared with those of real images, or checked fact by fact against drawn scenes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from vlm.console import progress
from vlm.data.samples import select_languages
from vlm.data.synthetic.shape_captions import CaptionCheck, check_caption
from vlm.data.synthetic.shapes import Scene
from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError
from vlm.evaluation.bootstrap import mean_interval
from vlm.evaluation.caption_metrics import CaptionScores, add_clip_scores, bleu_statistics, caption_metrics
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.measurement import Measurement, SampleStatistic, Value, ratio_of
from vlm.results import Result
from vlm.tensor_types import Tensor, UInt8

# of whatever comes, then as many mistakes, which are what a reader looks for
_NUM_CHECKED_EXAMPLES = 8


@runtime_checkable
class Captioner(Protocol):
    """What the check needs of a model."""

    @property
    def view(self) -> EvalTransform:
        """The transform of its images."""
        ...

    def caption_images(self, images: UInt8[Tensor, "B 3 H W"], prompt: str = "") -> list[str]:
        """A caption for each image."""
        ...


@dataclass(frozen=True, kw_only=True)
class CaptionTruth:
    """true: fraction of captions whose every fact is correct. wrong: how often each kind of fact was wrong."""

    true: float
    num_captions: int
    wrong: dict[str, int]
    examples: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class CaptionAccuracy:
    """The share of captions of drawn scenes that are true in every fact.

    prompt: text that each caption begins with. limit: so many scenes, the first ones. seed: of the resampling.
    """

    name: str = "scene-captions"
    prompt: str = ""
    limit: int = 1000
    seed: int = 0

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model.

        Raises:
            UsageError: the model has no caption decoder, or an image is of no drawn scene.
        """
        data = data.select(range(min(self.limit, len(data))))
        for key, metadata in zip(data.keys, data.metadata, strict=True):
            if "scene" not in metadata:
                raise UsageError(
                    f"Sample {key!r} has no scene; only synthetic shapes (vlm pack scenes) can be checked."
                )
        captioner = model.encoder
        if not isinstance(captioner, Captioner) or not getattr(captioner, "can_caption", True):
            raise UsageError(f"{model.name} has no caption decoder; train one, e.g. vlm train tiny-coca.")
        keys: list[str] = []
        captions: list[str] = []
        checks: list[CaptionCheck] = []
        with progress(total=len(data), what=f"captioning {data.name}", unit="image") as bar:
            for batch in data.iter_images(captioner.view):
                images: Any = batch.images
                for row, caption in zip(batch.rows, captioner.caption_images(images, self.prompt), strict=True):
                    keys.append(data.keys[row])
                    captions.append(caption)
                    checks.append(check_caption(caption, Scene(**data.metadata[row]["scene"])))
                bar.update(len(batch.rows))
        if not keys:
            raise UsageError(f"No image to caption in {data.name}: none can be decoded.")
        is_true = np.array([check.is_true for check in checks])
        accuracy = mean_interval(is_true, rng=np.random.default_rng(self.seed))
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(keys),
            values={"accuracy": Value(value=accuracy.value, low=accuracy.low, high=accuracy.high)},
            samples=pa.table(
                {
                    "key": keys,
                    "accuracy": is_true.astype(np.float64),
                    "caption": captions,
                    "reason": [check.reason for check in checks],
                }
            ),
            details=_truth(keys, captions, checks),
        )


def _truth(keys: Sequence[str], captions: Sequence[str], checks: Sequence[CaptionCheck]) -> CaptionTruth:
    wrong: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for key, caption, check in zip(keys, captions, checks, strict=True):
        # a caption that is not of the grammar states no fact that could be wrong, but is not true either
        wrong.update(check.wrong or ([] if check.is_true else ["unreadable"]))
        if len(examples) < _NUM_CHECKED_EXAMPLES or (not check.is_true and len(examples) < 2 * _NUM_EXAMPLES):
            examples.append({"key": key, "caption": caption, "true": check.is_true, "reason": check.reason})
    num_true = sum(check.is_true for check in checks)
    return CaptionTruth(
        true=num_true / len(checks), num_captions=len(checks), wrong=dict(wrong), examples=tuple(examples)
    )


_NUM_EXAMPLES = 16
# a caption that stands for this share of the images is no description of them
_MOST = 0.5


@dataclass(frozen=True, kw_only=True)
class CaptionExample:
    """A caption with the image's references and its CIDEr-D."""

    key: str
    caption: str
    references: tuple[str, ...]
    cider_d: float


@dataclass(frozen=True, kw_only=True)
class CaptionReport(Result):
    """Captions of a model against references.

    scores: without the figures of each image. num_different: unlike captions; a model that says the same of every
    image has one. judge: the model that gave CLIP score and RefCLIPScore. examples: half are the first images, half
    the worst by CIDEr-D.
    """

    scores: CaptionScores
    num_different: int
    judge: str
    examples: tuple[CaptionExample, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionMetrics:
    """Caption the images of a set and compare with their captions: an evaluator.

    prompt: beginning of every caption. languages: of the references, the first of them that an image has; empty takes
    the image's first. meteor: compute METEOR, too. judge: a model for CLIP score and RefCLIPScore; the captioner itself
    unless given, whose figures then say how well its two halves agree, not how good the captions are.
    """

    prompt: str = ""
    languages: tuple[str, ...] = ()
    meteor: bool = False
    judge: EvaluatedModel | None = None
    name: str = "captions"

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model.

        Raises:
            UsageError: the model has no caption decoder, no image has a reference, or METEOR cannot run.
        """
        captioner = model.encoder
        # before images are embedded
        if not isinstance(captioner, Captioner) or not getattr(captioner, "can_caption", True):
            raise UsageError(f"{model.name} has no caption decoder; train one, e.g. vlm train tiny-coca.")
        data, references = self._with_references(data)
        judge = self.judge or model
        data, images = judge.image_features(data)
        references = [references[key] for key in data.keys]
        captions = self._write_captions(captioner, data)

        scores = caption_metrics(captions, references, meteor=self.meteor)
        scores = add_clip_scores(scores, captions, references, images=images, embed_texts=judge.text_features)
        report = CaptionReport(
            scores=replace(scores, per_image={}),
            num_different=len(set(captions)),
            judge=judge.name,
            examples=_examples(data.keys, captions, references, scores.per_image["cider_d"]),
        )
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(data),
            values=_values(scores),
            samples=_samples(data.keys, captions, scores),
            statistics=_statistics(captions, references, scores),
            details=report,
            warnings=(*scores.warnings, *filter(None, [sameness(captions)])),
        )

    def _with_references(self, data: EvaluationSet) -> tuple[EvaluationSet, dict[str, tuple[str, ...]]]:
        references: dict[str, tuple[str, ...]] = {}
        rows: list[int] = []
        for row, (key, captions) in enumerate(zip(data.keys, data.captions, strict=True)):
            try:
                by_language = select_languages(captions, self.languages)
            except BadSample:
                continue
            references[key] = next(iter(by_language.values()))
            rows.append(row)
        if not rows:
            wanted = ", ".join(self.languages) or "any language"
            raise UsageError(f"No image of {data.name} has a caption in {wanted} to compare with.")
        return data.select(rows), references

    def _write_captions(self, captioner: Captioner, data: EvaluationSet) -> list[str]:
        captions: list[str] = []
        with progress(total=len(data), what=f"captioning {data.name}", unit="image") as bar:
            for batch in data.iter_images(captioner.view):
                images: Any = batch.images
                captions += captioner.caption_images(images, self.prompt)
                bar.update(len(batch.rows))
        return captions


def _values(scores: CaptionScores) -> dict[str, Value]:
    """All figures; CIDEr-D, by which captioners are compared, first."""
    figures = scores.figures()
    ordered = {"cider_d": figures.pop("cider_d"), **figures}
    return {name: Value(value=of.value, low=of.low, high=of.high) for name, of in ordered.items()}


def _samples(keys: Sequence[str], captions: Sequence[str], scores: CaptionScores) -> pa.Table:
    columns: dict[str, Sequence[str] | Sequence[float]] = {"key": list(keys), "caption": list(captions)}
    for name, values in scores.per_image.items():
        # of a corpus BLEU and METEOR are no means of the captions'
        is_mean = not name.startswith(("bleu", "meteor"))
        columns[name if is_mean else f"sentence_{name}"] = values
    return pa.table(columns)


def _statistics(
    captions: Sequence[str], references: Sequence[Sequence[str]], scores: CaptionScores
) -> dict[str, SampleStatistic]:
    """The scores of all captions that are no means of each one's."""
    statistics = bleu_statistics(captions, references)
    if scores.meteor is not None:
        each = np.array(scores.per_image["meteor"])
        # it moves with their mean, as its interval does
        shift = scores.meteor.value - each.mean()
        statistics["meteor"] = ratio_of(each + shift, np.ones_like(each))
    return statistics


def _examples(
    keys: Sequence[str], captions: Sequence[str], references: Sequence[Sequence[str]], cider_d: Sequence[float]
) -> tuple[CaptionExample, ...]:
    half = _NUM_EXAMPLES // 2
    worst = sorted(range(half, len(keys)), key=cider_d.__getitem__)[:half]
    examples: list[CaptionExample] = []
    for row in (*range(min(half, len(keys))), *worst):
        examples.append(
            CaptionExample(
                key=keys[row], caption=captions[row], references=tuple(references[row]), cider_d=cider_d[row]
            )
        )
    return tuple(examples)


def sameness(captions: Sequence[str]) -> str:
    """A sentence that names a captioner which says the same of all images, or of most; empty for others.

    >>> sameness(["a dog"] * 3 + ["a cat"])
    "The model says 'a dog' of 75% of 4 images (2 different captions): it has hardly learned to look."
    """
    if len(captions) < 2:
        return ""
    caption, count = Counter(captions).most_common(1)[0]
    if count == len(captions):
        return (
            f"The model says the same of every image ({caption!r}): it has learned the commonest caption, not to look."
        )
    share = count / len(captions)
    if share < _MOST:
        return ""
    return (
        f"The model says {caption!r} of {share:.0%} of {len(captions):,} images ({len(set(captions)):,} different "
        "captions): it has hardly learned to look."
    )
