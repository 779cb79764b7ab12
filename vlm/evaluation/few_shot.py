"""Few-shot curves: accuracy of classifiers on frozen features by the number of training images of a class.

Each seed puts the images of every class in an order of its own and takes the first ones, so that the subsets of a seed
are nested. The interval of a point covers both the choice of training images and that of test images: seeds and test
images are drawn again independently (Owen 2007, The pigeonhole bootstrap).

Beside the linear probe these are the nearest training images, by weighted votes, and the nearest class mean.
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
    measure_classifier,
    read_probe_data,
    unit_rows,
)
from vlm.evaluation.linear_probe import fit_linear, search_strength
from vlm.evaluation.measurement import Measurement, Value
from vlm.tensor_types import Array, Bool, Float, Float32, Float64, Int64

# DINO's best on ImageNet (Caron et al. 2021, appendix F), and its temperature, that of Wu et al. 2018
NEIGHBOURS = 20
TEMPERATURE = 0.07
# 64 MB of float32 cosines at once, and a few times that for what is sorted out of them
_COSINES_AT_ONCE = 16_000_000
# cosines of equal images differ by the rounding of the matrix product
_TIE = 1e-6


def neighbour_votes(
    train: LabelledFeatures,
    features: Float[Array, "N D"],
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Float64[Array, "N K"]:
    """For each image the votes for each class of its nearest training images.

    A neighbour's vote counts exp((cosine - 1) / temperature): DINO's exp(cosine / temperature), scaled so that it
    cannot overflow. Images tied for the last places share them, so that the order of the training images is of no
    account. With fewer training images than neighbours all of them vote.

    Raises:
        UsageError: neighbours below 1, or a temperature not above 0.
    """
    if neighbours < 1:
        raise UsageError(f"{neighbours} neighbours cannot vote: give 1 or more; {NEIGHBOURS} are usual.")
    if not temperature > 0:
        raise UsageError(f"A temperature of {temperature:g} is not above 0: {TEMPERATURE} is usual.")
    # transposed once: each block's product then reads memory in order
    candidates = np.ascontiguousarray(unit_rows(train.features.astype(np.float32)).T)
    queries = unit_rows(features.astype(np.float32))
    votes = np.zeros((len(queries), len(train.classes)))
    rows_at_once = max(1, _COSINES_AT_ONCE // len(train))
    for first in range(0, len(queries), rows_at_once):
        cosines = queries[first : first + rows_at_once] @ candidates
        _add_votes(
            votes[first : first + rows_at_once],
            cosines,
            train,
            neighbours=min(neighbours, len(train)),
            temperature=temperature,
        )
    return votes


def _add_votes(
    votes: Float64[Array, "N K"],
    cosines: Float32[Array, "N M"],
    train: LabelledFeatures,
    *,
    neighbours: int,
    temperature: float,
) -> None:
    num_train = cosines.shape[1]
    # a partition, not a sort: the order among the nearest decides nothing
    nearest = np.argpartition(cosines, num_train - neighbours, axis=1)[:, num_train - neighbours :]
    nearest_cosines = np.take_along_axis(cosines, nearest, axis=1)
    last = nearest_cosines.min(axis=1, keepdims=True)
    is_tied = np.abs(cosines - last) <= _TIE
    is_above = nearest_cosines > last + _TIE
    weights = np.exp((nearest_cosines.astype(np.float64) - 1) / temperature)
    places_left = neighbours - is_above.sum(axis=1)
    # only images above the tie vote in full
    rows = np.broadcast_to(np.arange(len(votes))[:, None], nearest.shape)
    np.add.at(votes, (rows[is_above], train.labels[nearest[is_above]]), weights[is_above])
    last_weights = np.exp((last[:, 0].astype(np.float64) - 1) / temperature)
    _share_places(votes, is_tied, train, last_weights * places_left)


def _share_places(
    votes: Float64[Array, "N K"],
    is_tied: Bool[Array, "N M"],
    train: LabelledFeatures,
    weights: Float64[Array, " N"],
) -> None:
    """Share each row's weight among its tied images, mostly a single one."""
    rows, columns = np.nonzero(is_tied)
    shares = weights / is_tied.sum(axis=1)
    np.add.at(votes, (rows, train.labels[columns]), shares[rows])


