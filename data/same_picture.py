"""Confirming that two thumbnails show one picture: what small changes cannot explain must be within the noise."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlm.data.likeness import COLOUR_SIDE, SIDE, near_hashes

_FITS_AT_ONCE = 512
_EDGE = 2
_WHITE = 245.0
_MAX_MOVED_PIXELS = 0.6
_MAX_GAIN = 0.16
_MAX_UNFITTED_LEVELS = 22.0
_MAX_UNFITTED_COLOUR = 16.0
_SHIFT_LEVELS = 60.0
# gradients where nothing moved are noise; a gain is told from an offset only where there is contrast
_RIDGE = np.diag(np.array([1, 1, 1, 1, 1e3, 10], dtype=np.float32))

# Set on 336 fashion and 280 Flickr8k photos against their copies: JPEG at quality 50 and 85, WebP, PNG, twice the size
# and a cut of 2% leave at most luma 1.02 rms and 4.5, colour 1.15 of bias. The nearest different photos of fashion, and
# copies of them, leave 1.23 of bias (belts in brown and tan), 1.28 rms (briefs with another band) or 1.23 rms after 7
# levels of brightening (shoes in brown and grey). Checked on others (227 fashion, 250 Flickr8k, 341 full-size clothing
# photos), each copy against its original alone: all found of quality 50 and 85, WebP, PNG and larger; half the size
# 99.1 / 100 / 100%, quality 30 100 / 99.6 / 100%, 3% brighter 99.6 / 100 / 100%, 5% brighter 66 / 95 / 98%, cut by 2%
# 100 / 100 / 90%; no two different photos joined, none mirrored, cut by 20% or made grey. Below 64 pixels a side the
# colours of a JPEG are too coarse, and copies of another size may be missed.
MAX_LUMA_RMS, MAX_LUMA = 1.05, 4.5
MAX_COLOUR_BIAS, MAX_COLOUR_RMS, MAX_COLOUR = 1.2, 2.3, 7.0


@dataclass(frozen=True, kw_only=True)
class Remainder:
    """What is left between P pairs of thumbnails after the fit, in levels, each float32 [P].

    luma_rms, luma: root mean square, and the largest, lessened where the picture is steep.
    colour_bias: of the mean colour of what is not white; colour_rms, colour: root mean square and largest.
    moved: pixels an edge moved by; gain: change of contrast; shift: mean change of
    brightness by gain and offset.
    """

    luma_rms: np.ndarray
    luma: np.ndarray
    colour_bias: np.ndarray
    colour_rms: np.ndarray
    colour: np.ndarray
    moved: np.ndarray
    gain: np.ndarray
    shift: np.ndarray

    def is_same(self) -> np.ndarray:
        """bool [P]: whether the change was small and what is left is noise; brighter pictures may leave more."""
        slack = 1 + self.shift / _SHIFT_LEVELS
        return (
            (self.moved <= _MAX_MOVED_PIXELS)
            & (self.gain <= _MAX_GAIN)
            & (self.luma_rms <= MAX_LUMA_RMS * slack)
            & (self.luma <= MAX_LUMA * slack)
            & (self.colour_bias <= MAX_COLOUR_BIAS * slack)
            & (self.colour_rms <= MAX_COLOUR_RMS * slack)
            & (self.colour <= MAX_COLOUR * slack)
        )


def same_looks(hashes: np.ndarray, thumbnails: np.ndarray, *, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places (one, other), one < other, that show the same picture, a block at a time.

    hashes: uint64 [N]; thumbnails: uint8 [N, 1152]; distance: the most bits two hashes may differ in.
    Looks equal bit for bit are paired with the first of them only.
    """
    together = np.concatenate([hashes.view(np.uint8).reshape(-1, 8), thumbnails], axis=1)
    rows = np.ascontiguousarray(together).view(f"V{together.shape[1]}").reshape(-1)
    _, firsts, groups = np.unique(rows, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(firsts[groups] != np.arange(len(hashes)))
    if len(repeated):
        yield firsts[groups[repeated]], repeated
    firsts = np.sort(firsts)
    for one, other in near_hashes(hashes[firsts], distance=distance):
        is_same = is_same_picture(thumbnails, firsts[one], firsts[other])
        if is_same.any():
            yield firsts[one[is_same]], firsts[other[is_same]]


def is_same_picture(thumbnails: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """bool [P]: whether thumbnails[one[p]] and thumbnails[other[p]], uint8 [N, 1152], show the same picture."""
    verdicts = np.zeros(len(one), dtype=bool)
    for start in range(0, len(one), _FITS_AT_ONCE):
        block = slice(start, start + _FITS_AT_ONCE)
        a, b = thumbnails[one[block]].astype(np.float32), thumbnails[other[block]].astype(np.float32)
        change = (a - b) ** 2
        pixels = SIDE * SIDE
        near = np.flatnonzero(
            (change[:, :pixels].mean(axis=1) <= _MAX_UNFITTED_LEVELS**2)
            & (change[:, pixels:].max(axis=1) <= _MAX_UNFITTED_COLOUR**2)
        )
        if len(near):
            verdicts[start + near] = compare(a[near], b[near]).is_same()
    return verdicts


def compare(one: np.ndarray, other: np.ndarray) -> Remainder:
    """Explain the change from one to other (float32 [P, 1152]) by small changes, and say what is left.

    By least squares the luma may be shifted and stretched along each side, and made brighter by a gain and an offset
    (one linear step of Lucas and Kanade 1981); what is brighter than white is clipped. The colours follow the gain
    alone, so that another colour stays another. The outermost pixels, where a cut shows, do not count.
    """
    a, b = _smoothed(one), _smoothed(other)
    middle = (a + b) / 2
    down, across = np.gradient(middle, axis=1), np.gradient(middle, axis=2)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    terms = [across, across * ramp, down, down * ramp[:, None], middle - 128, np.ones_like(middle)]
    design = _inner(np.stack(terms, axis=-1)).reshape(len(one), -1, 6)
    a, b = _inner(a).reshape(len(one), -1), _inner(b).reshape(len(one), -1)
    is_grey = (np.maximum(a, b) < _WHITE).astype(np.float32)
    weighed = (design * is_grey[..., None]).transpose(0, 2, 1)
    found = np.linalg.solve(weighed @ design + _RIDGE, weighed @ (b - a)[..., None])
    explained = (design @ found)[..., 0]
    brightening = (design[..., 4:] @ found[:, 4:])[..., 0]
    shift = (brightening * is_grey).sum(axis=1) / np.maximum(is_grey.sum(axis=1), 1)
    brighter = b - np.minimum(a + explained, 255)
    darker = np.minimum(b - explained, 255) - a
    left = np.where(shift[:, None] >= 0, brighter, darker) * (np.minimum(a, b) < _WHITE)
    steepness = _inner(np.hypot(down, across)).reshape(len(one), -1)
    size = np.abs(found[:, :, 0])
    bias, rms, largest = _colours_left(one, other, gain=found[:, 4, 0], luma=middle)
    return Remainder(
        luma_rms=np.sqrt(np.mean(left**2, axis=1)),
        luma=np.abs(left / np.sqrt(1 + (0.1 * steepness) ** 2)).max(axis=1),
        colour_bias=bias,
        colour_rms=rms,
        colour=largest,
        moved=np.maximum(size[:, 0] + size[:, 1], size[:, 2] + size[:, 3]),
        gain=size[:, 4],
        shift=np.abs(shift),
    )


def _colours_left(
    one: np.ndarray, other: np.ndarray, *, gain: np.ndarray, luma: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bias, root mean square and largest change of colour, less what the gain explains, of what is not white."""
    a, b = (part[:, SIDE * SIDE :].reshape(-1, COLOUR_SIDE, COLOUR_SIDE, 2) - 128 for part in (one, other))
    half = gain[:, None, None, None] / 2
    left = b * (1 - half) - a * (1 + half)
    block = SIDE // COLOUR_SIDE
    lightness = luma.reshape(-1, COLOUR_SIDE, block, COLOUR_SIDE, block).mean(axis=(2, 4))
    counts = (lightness < _WHITE)[..., None].astype(np.float32)
    number = np.maximum(counts.sum(axis=(1, 2, 3)), 4)
    bias = np.abs((left * counts).sum(axis=(1, 2))).max(axis=1) / number
    rms = np.sqrt((left**2 * counts).sum(axis=(1, 2, 3)) / (2 * number))
    return bias, rms, np.abs(left).max(axis=(1, 2, 3))


def _smoothed(thumbnails: np.ndarray) -> np.ndarray:
    """The luma [P, 32, 32], blurred by (1 2 1)/4 along both sides, so that differences are slopes."""
    luma = np.pad(thumbnails[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE), ((0, 0), (1, 1), (1, 1)), mode="edge")
    luma = (luma[:, :-2] + 2 * luma[:, 1:-1] + luma[:, 2:]) / 4
    return (luma[:, :, :-2] + 2 * luma[:, :, 1:-1] + luma[:, :, 2:]) / 4


def _inner(images: np.ndarray) -> np.ndarray:
    return images[:, _EDGE:-_EDGE, _EDGE:-_EDGE]
