"""Few-shot curves: accuracy of classifiers on frozen features by the number of training images of a class.

Each seed puts the images of every class in an order of its own and takes the first ones, so that the subsets of a seed
are nested. The interval of a point covers both the choice of training images and that of test images: seeds and test
images are drawn again independently (Owen 2007, The pigeonhole bootstrap).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from vlm.errors import UsageError
from vlm.evaluation.bootstrap import Interval, mean_interval, statistic_interval
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel, Layer
from vlm.evaluation.labelled_features import (
    LabelledFeatures,
    class_orders,
    expected_hits,
    hold_out,
    read_probe_data,
)
from vlm.evaluation.linear_probe import fit_linear, search_strength
from vlm.evaluation.measurement import Measurement, Value
from vlm.evaluation.nearest_neighbours import class_mean_cosines, neighbour_votes
from vlm.tensor_types import Array, Float, Float64, Int64

SHOTS = (1, 2, 4, 8, 16)
SHARES = (0.01, 0.1)

FewShotClassifier = Literal["linear", "class-mean", "neighbours"]


@dataclass(frozen=True, kw_only=True)
class SubsetSize:
    """How many training images of each class: `shots`, or a share of them and at least one."""

    shots: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.shots < 0 or not 0 <= self.share <= 1 or (self.shots == 0) == (self.share == 0):
            raise UsageError(
                f"{self.shots} shots or a share of {self.share:g} is no size of a few-shot set: give shots from 1, or "
                "a share above 0 and up to 1."
            )

    @property
    def name(self) -> str:
        """16-shot, 1%."""
        return f"{self.shots}-shot" if self.shots else f"{100 * self.share:g}%"

    def of(self, num_images: int) -> int:
        """The number of a class that has so many."""
        return min(self.shots, num_images) if self.shots else max(1, round(self.share * num_images))


def nested_subset(labels: Int64[Array, " N"], size: SubsetSize, *, seed: int) -> Int64[Array, " M"]:
    """Rows of the subset of a size, in rising order; smaller sizes of the same seed are parts of larger ones."""
    rows: list[Int64[Array, " M"]] = []
    for order in class_orders(labels, np.random.default_rng(seed)):
        rows.append(order[: size.of(len(order))])
    return np.sort(np.concatenate(rows))


def crossed_interval(hits: Float64[Array, "S N"], *, rng: np.random.Generator) -> Interval:
    """Mean over seeds and images with an interval for both: rows and columns are drawn again independently.

    With S seeds the part of the seeds comes out too narrow by √((S - 1) / S).
    """
    per_image = hits.mean(axis=0)
    num_seeds = len(hits)
    if num_seeds == 1 or (hits == hits[0, 0]).all():
        return mean_interval(per_image, rng=rng, share=True)

    def draw(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        seed_weights = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=len(counts)) / num_seeds
        return (counts * (seed_weights @ hits)).sum(axis=1) / counts.sum(axis=1)

    ends = statistic_interval(draw, hits.shape[1], rng=rng)
    return Interval(value=float(per_image.mean()), low=ends.low, high=ends.high)


@dataclass(frozen=True, kw_only=True)
class FewShotPoint:
    """A point of the curve. num_train: training images. strength: λ of linear probes. accuracies: by seed."""

    name: str
    num_train: int
    strength: float | None
    accuracies: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FewShotResult:
    """The curve. num_validation: images on which strengths were chosen, which are no training images."""

    layer: Layer
    classifier: FewShotClassifier
    num_classes: int
    num_validation: int
    points: tuple[FewShotPoint, ...]


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Accuracy by the number of training images, the mean over `seeds` nested choices of them.

    classifier: linear probes, whose strength is chosen once a size with the first seed's images on validation images
        (as CLIP does; without `validation` a fifth of each class's training images, which no subset then contains),
        or the nearest class mean or neighbours, which need none.
    """

    train: EvaluationSet
    validation: EvaluationSet | None = None
    layer: Layer = "pooled"
    classifier: FewShotClassifier = "linear"
    shots: tuple[int, ...] = SHOTS
    shares: tuple[float, ...] = SHARES
    seeds: int = 5

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"few-shot-{self.classifier}-{self.layer}"

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model on test images.

        Raises:
            UsageError: no sizes or seeds. Also as `read_probe_data` and `fit_linear`.
        """
        sizes = self._sizes()
        probe = read_probe_data(model, self.train, data, layer=self.layer)
        train, validation = self._split(model, probe.train)
        points: list[FewShotPoint] = []
        values: dict[str, Value] = {}
        columns: dict[str, Float64[Array, " N"]] = {}
        rng = np.random.default_rng(0)
        for size in sizes:
            point, hits = self._measure(size, train, validation, probe.test)
            interval = crossed_interval(hits, rng=rng)
            points.append(point)
            values[size.name] = Value(
                value=interval.value, low=interval.low, high=interval.high, chance=1 / len(train.classes)
            )
            columns[size.name] = hits.mean(axis=0)
        return Measurement(
            evaluator=self.name,
            data=data.name,
            data_digest=data.digest,
            num_images=len(probe.test),
            values=values,
            samples=pa.table({"key": list(probe.keys), **columns}),
            details=FewShotResult(
                layer=self.layer,
                classifier=self.classifier,
                num_classes=len(train.classes),
                num_validation=0 if validation is None else len(validation),
                points=tuple(points),
            ),
            warnings=(*probe.warnings, *self._small_classes(train)),
        )

    def _sizes(self) -> list[SubsetSize]:
        """From the largest number of shots down, then from the largest share down: the first stands for all."""
        sizes = [SubsetSize(shots=shots) for shots in sorted(set(self.shots), reverse=True)]
        sizes += [SubsetSize(share=share) for share in sorted(set(self.shares), reverse=True)]
        if not sizes or self.seeds < 1:
            raise UsageError(f"{len(sizes)} sizes and {self.seeds} seeds make no curve: give one or more of each.")
        return sizes

    def _split(
        self, model: EvaluatedModel, train: LabelledFeatures
    ) -> tuple[LabelledFeatures, LabelledFeatures | None]:
        if self.classifier != "linear":
            return train, None
        if self.validation is not None:
            return train, read_probe_data(model, self.train, self.validation, layer=self.layer).test
        return hold_out(train, share=0.2, rng=np.random.default_rng(0))

    def _measure(
        self, size: SubsetSize, train: LabelledFeatures, validation: LabelledFeatures | None, test: LabelledFeatures
    ) -> tuple[FewShotPoint, Float64[Array, "S N"]]:
        subsets: list[LabelledFeatures] = []
        for seed in range(self.seeds):
            subsets.append(train.take(nested_subset(train.labels, size, seed=seed)))
        strength = None if validation is None else search_strength(subsets[0], validation)[0].strength
        score = self._scorer(strength)
        hits = np.stack([expected_hits(score(subset, test.features), test.labels) for subset in subsets])
        point = FewShotPoint(
            name=size.name,
            num_train=len(subsets[0]),
            strength=strength,
            accuracies=tuple(hits.mean(axis=1).tolist()),
        )
        return point, hits

    def _scorer(
        self, strength: float | None
    ) -> Callable[[LabelledFeatures, Float[Array, "N D"]], Float64[Array, "N K"]]:
        if strength is not None:
            return lambda subset, features: fit_linear(subset, strength=strength).scores(features)
        return class_mean_cosines if self.classifier == "class-mean" else neighbour_votes

    def _small_classes(self, train: LabelledFeatures) -> tuple[str, ...]:
        smallest = int(np.bincount(train.labels).min())
        largest = max(self.shots, default=0)
        if smallest >= largest:
            return ()
        return (
            f"A class has {smallest} training images, fewer than the {largest} of the largest point: such classes give "
            "all they have.",
        )