def class_mean_cosines(train: LabelledFeatures, features: Float[Array, "N D"]) -> Float64[Array, "N K"]:
    """Cosine of each image to each class's mean of unit vectors; -1 for classes without a training image.

    Source: Mensink et al. 2013, Distance-based image classification, with the cosine in place of the distance.
    """
    vectors = unit_rows(train.features.astype(np.float64))
    sums = np.zeros((len(train.classes), vectors.shape[1]))
    np.add.at(sums, train.labels, vectors)
    cosines = unit_rows(features.astype(np.float64)) @ unit_rows(sums).T
    # a zero vector's cosine is 0, which would rank before classes that are really unlike
    cosines[:, np.bincount(train.labels, minlength=len(train.classes)) == 0] = -1.0
    return cosines


@dataclass(frozen=True, kw_only=True)
class NearestNeighbours:
    """Accuracy of the vote of the nearest training images, as DINO measures frozen features.

    train: images to be neighbours. layer: features before (pooled) or after (projected) the projection. seed: of the
    intervals.
    """

    train: EvaluationSet
    layer: Layer = "projected"
    neighbours: int = NEIGHBOURS
    temperature: float = TEMPERATURE
    seed: int = 0

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"nearest-neighbours-{self.layer}"

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model on test images.

        Raises: as `read_probe_data` and `neighbour_votes`.
        """
        probe = read_probe_data(model, self.train, data, layer=self.layer)
        votes = neighbour_votes(
            probe.train, probe.test.features, neighbours=self.neighbours, temperature=self.temperature
        )
        return measure_classifier(
            self.name,
            data,
            probe,
            votes,
            layer=self.layer,
            settings={"neighbours": self.neighbours, "temperature": self.temperature},
            rng=np.random.default_rng(self.seed),
        )


@dataclass(frozen=True, kw_only=True)
class NearestClassMean:
    """Accuracy of choosing the class whose mean training image is nearest by cosine; fields as of NearestNeighbours."""

    train: EvaluationSet
    layer: Layer = "projected"
    seed: int = 0

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"nearest-class-mean-{self.layer}"

    def run(self, model: EvaluatedModel, data: EvaluationSet) -> Measurement:
        """Measure a model on test images.

        Raises: as `read_probe_data`.
        """
        probe = read_probe_data(model, self.train, data, layer=self.layer)
        return measure_classifier(
            self.name,
            data,
            probe,
            class_mean_cosines(probe.train, probe.test.features),
            layer=self.layer,
            settings={},
            rng=np.random.default_rng(self.seed),
        )


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
    # one seed says nothing of seeds; equal hits have the exact interval of a share, where resampling gives width 0
    if num_seeds == 1 or (hits == hits[0, 0]).all():
        return mean_interval(per_image, rng=rng, share=True)

    def draw(counts: Int64[Array, "B N"]) -> Float[Array, " B"]:
        # one draw of seeds for each draw of images: the two factors of the pigeonhole bootstrap
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
        # a fixed seed, so that all sizes and all models are tuned on the same images
        return hold_out(train, share=0.2, rng=np.random.default_rng(0))

    def _measure(
        self, size: SubsetSize, train: LabelledFeatures, validation: LabelledFeatures | None, test: LabelledFeatures
    ) -> tuple[FewShotPoint, Float64[Array, "S N"]]:
        subsets: list[LabelledFeatures] = []
        for seed in range(self.seeds):
            subsets.append(train.take(nested_subset(train.labels, size, seed=seed)))
        # with the first seed's images only: chosen anew for each seed, a search would cost most of the time
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
