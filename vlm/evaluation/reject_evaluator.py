"""How well a model tells images of its classes from images of none of them, and the rule to reject by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm.data.sources.source import SourceOptions
from vlm.data.sources.source_registry import holds_shards
from vlm.errors import UsageError
from vlm.evaluation.class_metrics import every_other_of_class, rank_classes
from vlm.evaluation.class_vectors import class_numbers, class_texts
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedModel
from vlm.evaluation.measurement import Measurement, SampleStatistic, Value, figure_of_two_groups
from vlm.evaluation.rejection import (
    PASS_RATE,
    REJECT_RULE_FILE,
    RejectRule,
    RejectScore,
    Separation,
    fit_whitened_lda,
    measure_separation,
    num_resamples_of,
    resampled_separations,
    write_reject_rule,
)
from vlm.evaluation.wiring_checks import is_at_chance
from vlm.evaluation.zero_shot import text_classifier
from vlm.tensor_types import Array, Float, Float32, Int

_SCORES: tuple[RejectScore, ...] = ("similarity", "whitened-lda")


def open_outside(url: str) -> EvaluationSet:
    """Images of none of the classes: shards, or whatever `vlm pack` reads, without labels or captions.

    Raises:
        UsageError: there is no image.
    """
    return open_evaluation_set(url, options=None if holds_shards(url) else SourceOptions(captions="none"))


@dataclass(frozen=True, kw_only=True)
class RejectionResult:
    """Separation by each score; whitened_lda is None where there are too few images of classes to fit it.

    num_inside: images of the classes; whitened LDA is fitted to num_fitted of them and measured on the others.
    """

    similarity: Separation
    whitened_lda: Separation | None
    num_inside: int
    num_outside: int
    num_fitted: int
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Rejection of images that are of none of the classes, by two scores.

    similarity: cosine with the nearest class. whitened-lda: distances in the space of the images themselves (WDiscOOD),
    fitted to every other image of each class by label, or where there are no labels by prediction.

    outside: images of none of the classes. The other settings are those of `ZeroShotClassification`.
    """

    name: str = "rejection"
    outside: EvaluationSet
    class_names: str | tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    class_descriptions: str | Mapping[str, Sequence[str]] = ""
    seed: int = 0

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model on images of the classes; raises as `measure`."""
        return self.measure(model, data)[0]

    def rule(self, model: EvaluatedModel, data: EvaluationSet) -> RejectRule:
        """The rule by the better of the scores; raises as `measure`."""
        return self.measure(model, data)[1]

    def write_rule(self, model: EvaluatedModel, data: EvaluationSet, out: Path) -> Path:
        """Write the rule into a folder; its file. Raises as `measure`."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / REJECT_RULE_FILE
        write_reject_rule(self.rule(model, data), path)
        return path

    def measure(self, model: EvaluatedModel, data: EvaluationSet) -> tuple[Measurement, RejectRule]:
        """The measurement, and the rule by the better of the scores.

        Raises:
            UsageError: there are no class names; a template has no {}; a class has no description.
        """
        scored = self._score(model, data)
        rng = np.random.default_rng(self.seed)
        separations: dict[RejectScore, Separation] = {}
        values: dict[str, Value] = {}
        for score, (inside, outside) in scored.scores.items():
            separations[score] = measure_separation(inside, outside)
            values |= _values(score, separations[score], resampled_separations(inside, outside, rng=rng))
        # by AUROC, which needs no threshold; the threshold comes from the better score only
        best = max(separations, key=lambda score: separations[score].auroc)
        rule = replace(scored.rule, score=best, threshold=separations[best].threshold)
        details = RejectionResult(
            similarity=separations["similarity"],
            whitened_lda=separations.get("whitened-lda"),
            num_inside=len(scored.inside),
            num_outside=len(scored.outside),
            num_fitted=int(scored.is_fitted.sum()),
            num_classes=len(scored.rule.classes),
        )
        measurement = Measurement(
            evaluator=self.name,
            data=scored.inside.name,
            data_digest=scored.inside.digest,
            num_images=len(scored.inside) + len(scored.outside),
            values=values,
            samples=_samples(scored),
            statistics=_statistics(scored),
            details=details,
            warnings=tuple(_warnings(values, scored)),
        )
        return measurement, rule if best == "whitened-lda" else replace(rule, lda=None)

    def _score(self, model: EvaluatedModel, data: EvaluationSet) -> "_Scored":
        # templates of a set are not what was asked for where descriptions are
        templates = self.templates or (() if self.class_descriptions else data.templates)
        class_names = self.class_names or data.class_names or tuple(data.candidates)
        texts = class_texts(class_names, templates, self.class_descriptions)
        classifier = text_classifier(model, texts[0])
        data, images = model.image_features(data)
        others, other_images = model.image_features(self.outside)
        prediction, similarity = _nearest(images, classifier)
        other_similarity = _nearest(other_images, classifier)[1]
        truth = prediction
        if data.labels is not None:
            # of several classes the first; an image without any counts as what it is taken for
            numbers = class_numbers(data.labels, texts, data.class_names)
            labelled = zip(numbers, prediction.tolist(), strict=True)
            truth = np.asarray([classes[0] if classes else predicted for classes, predicted in labelled])
        rule = RejectRule(threshold=0.0, fingerprint=model.fingerprint, classes=texts[0].names)
        scores: dict[RejectScore, tuple[np.ndarray, np.ndarray]] = {"similarity": (similarity, other_similarity)}
        # half of each class: distances of images that a covariance was fitted to come out too small
        is_fitted = every_other_of_class(truth)
        try:
            rule = replace(rule, lda=fit_whitened_lda(images[is_fitted], truth[is_fitted]))
            held_out = rule.scores(images[~is_fitted], similarity[~is_fitted])
            scores["whitened-lda"] = (held_out, rule.scores(other_images, other_similarity))
        # too few images of classes for a covariance: similarity alone is measured, and the report says so
        except UsageError:
            is_fitted = np.zeros(len(images), bool)
        return _Scored(inside=data, outside=others, scores=scores, is_fitted=is_fitted, rule=rule)


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """Both sets with their scores: inside and outside by name. is_fitted: images inside that whitened LDA has seen."""

    inside: EvaluationSet
    outside: EvaluationSet
    scores: dict[RejectScore, tuple[Float[Array, " A"], Float[Array, " M"]]]
    is_fitted: Array
    rule: RejectRule


