"""Whether probabilities mean what they say: expected calibration error with its reliability table."""

from dataclasses import dataclass

import numpy as np

from vlm.tensor_types import Array, Float, Int

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
