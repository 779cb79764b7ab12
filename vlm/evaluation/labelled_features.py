"""Frozen features with class numbers: what classifiers on a frozen image tower learn from and are tested on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.errors import UsageError
from vlm.evaluation.bootstrap import mean_interval
from vlm.evaluation.class_metrics import resampled_class_means
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel, Layer
from vlm.evaluation.measurement import Measurement, Value, mean_of_groups
from vlm.tensor_types import Array, Bool, Float, Float64, Int64

# votes and cosines of equal features differ by the rounding of a matrix product, which depends on the column
_TIE = 1e-6


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures:
    """Feature vectors of images with the numbers of their classes.

    classes: names by number; training and test images share them.
    """

    features: Float[Array, "N D"]
    labels: Int64[Array, " N"]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise UsageError("There is no image with a class to learn from or to test on.")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Int64[Array, " M"]) -> "LabelledFeatures":
        """These rows of it, in this order."""
        return LabelledFeatures(features=self.features[rows], labels=self.labels[rows], classes=self.classes)


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """Training and test images of a classifier. keys: of the test images."""

    train: LabelledFeatures
    test: LabelledFeatures
    keys: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def read_probe_data(model: EvaluatedModel, train: EvaluationSet, test: EvaluationSet, *, layer: Layer) -> ProbeData:
    """Features and class numbers of a training and a test set.

    Raises:
        UsageError: an image has no label or several, a class of the test images has no training image, there are
            fewer than two classes, or the model gives no features of that layer.
        VlmError: features are not finite: the model has diverged.
    """
    # labels are checked before any image is embedded
    train_labels = _single_labels(train)
    test_labels = _single_labels(test)
    # sorted, so that the number of a class does not depend on the order of the images
    classes = tuple(sorted(set(train_labels)))
    unseen = sorted(set(test_labels) - set(classes))
    if unseen:
        raise UsageError(
            f"{len(unseen)} classes of {test.name} have no training image in {train.name}, such as {unseen[0]!r}: a "
            "classifier cannot learn them."
        )
    if len(classes) < 2:
        raise UsageError(
            f"All images of {train.name} are of class {', '.join(classes)!r}: a classifier needs two or more."
        )
    warnings: tuple[str, ...] = ()
    if train.digest == test.digest:
        warnings = ("The training images are the test images, too: nothing is said of other images.",)
    train_set, train_features = model.image_features(train, layer=layer)
    test_set, test_features = model.image_features(test, layer=layer)
    return ProbeData(
        # of the sets that came back: images that cannot be read have gone, and with them the rows have moved
        train=_numbered(train_features, train_set, classes),
        test=_numbered(test_features, test_set, classes),
        keys=test_set.keys,
        warnings=warnings,
    )


def _single_labels(data: EvaluationSet) -> list[str]:
    labels: list[str] = []
    for key, of_image in zip(data.keys, data.true_labels, strict=True):
        if len(of_image) != 1:
            raise UsageError(
                f"{key} of {data.name} has {len(of_image)} classes: classifiers on frozen features need one an image."
            )
        labels.append(of_image[0])
    return labels


def _numbered(features: Float[Array, "N D"], data: EvaluationSet, classes: tuple[str, ...]) -> LabelledFeatures:
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[label] for label in _single_labels(data)], np.int64)
    return LabelledFeatures(features=features, labels=labels, classes=classes)


def class_orders(labels: Int64[Array, " N"], rng: np.random.Generator) -> list[Int64[Array, " M"]]:
    """For each class its images' row numbers in random order: subsets that take the first ones are nested."""
    orders: list[Int64[Array, " M"]] = []
    for number in range(int(labels.max()) + 1):
        orders.append(rng.permutation(np.flatnonzero(labels == number)))
    return orders


def hold_out(
    data: LabelledFeatures, *, share: float, rng: np.random.Generator
) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Training and validation images: of each class its share, at least one image where it has two or more.

    Raises:
        UsageError: no class has two images, or the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise UsageError(f"A validation share of {share:g} leaves nothing to train or to validate on: 0.2 is usual.")
    validation: list[Int64[Array, " M"]] = []
    for order in class_orders(data.labels, rng):
        # a class keeps at least one image to learn from
        size = min(max(1, round(share * len(order))), len(order) - 1)
        validation.append(order[: max(size, 0)])
    rows = np.sort(np.concatenate(validation))
    if not len(rows):
        raise UsageError(
            "No class has two training images, so none can be held out to choose the strength of regularisation: "
            "give it (strength), or more images."
        )
    is_training = np.ones(len(data), np.bool_)
    is_training[rows] = False
    return data.take(np.flatnonzero(is_training)), data.take(rows)


def unit_rows(features: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Each vector divided by its length; vectors of zeros stay."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    # the least positive number, so that nothing but zeros is changed by it
    return features / np.maximum(lengths, np.finfo(features.dtype).tiny)


def is_best(scores: Float[Array, "N K"]) -> Bool[Array, "N K"]:
    """Which classes have an image's highest score; those within a millionth of its largest magnitude are tied."""
    magnitudes = np.where(np.isfinite(scores), np.abs(scores), 0.0)
    # relative, since logits and cosines differ in size by orders of magnitude
    tolerance = _TIE * magnitudes.max(axis=1, keepdims=True)
    return scores >= scores.max(axis=1, keepdims=True) - tolerance


def expected_hits(scores: Float[Array, "N K"], labels: Int64[Array, " N"]) -> Float64[Array, " N"]:
    """Probability that each image's class is the one of the highest score, ties resolved by lot."""
    # a model that says the same of everything gets chance, not the first class for free
    best = is_best(scores)
    return best[np.arange(len(labels)), labels] / best.sum(axis=1)


@dataclass(frozen=True, kw_only=True)
class ClassifierResult:
    """What a classifier on frozen features reached. layer: projected or pooled. settings: of the classifier."""

    layer: Layer
    num_train: int
    num_classes: int
    settings: dict[str, Any]


def measure_classifier(
    name: str,
    data: EvaluationSet,
    probe: ProbeData,
    scores: Float64[Array, "N K"],
    *,
    layer: Layer,
    settings: dict[str, Any],
    rng: np.random.Generator,
    warnings: Sequence[str] = (),
) -> Measurement:
    """Accuracy and mean accuracy per class, with a row for each test image, of the classes' scores."""
    labels = probe.test.labels
    hits = expected_hits(scores, labels)
    accuracy = mean_interval(hits, rng=rng, share=True)
    by_class = [hits[labels == number].mean() for number in np.unique(labels)]
    low, high = np.quantile(resampled_class_means(hits, labels, rng=rng), [0.025, 0.975])
    chance = 1 / len(probe.train.classes)
    names = np.array(probe.train.classes, dtype=object)
    return Measurement(
        evaluator=name,
        data=data.name,
        data_digest=data.digest,
        num_images=len(probe.test),
        values={
            "accuracy": Value(value=accuracy.value, low=accuracy.low, high=accuracy.high, chance=chance),
            "mean_per_class": Value(value=float(np.mean(by_class)), low=float(low), high=float(high), chance=chance),
        },
        samples=pa.table(
            {
                "key": list(probe.keys),
                "accuracy": hits,
                "truth": names[labels].tolist(),
                "prediction": names[scores.argmax(axis=1)].tolist(),
            }
        ),
        statistics={"mean_per_class": mean_of_groups(hits, labels, np.arange(len(hits)))},
        details=ClassifierResult(
            layer=layer, num_train=len(probe.train), num_classes=len(probe.train.classes), settings=settings
        ),
        warnings=(*probe.warnings, *warnings),
    )
