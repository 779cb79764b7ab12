"""Telling images of none of the classes: a score for each, how well it separates, and the threshold to reject by."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vlm.errors import UsageError
from vlm.files import write_bytes
from vlm.tensor_types import Array, Float, Float32, Int

RejectScore = Literal["similarity", "whitened-lda"]

# of the images of the classes, how many a threshold lets pass: the 95% of "FPR at 95% TPR"
PASS_RATE = 0.95
# share of the variance that is added to the covariance within classes, which has more dimensions than images often
_SHRINKAGE = 1e-2
# of unit vectors; what rounding alone gives is a millionth of it
_LEAST_VARIANCE = 1e-8
# scores that are drawn for intervals, which takes some ten seconds
_MOST_NUMBERS = 100_000_000
_FORMAT = "1"
REJECT_RULE_FILE = "reject.safetensors"


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How well a score tells images of the classes from images of none of them.

    auroc: chance that an image of the classes scores higher than one of none, equals as half. fpr_at_95_tpr: share of
    the images of none that pass the threshold that 95% of the images of the classes pass. threshold: that one; below it
    an image is rejected.
    """

    auroc: float
    fpr_at_95_tpr: float
    threshold: float


def measure_separation(inside: Float[Array, " N"], outside: Float[Array, " M"]) -> Separation:
    """Separation of scores of images of the classes (inside) and of none (outside), higher for those inside."""
    threshold = pass_threshold(inside)
    return Separation(
        auroc=float(placements(inside, outside).mean()),
        fpr_at_95_tpr=float((outside >= threshold).mean()),
        threshold=threshold,
    )


def pass_threshold(inside: Float[Array, " N"], *, pass_rate: float = PASS_RATE) -> float:
    """The highest threshold that at least this share of the scores reaches."""
    ordered = np.sort(inside)[::-1]
    # without the tolerance 0.95 × 100 would be 95.00000000000001, and one more image would pass
    return float(ordered[int(np.ceil(pass_rate * len(ordered) - 1e-9)) - 1])


