"""How right classes rank: accuracies with ties in expectation, label sets, average precision, calibration."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from vlm.errors import VlmError
from vlm.evaluation.retrieval_metrics import Ranks
from vlm.tensor_types import Array, Bool, Float, Float32, Int

NUM_BINS = 15  # as in Guo et al. 2017
# a second or two of drawing
_MOST_NUMBERS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Images whose prediction has a probability in (low, high]: their mean probability, and how many are right."""

    low: float
    high: float
    num_images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Probabilities of predictions beside how often these are right.

    error: expected calibration error in [0, 1], the gap of accuracy and mean probability in bins of equal width, each
    weighed by its images (Guo et al. 2017, eq. 3). overconfidence: mean probability less accuracy. bins: those with
    images.
    """

    error: float
    overconfidence: float
    bins: tuple[ReliabilityBin, ...]


def measure_calibration(
    probability: Float[Array, " N"], correct: Float[Array, " N"], *, num_bins: int = NUM_BINS
) -> Calibration:
    """Calibration of predictions with these probabilities.

    correct: whether each is right, 0 or 1; between them its chance where several classes tie.
    """
    bin_of = calibration_bins(probability, num_bins)
    counts = np.bincount(bin_of, minlength=num_bins)
    confidence = np.bincount(bin_of, weights=probability, minlength=num_bins)
    right = np.bincount(bin_of, weights=correct, minlength=num_bins)
    bins: list[ReliabilityBin] = []
    for number in np.flatnonzero(counts).tolist():
        bins.append(
            ReliabilityBin(
                low=number / num_bins,
                high=(number + 1) / num_bins,
                num_images=int(counts[number]),
                confidence=float(confidence[number] / counts[number]),
                accuracy=float(right[number] / counts[number]),
            )
        )
    return Calibration(
        error=float(np.abs(confidence - right).sum() / len(probability)),
        overconfidence=float((probability - correct).mean()),
        bins=tuple(bins),
    )


def calibration_interval(
    probability: Float[Array, " N"],
    correct: Float[Array, " N"],
    *,
    rng: np.random.Generator,
    num_bins: int = NUM_BINS,
    num_resamples: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of the expected calibration error.

    num_resamples: 0 takes 1,000, of a large set fewer.
    Its gaps are absolute values, to which resampling adds: the resampled errors are moved so that their mean is the
    measured one, without which the interval could lie above it.
    """
    bin_of = calibration_bins(probability, num_bins)
    gaps = probability - correct
    errors = np.empty(num_resamples or int(np.clip(_MOST_NUMBERS // len(gaps), 200, 1000)))
    for number in range(len(errors)):
        drawn = rng.integers(len(gaps), size=len(gaps))
        sums = np.bincount(bin_of[drawn], weights=gaps[drawn], minlength=num_bins)
        errors[number] = np.abs(sums).sum() / len(gaps)
    measured = np.abs(np.bincount(bin_of, weights=gaps, minlength=num_bins)).sum() / len(gaps)
    margin = (1 - confidence) / 2
    low, high = np.quantile(errors, [margin, 1 - margin]) - errors.mean() + measured
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def calibration_bins(probability: np.ndarray, num_bins: int = NUM_BINS) -> Int[Array, " N"]:
    """The bin of each probability, of bins of equal width."""
    # (low, high], so that a probability of 1 is in the last one
    edges = np.linspace(0, 1, num_bins + 1)
    return np.clip(np.searchsorted(edges, probability, side="left") - 1, 0, num_bins - 1)


# a block of cosines with 1,000 classes takes 2 MB: it is read several times, and stays in the cache
_IMAGES_AT_ONCE = 512
# a block of cosines with a million images takes 64 MB
_CLASSES_AT_ONCE = 16
# 32 MB of numbers of images
_DRAWN_AT_ONCE = 4_000_000

LabelSets = Sequence[Sequence[int]]
"""The right classes of each image by number: one, several (any is right), or none."""


@dataclass(frozen=True, kw_only=True)
class ClassRanking:
    """Each image against all classes.

    ranks: of the best right class; meaningless where there is none. truth: the right class that scores highest, -1
    where there is none. prediction: the class that scores highest, the first of equals. probability, similarity: its
    softmax at the model's temperature, and its cosine. lowest: the class that scores lowest.
    """

    ranks: Ranks
    truth: Int[Array, " N"]
    prediction: Int[Array, " N"]
    probability: Float[Array, " N"]
    similarity: Float32[Array, " N"]
    lowest: Int[Array, " N"]

    @property
    def has_truth(self) -> Bool[Array, " N"]:
        """Which images have a right class; only they count for accuracies, as with ReaL labels (Beyer et al. 2020)."""
        return self.truth >= 0

    def hits(self, k: int) -> Float[Array, " M"]:
        """Probability of a right class in the top k, of each image that has one."""
        return self.ranks.hits(k)[self.has_truth]


def rank_classes(
    images: Float32[Array, "N D"], classifier: Float32[Array, "K D"], truths: LabelSets, *, logit_scale: float = 1.0
) -> ClassRanking:
    """Rank the right classes of each image among all classes by cosine.

    logit_scale: the learned inverse temperature, for probabilities.

    Raises:
        VlmError: a cosine is not finite: the model has diverged.
    """
    distinct, column_of = _distinct_rows(classifier)
    columns: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(images), _IMAGES_AT_ONCE):
        # equal classes get one column: a product of matrices may round equal columns differently, and break a tie
        scores = images[first : first + _IMAGES_AT_ONCE] @ distinct.T
        if len(distinct) < len(classifier):
            scores = scores[:, column_of]
        if not np.isfinite(scores).all():
            raise VlmError(
                "The model's embeddings are not finite: its weights have diverged. Evaluate an earlier checkpoint, or "
                "retrain with a lower learning rate."
            )
        block = _rank_block(scores, truths[first : first + len(scores)], logit_scale)
        for name, values in block.items():
            columns.setdefault(name, []).append(values)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    above, tied_negatives, tied_positives = (joined.pop(name) for name in ("above", "tied_negatives", "tied_positives"))
    ranks = Ranks(above=above, tied_negatives=tied_negatives, tied_positives=tied_positives)
    return ClassRanking(ranks=ranks, **joined)


def _rank_block(scores: np.ndarray, truths: LabelSets, logit_scale: float) -> dict[str, np.ndarray]:
    rows, columns = _flat(truths)
    right_scores = scores[rows, columns]
    best = np.full(len(scores), -np.inf, scores.dtype)
    np.maximum.at(best, rows, right_scores)
    is_best = right_scores == best[rows]
    truth = np.full(len(scores), -1)
    # from the last to the first: of equals the first stays
    truth[rows[is_best][::-1]] = columns[is_best][::-1]
    tied_positives = np.bincount(rows, is_best, minlength=len(scores)).astype(np.int64)
    prediction = scores.argmax(axis=1)
    highest = scores[np.arange(len(scores)), prediction]
    # the exponential of the highest is 1, so that none overflows
    exponentials = np.exp(np.float32(logit_scale) * (scores - highest[:, None]))
    return {
        "above": np.count_nonzero(scores > best[:, None], axis=1),
        "tied_negatives": np.count_nonzero(scores == best[:, None], axis=1) - tied_positives,
        "tied_positives": tied_positives,
        "truth": truth,
        "prediction": prediction,
        "probability": 1 / exponentials.sum(axis=1, dtype=np.float64),
        "similarity": highest,
        "lowest": scores.argmin(axis=1),
    }


def _flat(truths: LabelSets) -> tuple[np.ndarray, np.ndarray]:
    """Image and class of each label, an image's classes in rising order and each once."""
    sets = [sorted(set(classes)) for classes in truths]
    rows = np.repeat(np.arange(len(sets)), list(map(len, sets)))
    return rows, np.fromiter(chain.from_iterable(sets), np.int64)


def _distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that differ, and for each row which of these it is."""
    number_of: dict[bytes, int] = {}
    # 0.0 makes the two zeros one
    numbers = [number_of.setdefault(row.tobytes(), len(number_of)) for row in rows + np.float32(0.0)]
    inverse = np.asarray(numbers, dtype=np.int64)
    return rows[np.unique(inverse, return_index=True)[1]], inverse


def label_matrix(truths: LabelSets, num_classes: int) -> Bool[Array, "N K"]:
    """Whether a class is right for an image."""
    matrix = np.zeros((len(truths), num_classes), bool)
    matrix[_flat(truths)] = True
    return matrix


def chance_of_hit(truths: LabelSets, num_classes: int, k: int) -> float:
    """Expected accuracy at k of random guessing, over the images that have a right class."""
    num_right = np.asarray([len(set(classes)) for classes in truths if classes], dtype=np.int64)
    return Ranks.by_chance(num_right, num_classes).recall(k)


def class_means(
    outcomes: Float[Array, " N"], truths: LabelSets, num_classes: int
) -> tuple[Float[Array, " K"], Int[Array, " K"]]:
    """Mean outcome and number of images of each class, an image counting for all of its own; NaN without images."""
    rows, classes = _flat(truths)
    totals = np.bincount(classes, minlength=num_classes)
    sums = np.bincount(classes, weights=outcomes[rows], minlength=num_classes)
    return np.where(totals > 0, sums / np.maximum(totals, 1), np.nan), totals


def every_other_of_class(truth: Int[Array, " N"]) -> Bool[Array, " N"]:
    """Half of the images of each class: the first, the third, …"""
    order = np.argsort(truth, kind="stable")
    starts = np.searchsorted(truth[order], truth[order], side="left")
    is_even = np.empty(len(truth), bool)
    is_even[order] = (np.arange(len(truth)) - starts) % 2 == 0
    return is_even


def resampled_class_means(
    outcomes: Float[Array, " N"], truth: Int[Array, " N"], *, rng: np.random.Generator, num_resamples: int = 1000
) -> Float[Array, " R"]:
    """The mean over classes of their mean outcomes, for resamples of the images within each class.

    Within classes, since otherwise the share of a class would vary, which this mean does not depend on.
    """
    present = np.unique(truth)
    total = np.zeros(num_resamples)
    for number in present:
        of_class = outcomes[truth == number]
        at_once = max(1, _DRAWN_AT_ONCE // len(of_class))
        for first in range(0, num_resamples, at_once):
            block = total[first : first + at_once]
            block += of_class[rng.integers(len(of_class), size=(len(block), len(of_class)))].mean(axis=1)
    return total / len(present)


@dataclass(frozen=True, kw_only=True)
class ConfusionPair:
    """Images of one class that were taken for another; share: of all images of the class."""

    truth: str
    prediction: str
    num_images: int
    share: float


def confusion_pairs(
    truth: Int[Array, " N"], prediction: Int[Array, " N"], names: Sequence[str], *, limit: int
) -> tuple[ConfusionPair, ...]:
    """The most frequent wrong pairs, first the most frequent; of equals those of the first classes."""
    totals = Counter(truth.tolist())
    counts = Counter(zip(truth.tolist(), prediction.tolist(), strict=True))
    wrong = [(number, pair) for pair, number in counts.items() if pair[0] != pair[1]]
    pairs: list[ConfusionPair] = []
    for number, (true, predicted) in sorted(wrong, key=lambda entry: (-entry[0], entry[1]))[:limit]:
        share = number / totals[true]
        pairs.append(
            ConfusionPair(truth=names[int(true)], prediction=names[int(predicted)], num_images=number, share=share),
        )
    return tuple(pairs)


def average_precisions(
    images: Float32[Array, "N D"],
    classifier: Float32[Array, "K D"],
    truths: LabelSets,
    counts: Int[Array, "R N"] | None = None,
) -> Float[Array, "R K"]:
    """Average precision of each class over all images ranked by it; NaN for a class that is right for no image.

    AP = Σ (recall_n - recall_n-1) precision_n over the distinct scores, equal scores entering together: images that all
    score alike give the share of the positives. Images without a right class are negatives.

    counts: how often each image was drawn, for R resamples; without it once.
    """
    weights = np.ones((1, len(images)), np.int64) if counts is None else counts
    is_right = label_matrix(truths, len(classifier))
    result = np.full((len(weights), len(classifier)), np.nan)
    # as with classes: equal images have to score equally
    distinct, row_of = _distinct_rows(images)
    for first in range(0, len(classifier), _CLASSES_AT_ONCE):
        scores = (distinct @ classifier[first : first + _CLASSES_AT_ONCE].T)[row_of]
        for offset in range(scores.shape[1]):
            positives = is_right[:, first + offset]
            if positives.any():
                result[:, first + offset] = _average_precision(scores[:, offset], positives, weights)
    return result


def _average_precision(scores: np.ndarray, positives: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(-scores, kind="stable")
    # the last of each run of equal scores
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    drawn = weights[:, order]
    num_images = drawn.cumsum(axis=1)[:, ends]
    num_positives = (drawn * positives[order]).cumsum(axis=1)[:, ends]
    gained = np.diff(num_positives, axis=1, prepend=0)
    precision = num_positives / np.maximum(num_images, 1)
    total = num_positives[:, -1]
    # a resample without any positive has no average precision
    return np.where(total > 0, (gained * precision).sum(axis=1) / np.maximum(total, 1), np.nan)
