"""Zero-shot classification: prompts of the class names act as the classifier (CLIP §3.1.2)."""

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm.data.sources.source import SourceOptions
from vlm.data.sources.source_registry import holds_shards, open_source
from vlm.errors import UsageError
from vlm.evaluation.bootstrap import Interval, mean_interval, statistic_interval
from vlm.evaluation.class_metrics import (
    Calibration,
    ClassRanking,
    ConfusionPair,
    LabelSets,
    average_precisions,
    calibration_bins,
    calibration_interval,
    chance_of_hit,
    class_means,
    confusion_pairs,
    label_matrix,
    measure_calibration,
    rank_classes,
    resampled_class_means,
)
from vlm.evaluation.class_vectors import ClassTexts, class_numbers, class_texts, class_vectors
from vlm.evaluation.evaluation_set import EvaluationSet, open_evaluation_set
from vlm.evaluation.features import EvaluatedEncoder, EvaluatedModel
from vlm.evaluation.measurement import Measurement, SampleStatistic, Value, mean_of_groups, sum_of_gaps
from vlm.evaluation.wiring_checks import USUAL_ERRORS, ClassWiring, check_classes, is_at_chance
from vlm.tensor_types import Array, Float, Float32, Int64

logger = logging.getLogger(__name__)

_CONFUSIONS_KEPT = 50
# resamples of mAP sort nothing again, but add up as many numbers as there are images and classes
_AVERAGE_PRECISION_NUMBERS = 200_000_000


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """One class: its images, and the fraction of them classified correctly."""

    name: str
    num_images: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class LanguageAccuracy:
    """Accuracies with the class names and templates of one language."""

    language: str
    top1: float
    top5: float
    num_prompts: int


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Accuracies in [0, 1].

    An image of several classes is right with any of them, one without any does not count (num_unlabelled). classes:
    those with images. mean_per_class weighs them all equally. majority: accuracy of always naming the largest.
    calibration: of the probabilities at the model's temperature. confusion: the most frequent mistakes.
    mean_average_precision: over the classes with images, of all images ranked by each; where images have several.
    languages: where class names were given in several; all other figures are of the first.
    """

    top1: float
    top5: float
    mean_per_class: float
    majority: float
    num_images: int
    num_classes: int
    classes: tuple[ClassScore, ...]
    num_unlabelled: int = 0
    num_prompts: int = 0
    mean_average_precision: float | None = None
    calibration: Calibration | None = None
    confusion: tuple[ConfusionPair, ...] = ()
    languages: tuple[LanguageAccuracy, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ZeroShotClassification:
    """Zero-shot classification of a set with labels.

    class_names: candidate classes as names, `a,b,c`, a file with one per line, `imagenet`, or a JSON file with a list
        for each language; empty takes those of the set.
    templates: prompts with {} for the name, files of them, names of sets such as `openai`, or a JSON file with a list
        for each language; empty takes those that came with the set, else three common ones.
    class_descriptions: sentences by class name, or a JSON file of them; prompts beside the templates given, or alone.
    seed: of the resampling for intervals.
    """

    name: str = "zero-shot"
    class_names: str | tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    class_descriptions: str | Mapping[str, Sequence[str]] = ""
    seed: int = 0

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model.

        Raises:
            UsageError: the images have no labels, or other ones than the candidates; a template has no {}; a class has
                no description.
        """
        # templates of a set are not what was asked for where descriptions are
        templates = self.templates or (() if self.class_descriptions else data.templates)
        # the set's own list also has classes without an image, which make the task harder
        class_names = self.class_names or data.class_names or tuple(data.candidates)
        languages = class_texts(class_names, templates, self.class_descriptions)
        data, images = model.image_features(data)
        truths = class_numbers(data.true_labels, languages, data.class_names)
        if not any(truths):
            raise UsageError("There is no image with a class to evaluate on.")
        classified: list[_Classified] = []
        # images are embedded once; a language costs only its texts
        for texts in languages:
            classifier = text_classifier(model, texts)
            ranking = rank_classes(images, classifier, truths, logit_scale=model.logit_scale)
            classified.append(_Classified(texts=texts, classifier=classifier, ranking=ranking))
        rng = np.random.default_rng(self.seed)
        values = _values(classified, truths, rng)
        precision = None
        if is_multi_label(truths):
            precision = _mean_average_precision(images, classified[0], truths, rng)
            values = {MEAN_AVERAGE_PRECISION: precision} | values
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(data),
            values=values,
            samples=_samples(data, classified),
            statistics=_statistics(images, classified[0], truths),
            details=_details(classified, truths, precision.value if precision else None),
            warnings=tuple(_warnings(images, classified[0], values)),
        )