def _nearest(
    images: Float32[Array, "N D"], classifier: Float32[Array, "K D"]
) -> tuple[Int[Array, " N"], Float[Array, " N"]]:
    """The class each image is taken for, and the cosine with it."""
    # no truths: only the nearest class and its cosine are wanted
    ranking = rank_classes(images, classifier, [[]] * len(images))
    return ranking.prediction, ranking.similarity.astype(np.float64)


def _values(score: RejectScore, separation: Separation, draws: tuple[np.ndarray, np.ndarray]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    # a score that tells nothing lets as many of the others pass
    for name, chance, drawn in (("auroc", 0.5, draws[0]), ("fpr_at_95_tpr", PASS_RATE, draws[1])):
        low, high = np.quantile(drawn, [0.025, 0.975])
        value = getattr(separation, name)
        values[f"{score.replace('-', '_')}_{name}"] = Value(
            value=value, low=float(low), high=float(high), chance=chance
        )
    return values


def _samples(scored: _Scored) -> pa.Table:
    """A row for each image, those outside behind; whitened_lda is null for images it was fitted to."""
    num_outside = len(scored.outside)
    keys = [*scored.inside.keys, *(f"outside: {key}" for key in scored.outside.keys)]
    columns: dict[str, pa.Array] = {
        "key": pa.array(keys),
        "inside": pa.array([True] * len(scored.inside) + [False] * num_outside),
        "similarity": pa.array(np.concatenate(scored.scores["similarity"])),
    }
    if "whitened-lda" in scored.scores:
        inside, outside = scored.scores["whitened-lda"]
        column = np.zeros(len(scored.inside))
        column[~scored.is_fitted] = inside
        # null, not a number, for images the score was fitted to: they must not enter a figure
        is_unknown = np.append(scored.is_fitted, np.zeros(num_outside, bool))
        columns["whitened_lda"] = pa.array(np.append(column, outside), mask=is_unknown)
    return pa.table(columns)


def _statistics(scored: _Scored) -> dict[str, SampleStatistic]:
    """All values, none of which is a mean over the rows of `_samples`."""
    num_inside = len(scored.inside)
    num_outside = len(scored.outside)
    is_outside = np.arange(num_inside + num_outside) >= num_inside
    statistics: dict[str, SampleStatistic] = {}
    for score, (inside, outside) in scored.scores.items():
        is_held_out = ~is_outside
        if score == "whitened-lda":
            is_held_out[:num_inside] &= ~scored.is_fitted
        column = np.zeros(len(is_outside))
        column[is_held_out] = inside
        column[is_outside] = outside
        for name in ("auroc", "fpr_at_95_tpr"):
            statistics[f"{score.replace('-', '_')}_{name}"] = figure_of_two_groups(
                partial(_figure, name), column, is_held_out, is_outside, resamples=num_resamples_of(len(column))
            )
    return statistics


def _figure(name: str, inside: Float[Array, " N"], outside: Float[Array, " M"]) -> float:
    return float(getattr(measure_separation(inside, outside), name))


def _warnings(values: Mapping[str, Value], scored: _Scored) -> list[str]:
    warnings: list[str] = []
    for score in _SCORES:
        value = values.get(f"{score.replace('-', '_')}_auroc")
        if value and is_at_chance(value.low, value.chance):
            warnings.append(
                f"The {score} of {scored.inside.name} does not tell it from {scored.outside.name} (AUROC "
                f"{value.value:.3f}): no threshold on it rejects."
            )
    if "whitened-lda" not in scored.scores:
        warnings.append(
            "Whitened LDA is left out: it needs two classes or more, and of a class several images that differ."
        )
    return warnings
