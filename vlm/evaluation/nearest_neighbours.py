"""Classification by the nearest training images: weighted votes of neighbours, and the nearest class mean."""

from dataclasses import dataclass

import numpy as np

from vlm.errors import UsageError
from vlm.evaluation.evaluation_set import EvaluationSet
from vlm.evaluation.features import EvaluatedModel, Layer
from vlm.evaluation.labelled_features import LabelledFeatures, measure_classifier, read_probe_data, unit_rows
from vlm.evaluation.measurement import Measurement
from vlm.tensor_types import Array, Bool, Float, Float32, Float64

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