@dataclass(frozen=True, kw_only=True)
class _Classified:
    """What the classifier of a language makes of the images."""

    texts: ClassTexts
    classifier: Float32[Array, "K D"]
    ranking: ClassRanking


MEAN_AVERAGE_PRECISION = "mean_average_precision"


def is_multi_label(truths: LabelSets) -> bool:
    """Whether some image is of several classes, or of none."""
    return any(len(classes) != 1 for classes in truths)


def text_classifier(model: EvaluatedModel, texts: ClassTexts) -> Float32[Array, "K D"]:
    """A unit vector per class: the mean of the unit vectors of its prompts.

    The mean instead of the vector of one prompt: +3.5 points on ImageNet (CLIP §3.1.4).
    """
    return class_vectors(model.text_features(list(chain.from_iterable(texts.prompts))), list(map(len, texts.prompts)))


def _values(classified: Sequence[_Classified], truths: LabelSets, rng: np.random.Generator) -> dict[str, Value]:
    first = classified[0].ranking
    num_classes = len(classified[0].texts.names)
    values: dict[str, Value] = {}
    for result in classified:
        for k in (1, 5):
            chance = chance_of_hit(truths, num_classes, k)
            # among five classes or fewer, all are right at 5
            if chance < 1 or k == 1:
                name = _by_language(f"top{k}", result.texts.language, is_first=result is classified[0])
                values[name] = _value(mean_interval(result.ranking.hits(k), rng=rng, share=True), chance)
    if is_multi_label(truths):
        return values
    draws = resampled_class_means(first.hits(1), first.truth, rng=rng)
    mean = float(np.mean([score.accuracy for score in _class_scores(first, truths, classified[0].texts.names)]))
    low, high = np.quantile(draws, [0.025, 0.975])
    # no draw differs from a perfect score, and the interval is then that of as many images
    is_certain = mean in (0.0, 1.0)
    values["mean_per_class"] = Value(
        value=mean,
        low=values["top1"].low if is_certain else float(low),
        high=values["top1"].high if is_certain else float(high),
        chance=1 / num_classes,
    )
    hits = first.hits(1)
    low, high = calibration_interval(first.probability, hits, rng=rng)
    error = measure_calibration(first.probability, hits).error
    values["calibration_error"] = Value(value=error, low=low, high=high)
    return values


def _value(interval: Interval, chance: float | None) -> Value:
    return Value(value=interval.value, low=interval.low, high=interval.high, chance=chance)


def _by_language(name: str, language: str, *, is_first: bool) -> str:
    return name if is_first else f"{name}/{language}"


def _statistics(images: Float32[Array, "N D"], result: _Classified, truths: LabelSets) -> dict[str, SampleStatistic]:
    """The values that are no means over images."""
    if is_multi_label(truths):
        return {MEAN_AVERAGE_PRECISION: _precision_statistic(images, result, truths)}
    ranking = result.ranking
    hits = ranking.hits(1)
    rows = np.arange(len(hits))
    gaps = ranking.probability - hits
    return {
        "mean_per_class": mean_of_groups(hits, ranking.truth, rows),
        "calibration_error": sum_of_gaps(gaps, calibration_bins(ranking.probability), rows),
    }


def _mean_average_precision(
    images: Float32[Array, "N D"], result: _Classified, truths: LabelSets, rng: np.random.Generator
) -> Value:
    statistic = _precision_statistic(images, result, truths)
    interval = statistic_interval(statistic.of_counts, len(images), rng=rng, resamples=statistic.resamples)
    num_present = int(label_matrix(truths, len(result.texts.names)).any(axis=0).sum())
    # equal scores give the share of the positives
    chance = sum(map(len, truths)) / (len(images) * num_present)
    return _value(interval, chance)


