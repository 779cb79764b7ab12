"""How good a heat map is: whether it points at the thing, and whether its places carry the score.

The pointing game (Zhang et al. 2018, Excitation Backprop, §4.2) needs to know where the thing is. Insertion and
deletion (Petsiuk, Das and Saenko 2018, RISE, §4.3) need the model alone, and compare methods on any image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from vlm.errors import UsageError
from vlm.results import Result
from vlm.tensor_types import Array, Bool, Float, UInt8

ScoreImages = Callable[[UInt8[Array, "B 3 H W"]], Float[Array, " B"]]
"""How well each of some images, as the model sees them, matches the text: a cosine or a probability."""

_STEPS = 32
# of the blurred image that pixels are inserted into, in parts of the image's side; RISE blurs 224 pixels by 5
_BLUR = 5 / 224


def pointing_hit(heat: Float[Array, "H W"], mask: Bool[Array, "h w"], *, margin: float = 0.0) -> float:
    """Whether the map's maximum lies on the thing; of several equal maxima the share that does.

    margin: pixels that it may lie aside. Zhang et al. allow 15 of an image of 224 pixels or so.

    Raises:
        UsageError: the thing is nowhere, or the map is of another size.
    """
    if heat.shape != mask.shape:
        raise UsageError(f"A heat map of {heat.shape} pixels and a mask of {mask.shape}: they must be of one size.")
    if not mask.any():
        raise UsageError("The mask is empty: there is nothing to point at.")
    maxima = np.argwhere(heat == heat.max())
    hits = [np.hypot(*(np.argwhere(mask) - maximum).T).min() <= margin for maximum in maxima]
    return float(np.mean(hits))


@dataclass(frozen=True, kw_only=True)
class InsertionDeletion(Result):
    """Areas under the score as the hottest pixels come first and go first.

    insertion: of a blurred image that is filled in; high is good. deletion: of the image whose pixels turn into its
    mean colour; low is good. curves: the scores after each step, from no pixel to all.
    """

    insertion: float
    deletion: float
    insertion_curve: tuple[float, ...]
    deletion_curve: tuple[float, ...]

    @property
    def difference(self) -> float:
        """Insertion less deletion: one number by which methods compare on an image."""
        return self.insertion - self.deletion


def insertion_deletion(
    score: ScoreImages, image: UInt8[Array, "3 H W"], heat: Float[Array, "h w"], *, steps: int = _STEPS
) -> InsertionDeletion:
    """Insert and delete the pixels of an image from the hottest to the coldest, in equal steps.

    Pixels of equal heat go in the order of rows, so that a map of one value scores like any other order.

    Raises:
        UsageError: the map is of another size than the image, or there is no step.
    """
    if heat.shape != image.shape[1:]:
        raise UsageError(f"A heat map of {heat.shape} pixels for an image of {image.shape[1:]}: give one of its size.")
    if steps < 1:
        raise UsageError(f"steps = {steps} is out of range: give 1 or more.")
    order = np.argsort(-heat.ravel(), kind="stable")
    blur = ImageFilter.GaussianBlur(_BLUR * image.shape[1])
    blurred = np.asarray(Image.fromarray(image.transpose(1, 2, 0)).filter(blur)).transpose(2, 0, 1)
    mean = np.broadcast_to(image.mean(axis=(1, 2), keepdims=True), image.shape)
    inserted = _replaced(blurred, image, order, steps)
    deleted = _replaced(image, mean.round().astype(np.uint8), order, steps)
    insertion_curve = np.asarray(score(inserted), np.float64)
    deletion_curve = np.asarray(score(deleted), np.float64)
    return InsertionDeletion(
        insertion=_area(insertion_curve),
        deletion=_area(deletion_curve),
        insertion_curve=tuple(insertion_curve.tolist()),
        deletion_curve=tuple(deletion_curve.tolist()),
    )


def _replaced(
    start: UInt8[Array, "3 H W"], end: UInt8[Array, "3 H W"], order: Array, steps: int
) -> UInt8[Array, "S 3 H W"]:
    """The first image with more and more of its pixels from the second."""
    images = np.repeat(start[None], steps + 1, axis=0)
    flat = images.reshape(steps + 1, 3, -1)
    source = end.reshape(3, -1)
    for step in range(1, steps + 1):
        some = order[: round(len(order) * step / steps)]
        flat[step][:, some] = source[:, some]
    return images


def _area(curve: Float[Array, " S"]) -> float:
    return float(np.trapezoid(curve) / (len(curve) - 1))
