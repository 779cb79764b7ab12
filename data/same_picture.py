"""Confirming that two thumbnails show one picture: what small changes cannot explain must be within the noise."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlm.data.likeness import COLOUR_SIDE, SIDE, near_hashes

_FITS_AT_ONCE = 512
_EDGE = 2
_WHITE, _DARKENED_WHITE = 245.0, 225.0
# of the brightest channel, in levels: where some of a pixel may be clipped, and where all of it may
_MAYBE_CLIPPED, _SURELY_CLIPPED = 190.0, 240.0
_DOUBTFUL_WEIGHT = 0.02
_FEWEST_PIXELS, _FEWEST_BLOCKS = 60, 4
_MAX_MOVED_PIXELS = 0.75
_MAX_GAIN = 0.18
_MAX_UNFITTED_LEVELS = 22.0
_MAX_UNFITTED_COLOUR = 16.0
_MAX_SHIFT = 14.0
# gradients where nothing moved are noise; a gain is told from an offset only where there is contrast
_RIDGE = np.diag(np.array([20, 20, 20, 20, 1e3, 10], dtype=np.float32))
_RAMP = np.linspace(-1, 1, SIDE, dtype=np.float32)
_BLOCK = SIDE // COLOUR_SIDE

# Set on one half (by hash of the key) of 800 fashion, 800 Flickr8k and 341 full-size clothing photos, then tightened
# until no copy of one of ten pairs of near-identical fashion products met a copy of the other (belts in black and brown
# came nearest). Missed of the other half of all photos (4,205 fashion / 3,432 Flickr8k / 174 clothing), each copy
# against its original alone: quality 85 0/1/0, 50 0/1/0, 30 2/5/0, WebP 0/1/0, PNG 0/1/0, 1.5 times the size 0/1/0,
# half 1/7/0, 3% brighter 2/1/0, 5% brighter 26/1/0 (pale products, whose edges are clipped away), 5% darker 2/0/1, cut
# by 2% 2/4/0, contrast up 3% 0/1/0, 5% 10/5/0. None was joined that was mirrored, cut by 20%, made grey, turned in hue
# or had red and blue swapped. Two pairs of fashion's originals are joined, both one photo; one more that is one photo,
# much brighter, is not. Below 64 pixels a side the colours of a JPEG are too coarse, and copies of another size may be
# missed.
MAX_LUMA_RMS, MAX_LUMA = 0.95, 5.0
MAX_COLOUR_BIAS, MAX_COLOUR_RMS, MAX_COLOUR = 1.4, 2.3, 9.0
MAX_TOGETHER = 1.35


@dataclass(frozen=True, kw_only=True)
class Remainder:
    """What is left between P pairs of thumbnails after the fit, in levels, each float32 [P].

    luma_rms, luma: root mean square of what is not white, and the largest, lessened where the picture is steep.
    colour_bias: of the mean colour of what is not white; colour_rms, colour: root mean square and largest.
    moved: pixels an edge moved by; gain: change of contrast; shift: mean change of brightness by gain and offset.
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
        """bool [P]: whether the change was small and what is left is noise."""
        shares = [
            self.luma_rms / MAX_LUMA_RMS,
            self.luma / MAX_LUMA,
            self.colour_bias / MAX_COLOUR_BIAS,
            self.colour_rms / MAX_COLOUR_RMS,
            self.colour / MAX_COLOUR,
        ]
        left = np.stack(shares)
        is_noise = (left.max(axis=0) <= 1) & ((left**2).sum(axis=0) <= MAX_TOGETHER**2)
        is_small = (self.moved <= _MAX_MOVED_PIXELS) & (self.gain <= _MAX_GAIN) & (self.shift <= _MAX_SHIFT)
        return is_noise & is_small


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
    (one linear step of Lucas and Kanade 1981). Where a channel of the brighter may be clipped at 255, any part of the
    brightening may be missing. The colours follow the movement and the gain alone, so that another colour stays
    another. The outermost pixels, where a cut shows, do not count.
    """
    a, b = _smoothed(one), _smoothed(other)
    colours, others_colours = _colours(one), _colours(other)
    peak = np.maximum(a, b) + _above_luma((colours + others_colours) / 2)
    doubt = np.clip((peak - _MAYBE_CLIPPED) / (_SURELY_CLIPPED - _MAYBE_CLIPPED), 0, 1)
    middle = (a + b) / 2
    down, across = np.gradient(middle, axis=1), np.gradient(middle, axis=2)
    terms = [across, across * _RAMP, down, down * _RAMP[:, None], middle - 128, np.ones_like(middle)]
    fit = _fit(_inner(a), _inner(b), _inner(np.stack(terms, axis=-1)), doubt=_inner(doubt))
    left = fit.left / np.sqrt(1 + (0.1 * _inner(np.hypot(down, across))) ** 2)
    colour_left = _colours_left(colours, others_colours, fit.found, luma=middle, doubt=doubt)
    white = _white_of(middle)
    num_pixels = (_inner(middle) < white).sum(axis=(1, 2))
    is_coloured = (_blocks(middle) < white)[..., None].astype(np.float32)
    number = np.maximum(is_coloured.sum(axis=(1, 2, 3)), _FEWEST_BLOCKS)
    size = np.abs(fit.found)
    return Remainder(
        luma_rms=np.sqrt((left**2).sum(axis=(1, 2)) / np.maximum(num_pixels, _FEWEST_PIXELS)),
        luma=np.abs(left).max(axis=(1, 2)),
        colour_bias=np.abs((colour_left * is_coloured).sum(axis=(1, 2))).max(axis=1) / number,
        colour_rms=np.sqrt((colour_left**2 * is_coloured).sum(axis=(1, 2, 3)) / (2 * number)),
        colour=np.abs(colour_left).max(axis=(1, 2, 3)),
        moved=np.maximum(size[:, 0] + size[:, 1], size[:, 2] + size[:, 3]),
        gain=size[:, 4],
        shift=fit.shift,
    )


def _white_of(luma: np.ndarray) -> np.ndarray:
    """The luma from which a pixel is background, [P, 1, 1]: less in a picture that was darkened, all white included."""
    top = luma.max(axis=(1, 2), keepdims=True)
    return np.where(top > _DARKENED_WHITE, np.minimum(_WHITE, top - 8), _WHITE)


class _Fit(NamedTuple):
    """The six terms' sizes [P, 6], luma left [P, H, W], and the mean brightening [P]."""

    found: np.ndarray
    left: np.ndarray
    shift: np.ndarray