def _precision_statistic(images: Float32[Array, "N D"], result: _Classified, truths: LabelSets) -> SampleStatistic:
    # a class without images has no precision, so it is left out of the mean
    present = np.flatnonzero(label_matrix(truths, len(result.texts.names)).any(axis=0))
    number_of = {number: position for position, number in enumerate(present.tolist())}
    of_present = [list(map(number_of.__getitem__, classes)) for classes in truths]

    def statistic(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        precisions = average_precisions(images, result.classifier[present], of_present, counts)
        # a resample may lack all images of a rare class
        return np.nanmean(precisions, axis=1)

    resamples = int(np.clip(_AVERAGE_PRECISION_NUMBERS // (len(images) * len(present)), 100, 1000))
    return SampleStatistic(of_counts=statistic, resamples=resamples)


def _class_scores(ranking: ClassRanking, truths: LabelSets, names: Sequence[str]) -> tuple[ClassScore, ...]:
    accuracies, totals = class_means(ranking.ranks.hits(1), truths, len(names))
    scores: list[ClassScore] = []
    # a class without images has no accuracy, and none may enter the mean per class
    for number in np.flatnonzero(totals).tolist():
        accuracy = float(accuracies[number])
        scores.append(ClassScore(name=names[number], num_images=int(totals[number]), accuracy=accuracy))
    return tuple(scores)


def _details(classified: Sequence[_Classified], truths: LabelSets, precision: float | None) -> ZeroShot:
    first = classified[0].ranking
    texts = classified[0].texts
    classes = _class_scores(first, truths, texts.names)
    has_truth = first.has_truth
    languages: list[LanguageAccuracy] = []
    for result in classified:
        top1, top5 = (float(result.ranking.hits(k).mean()) for k in (1, 5))
        languages.append(
            LanguageAccuracy(language=result.texts.language, top1=top1, top5=top5, num_prompts=result.texts.num_prompts)
        )
    return ZeroShot(
        top1=languages[0].top1,
        top5=languages[0].top5,
        mean_per_class=float(np.mean([score.accuracy for score in classes])),
        majority=max(score.num_images for score in classes) / int(has_truth.sum()),
        num_images=int(has_truth.sum()),
        num_classes=len(texts.names),
        classes=classes,
        num_unlabelled=int((~has_truth).sum()),
        num_prompts=texts.num_prompts,
        mean_average_precision=precision,
        calibration=measure_calibration(first.probability[has_truth], first.hits(1)),
        confusion=confusion_pairs(
            first.truth[has_truth], first.prediction[has_truth], texts.names, limit=_CONFUSIONS_KEPT
        ),
        languages=tuple(languages) if len(languages) > 1 else (),
    )


def _samples(data: EvaluationSet, classified: Sequence[_Classified]) -> pa.Table:
    """A row for each image: what it is, what it was taken for, and how right that is.

    truth: the right class that scores highest; labels: all of them, where images have several or none.
    rank: of the best right class, from 1, equals in expectation. top1, top5: probability of a right class among so
    many; null where there is none. correct: whether the prediction, the first of equals, is right.
    """
    first = classified[0].ranking
    names = classified[0].texts.names
    columns: dict[str, pa.Array] = {
        "key": pa.array(data.keys),
        "truth": pa.array([names[number] if number >= 0 else None for number in first.truth.tolist()], pa.string()),
        "prediction": pa.array([names[number] for number in first.prediction.tolist()]),
        "probability": pa.array(first.probability),
        "similarity": pa.array(first.similarity),
        "rank": pa.array(first.ranks.expected().astype(np.float64), mask=~first.has_truth),
        "correct": pa.array(first.prediction == first.truth, mask=~first.has_truth),
    }
    for result in classified:
        for k in (1, 5):
            name = _by_language(f"top{k}", result.texts.language, is_first=result is classified[0])
            columns[name] = pa.array(result.ranking.ranks.hits(k), mask=~first.has_truth)
    if any(len(labels) != 1 for labels in data.true_labels):
        columns["labels"] = pa.array(data.true_labels, pa.list_(pa.string()))
    return pa.table(columns)


def _warnings(images: Float32[Array, "N D"], result: _Classified, values: Mapping[str, Value]) -> list[str]:
    names = result.texts.names
    warnings: list[str] = []
    if all(map(str.isdecimal, names)):
        warnings.append(
            f"The classes have numbers for names ({', '.join(names[:4])}{', …' if len(names) > 4 else ''}), and the "
            "prompts are made of these; give their names by --class-names FILE, one per line in order of the numbers."
        )
    # the mean per class, since a model that always names the largest class may be far above chance otherwise
    figure = next(name for name in ("mean_per_class", MEAN_AVERAGE_PRECISION) if name in values)
    value = values[figure]
    if len(names) < 2 or not is_at_chance(value.low, value.chance):
        return warnings
    ranking = result.ranking
    wiring = ClassWiring(
        images=images[ranking.has_truth],
        classifier=result.classifier,
        truth=ranking.truth[ranking.has_truth],
        prediction=ranking.prediction[ranking.has_truth],
        lowest=ranking.lowest[ranking.has_truth],
        names=names,
    )
    problems = check_classes(wiring)
    label = figure.replace("_", " ")
    said = "; ".join(problems) if problems else f"none of the usual errors shows in the embeddings ({USUAL_ERRORS})"
    warnings.append(f"The {label} of {value.value:.1%} is no better than chance ({value.chance:.1%}): {said}.")
    return warnings


def measure_zero_shot(
    batches: Iterable[tuple[Float32[Array, "B D"], Sequence[str]]],
    classifier: Float32[Array, "K D"],
    names: Sequence[str],
    *,
    logit_scale: float = 1.0,
) -> ZeroShot:
    """Accuracy of nearest-class classification of embedded images with their true class names.

    logit_scale: for the calibration.

    Raises:
        UsageError: there is no image, or a true class is not among the names.
    """
    vectors: list[np.ndarray] = []
    labels: list[str] = []
    for images, of_images in batches:
        vectors.append(images)
        labels += of_images
    if not labels:
        raise UsageError("There is no image with a class to evaluate on.")
    texts = ClassTexts(
        language="", class_list=tuple(names), names=tuple(names), prompts=tuple((name,) for name in names)
    )
    truths = class_numbers([[label] for label in labels], [texts])
    ranking = rank_classes(np.concatenate(vectors), classifier, truths, logit_scale=logit_scale)
    return _details([_Classified(texts=texts, classifier=classifier, ranking=ranking)], truths, None)


def open_labelled_set(url: str, *, label: str, class_names: str | Sequence[str] = ()) -> EvaluationSet:
    """Images with their classes.

    url: shards, whose `label` is read from each sample's metadata, or for `cls` from its KEY.cls; or anything
        `vlm pack` reads: class folders, also inside a tar, or a table with the label in a column.
    class_names: as of `ZeroShotClassification`; names by number for KEY.cls that holds numbers.

    Raises:
        UsageError: the metadata has no such label, the folder has no classes, or a number has no name.
    """
    class_list = class_texts(class_names)[0].class_list if class_names else ()
    if holds_shards(url):
        return open_evaluation_set(url, label=label, class_names=class_list)
    # what is no source of a known kind is tried as class folders next, and their error says what was expected
    with contextlib.suppress(UsageError):
        if open_source(url).describe()["kind"] == "table":
            return open_evaluation_set(url, label=label)
    return open_evaluation_set(url, options=SourceOptions(kind="classes"))


def evaluate_zero_shot(
    model: EvaluatedEncoder,
    url: str,
    *,
    label: str = "label",
    names: str | Path | Sequence[str] = (),
    templates: Sequence[str] = (),
    descriptions: str | Path | Mapping[str, Sequence[str]] = "",
    workers: int = 0,
) -> ZeroShot:
    """Zero-shot accuracy on labelled images.

    url, label: as of `open_labelled_set`. names: candidate classes, by number for KEY.cls; a name given twice is one
    class. Empty uses `classnames.txt` next to shards with KEY.cls, or one folder up, else those of the images.
    templates: as of `ZeroShotClassification`; empty uses CLIP_benchmark's file of them in these places, else three of
    ours. descriptions: its class_descriptions.

    Raises: as of these.
    """
    class_names = str(names) if isinstance(names, str | Path) else tuple(names)
    data = open_labelled_set(url, label=label, class_names=class_names)
    evaluator = ZeroShotClassification(
        class_names=class_names,
        templates=tuple(templates),
        class_descriptions=str(descriptions) if isinstance(descriptions, Path) else descriptions,
    )
    measurement = evaluator.run(EvaluatedModel(model, workers=workers), data)
    for warning in measurement.warnings:
        logger.warning(warning)
    assert isinstance(measurement.details, ZeroShot)
    return measurement.details