def placements(scores: Float[Array, " N"], others: Float[Array, " M"]) -> Float[Array, " N"]:
    """For each score the share of the others below it, equals as half; their mean is the AUROC."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, scores, side="left")
    not_above = np.searchsorted(ordered, scores, side="right")
    return (below + not_above) / (2 * len(others))


def resampled_separations(
    inside: Float[Array, " N"], outside: Float[Array, " M"], *, rng: np.random.Generator, num_resamples: int = 0
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """AUROC and FPR at 95% TPR of resamples of both sets of images.

    num_resamples: 0 takes 1,000, of large sets fewer.
    """
    num_resamples = num_resamples or num_resamples_of(len(inside) + len(outside))
    auroc = np.empty(num_resamples)
    fpr = np.empty(num_resamples)
    for number in range(num_resamples):
        some_inside = inside[rng.integers(len(inside), size=len(inside))]
        some_outside = outside[rng.integers(len(outside), size=len(outside))]
        separation = measure_separation(some_inside, some_outside)
        auroc[number] = separation.auroc
        fpr[number] = separation.fpr_at_95_tpr
    return auroc, fpr


def num_resamples_of(num_images: int) -> int:
    """As many as take some seconds: 1,000, of large sets fewer."""
    return int(np.clip(_MOST_NUMBERS // num_images, 100, 1000))


@dataclass(frozen=True, kw_only=True)
class WhitenedLda:
    """Distances in a space where classes separate, and in the rest (WDiscOOD, Chen et al. 2023, §3).

    Features are whitened by the covariance within classes. In the discriminant subspace, spanned by the directions in
    which the means of the classes differ most, an image of a class lies near its mean; in the residual subspace, where
    all classes coincide, it lies near the mean of all. Both distances are Euclidean.

    whitening: [D, D]. discriminants: orthonormal, one a row. class_means: in the discriminant subspace. centre: in the
    whitened space. residual_weight: of the second distance; the paper takes 1 for vision transformers.
    """

    whitening: Float32[Array, "D D"]
    discriminants: Float32[Array, "R D"]
    class_means: Float32[Array, "K R"]
    centre: Float32[Array, " D"]
    residual_weight: float = 1.0

    def scores(self, images: Float32[Array, "N D"]) -> Float[Array, " N"]:
        """The negative weighted sum of both distances: the lower, the less an image is of any class."""
        discriminant, residual = self.distances(images)
        return -(discriminant + self.residual_weight * residual)

    def distances(self, images: Float32[Array, "N D"]) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
        """To the nearest mean of a class in the discriminant subspace, and to the mean of all in the residual one."""
        whitened = images @ self.whitening
        projected = whitened @ self.discriminants.T
        # |a - b|² = |a|² - 2ab + |b|²: no array of images by classes by dimensions
        squares = (projected**2).sum(axis=1, keepdims=True) + (self.class_means**2).sum(axis=1)
        nearest = (squares - 2 * projected @ self.class_means.T).min(axis=1)
        centred = whitened - self.centre
        along = centred @ self.discriminants.T
        residual = centred - along @ self.discriminants
        return np.sqrt(np.maximum(nearest, 0)), np.linalg.norm(residual, axis=1)


def fit_whitened_lda(
    images: Float32[Array, "N D"],
    classes: Int[Array, " N"],
    *,
    num_discriminants: int | None = None,
    residual_weight: float = 1.0,
) -> WhitenedLda:
    """Fit to images of the classes, each with its class (or the one predicted).

    num_discriminants: dimensions of the discriminant subspace; at most one less than classes, beyond which their means
    do not differ, and by default at most two thirds of all, as in the paper's experiments with vision transformers.

    Raises:
        UsageError: there are fewer than two classes, or no class has two images.
    """
    numbers, class_of = np.unique(classes, return_inverse=True)
    features = images.astype(np.float64)
    size = features.shape[1]
    if len(numbers) < 2 or len(features) == len(numbers):
        raise UsageError(
            f"Whitened LDA needs two classes or more and several images of a class; there are {len(features)} images "
            f"of {len(numbers)} classes."
        )
    means = np.zeros((len(numbers), size))
    np.add.at(means, class_of, features)
    means /= np.bincount(class_of)[:, None]
    deviations = features - means[class_of]
    covariance = deviations.T @ deviations / len(features)
    if np.trace(covariance) < _LEAST_VARIANCE:
        raise UsageError("Whitened LDA needs images that differ within a class; the embeddings of these are the same.")
    covariance += (_SHRINKAGE * np.trace(covariance) / size + np.finfo(np.float64).tiny) * np.eye(size)
    variances, directions = np.linalg.eigh(covariance)
    whitening = directions / np.sqrt(variances) @ directions.T
    white_means = means @ whitening
    centre = features.mean(axis=0) @ whitening
    # the covariance within classes is the identity now: the discriminants are those of the scatter between them alone
    between = white_means - white_means.mean(axis=0)
    _, _, axes = np.linalg.svd(between, full_matrices=False)
    most = max(1, min(len(numbers) - 1, size * 2 // 3))
    discriminants = axes[: min(num_discriminants or most, len(numbers) - 1, size)]
    return WhitenedLda(
        whitening=whitening.astype(np.float32),
        discriminants=discriminants.astype(np.float32),
        class_means=(white_means @ discriminants.T).astype(np.float32),
        centre=centre.astype(np.float32),
        residual_weight=residual_weight,
    )


@dataclass(frozen=True, kw_only=True)
class RejectRule:
    """Which images are of none of the classes: those whose score is below the threshold.

    score: `similarity`, the cosine with the nearest class, or `whitened-lda`. fingerprint: of the model whose
    embeddings it was measured on, empty for a threshold given by itself. classes: those it was measured with.
    """

    score: RejectScore = "similarity"
    threshold: float
    fingerprint: str = ""
    classes: tuple[str, ...] = ()
    lda: WhitenedLda | None = None

    def scores(
        self, images: Float32[Array, "N D"], similarity: Float[Array, " N"] | Float32[Array, " N"]
    ) -> Float[Array, " N"]:
        """The score of each embedded image; similarity: its cosine with the nearest class."""
        return similarity.astype(np.float64) if self.lda is None else self.lda.scores(images).astype(np.float64)

    def check_model(self, fingerprint: str) -> None:
        """Refuse a model of another space, whose embeddings the threshold says nothing of.

        Raises:
            UsageError: it is one.
        """
        if self.fingerprint and self.fingerprint != fingerprint:
            raise UsageError(
                f"The threshold was measured on the model {self.fingerprint}, and this one is {fingerprint}: measure "
                "one for it (vlm eval --out-of-distribution … --out FOLDER)."
            )


def write_reject_rule(rule: RejectRule, path: Path) -> None:
    """Write a rule as one safetensors file, which `read_reject_rule` reads."""
    arrays: dict[str, np.ndarray] = {}
    weight = 0.0
    if rule.lda is not None:
        arrays = asdict(rule.lda)
        weight = arrays.pop("residual_weight")
    metadata = {
        "reject_rule": _FORMAT,
        "score": rule.score,
        "threshold": repr(rule.threshold),
        "residual_weight": repr(weight),
        "fingerprint": rule.fingerprint,
        "classes": json.dumps(rule.classes, ensure_ascii=False),
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(path, save(contiguous, metadata=metadata))


def read_reject_rule(value: str | float) -> RejectRule:
    """A rule: the lowest cosine with the nearest class that is not rejected, or a file of `vlm eval`.

    Raises:
        UsageError: it is neither.
    """
    try:
        threshold = float(value)
    except ValueError:
        return _read_rule_file(Path(str(value)))
    if not (math.isfinite(threshold) and -1 <= threshold <= 1):
        raise UsageError(f"The reject threshold {value} is out of range: a cosine is from -1 to 1.")
    return RejectRule(threshold=threshold)


def _read_rule_file(path: Path) -> RejectRule:
    if not path.is_file():
        raise UsageError(f"The reject threshold {str(path)!r} is neither a number nor a file of vlm eval.")
    data = path.read_bytes()
    try:
        arrays = load(data)
        # safetensors: the length of the header in 8 bytes, then the header
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        if metadata.get("reject_rule") != _FORMAT:
            raise KeyError("reject_rule")
        lda = None
        if arrays:
            lda = WhitenedLda(residual_weight=float(metadata["residual_weight"]), **arrays)
        return RejectRule(
            score=metadata["score"],
            threshold=float(metadata["threshold"]),
            fingerprint=metadata["fingerprint"],
            classes=tuple(json.loads(metadata["classes"])),
            lda=lda,
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no reject threshold of vlm eval (reject.safetensors).") from error