def _fit(a: np.ndarray, b: np.ndarray, design: np.ndarray, *, doubt: np.ndarray) -> _Fit:
    """Fit b - a, [P, H, W], by the design's terms [P, H, W, 6].

    doubt: how much of each pixel may be clipped, 0 to 1. A doubtful pixel hardly counts, unless the first fit leaves it
    brighter than clipping can; what is white in both never counts.
    """
    shape = a.shape
    design = design.reshape(len(a), -1, 6)
    a, b, doubt = (part.reshape(len(a), -1) for part in (a, b, doubt))
    is_grey = (np.maximum(a, b) < _WHITE).astype(np.float32)
    counts = np.minimum(a, b) < _WHITE
    trust = is_grey * np.maximum(1 - doubt, _DOUBTFUL_WEIGHT)

    def fitted() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        weighed = (design * trust[..., None]).transpose(0, 2, 1)
        found = np.linalg.solve(weighed @ design + _RIDGE, weighed @ (b - a)[..., None])
        brightening = (design[..., 4:] @ found[:, 4:])[..., 0]
        shift = (brightening * is_grey).sum(axis=1) / np.maximum(is_grey.sum(axis=1), 1)
        sign = np.where(shift >= 0, 1, -1).astype(np.float32)[:, None]
        dark, bright = np.where(sign > 0, a, b), np.where(sign > 0, b, a)
        left = (bright - np.minimum(dark + sign * (design @ found)[..., 0], 255)) * counts
        return found[..., 0], left, np.maximum(sign * brightening, 0), np.abs(shift)

    trust = np.where((fitted()[1] > 0) & counts, 1, trust)
    found, left, brightening, shift = fitted()
    left += np.clip(-left, 0, doubt * brightening)
    return _Fit(found, left.reshape(shape), shift)


def _colours(thumbnails: np.ndarray) -> np.ndarray:
    """The colour differences [P, 8, 8, 2], blue then red, centred at 0."""
    return thumbnails[:, SIDE * SIDE :].reshape(-1, COLOUR_SIDE, COLOUR_SIDE, 2) - 128


def _above_luma(colours: np.ndarray) -> np.ndarray:
    """Levels by which the brightest channel exceeds the luma, [P, 32, 32]."""
    blue, red = colours[..., 0] / 0.564, colours[..., 1] / 0.713
    green = -(0.299 * red + 0.114 * blue) / 0.587
    return np.maximum(np.maximum(blue, red), green).repeat(_BLOCK, axis=1).repeat(_BLOCK, axis=2)


def _colours_left(
    a: np.ndarray, b: np.ndarray, found: np.ndarray, *, luma: np.ndarray, doubt: np.ndarray
) -> np.ndarray:
    """Change of colour [P, 8, 8, 2] less what gain, movement and clipping (where in doubt) explain."""
    gain, offset = found[:, 4, None, None, None], found[:, 5, None, None]
    middle = (a + b) / 2
    ramp = _RAMP.reshape(COLOUR_SIDE, _BLOCK).mean(axis=1)[:, None]
    right, right_stretch, down, down_stretch = found[:, :4, None, None, None].transpose(1, 0, 2, 3, 4)
    moved = np.gradient(middle, axis=2) * (right + right_stretch * ramp)
    moved += np.gradient(middle, axis=1) * (down + down_stretch * ramp[:, None])
    left = b - a - gain * middle - moved / _BLOCK
    brightening = _blocks(np.abs(gain[..., 0] * (luma - 128) + offset))[..., None]
    # of a block's darkest pixel: the white around a thing says nothing of its colour
    doubt = doubt.reshape(-1, COLOUR_SIDE, _BLOCK, COLOUR_SIDE, _BLOCK).min(axis=(2, 4))
    clipped = doubt[..., None] * (brightening + np.abs(gain * middle))
    return left - np.clip(left, -clipped, clipped)


def _blocks(images: np.ndarray) -> np.ndarray:
    """Means of 4×4 pixels, [P, 8, 8]."""
    return images.reshape(-1, COLOUR_SIDE, _BLOCK, COLOUR_SIDE, _BLOCK).mean(axis=(2, 4))


def _smoothed(thumbnails: np.ndarray) -> np.ndarray:
    """The luma [P, 32, 32], blurred by (1 2 1)/4 along both sides, so that differences are slopes."""
    luma = np.pad(thumbnails[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE), ((0, 0), (1, 1), (1, 1)), mode="edge")
    luma = (luma[:, :-2] + 2 * luma[:, 1:-1] + luma[:, 2:]) / 4
    return (luma[:, :, :-2] + 2 * luma[:, :, 1:-1] + luma[:, :, 2:]) / 4


def _inner(images: np.ndarray) -> np.ndarray:
    return images[:, _EDGE:-_EDGE, _EDGE:-_EDGE]
