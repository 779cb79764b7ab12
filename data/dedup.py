"""Duplicate images and texts: near-duplicates by perceptual hash and verification, exact ones by digest.

Two finders of image pairs that show the same thing, and the union-find that joins their pairs into groups:

- `near_duplicate_pairs` for curation and inspection: copies re-encoded, resized, a little brighter, or cropped by a
  few pixels. Hashes propose candidate pairs (multi-index hashing), thumbnails verify them: what a small change cannot
  explain must be within the noise.
- `reencoded_pairs` for the grouped split of `vlm.data.split`: copies that were only re-encoded. It is the stricter
  of the two on purpose: its groups decide which samples a seed draws, so a looser finder would change every split
  that was ever made with that seed.

`DigestList` counts exact repeats of keys, captions and encoded images at 16 bytes each.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm.data.decode import open_image, to_rgb, upright_size
from vlm.files import content_digest

SIDE = 32
COLOUR_SIDE = 8
THUMBNAIL_BYTES = SIDE * SIDE + COLOUR_SIDE * COLOUR_SIDE * 2
"""Of a thumbnail: 32×32 of luma, then 8×8 of the two colour differences (centred at 128)."""

DISTANCE = 10
"""Bits two hashes of one image may differ in: of 13 kinds of copy of 15,724 photos all but 5 copies were within it."""

_DECODED_SIDE = 64
_BLOCK = SIDE // COLOUR_SIDE
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_BANDS = 4
_BAND_BITS = 16
_PAIRS_PER_BLOCK = 1 << 22


class ImageSignature(NamedTuple):
    """What an image is recognised by: a 64-bit hash, and a thumbnail, uint8 [1152]."""

    hash: int
    thumbnail: np.ndarray


def image_signature(data: bytes) -> ImageSignature:
    """The signature of an encoded image, decoded no larger than needed.

    The hash says which of the 64 lowest frequencies of its 32×32 cosine transform, the mean left out, are above
    their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", takes the
    8×8 lowest). Two hashes therefore differ in an even number of bits.

    Raises:
        BadSample: the image cannot be decoded.
    """
    image = open_image(data)
    width, height = upright_size(image)
    rgb = to_rgb(image, resolution=min(1.0, _DECODED_SIDE / min(width, height)))

    # of a JPEG decoded at 1/2, 1/4 or 1/8 the last pixels of a side may be partly outside the image
    reduction = round(width / rgb.width)
    frame = (0, 0, width / reduction, height / reduction)
    # a triangle, not a box: Pillow's box takes whole pixels only, so that copies of another size would differ
    small = np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=frame), dtype=np.float32)
    luma = small @ _LUMA

    cosines = _cosine_basis()
    spectrum = cosines @ luma @ cosines.T
    lowest = spectrum[_lowest_frequencies()]
    bits = np.packbits(lowest > np.median(lowest))

    blue = (small[..., 2] - luma) * 0.564
    red = (small[..., 0] - luma) * 0.713
    colours = np.stack([blue, red], axis=-1).reshape(COLOUR_SIDE, _BLOCK, COLOUR_SIDE, _BLOCK, 2)
    colours = colours.mean(axis=(1, 3)) + 128

    thumbnail = np.round(np.concatenate([luma.reshape(-1), colours.reshape(-1)])).astype(np.uint8)
    return ImageSignature(int.from_bytes(bits.tobytes(), "big"), thumbnail)


@cache
def _cosine_basis() -> np.ndarray:
    """Rows of the discrete cosine transform, float32 [SIDE, SIDE]."""
    steps = np.arange(SIDE)
    return np.cos(np.pi / SIDE * (steps[None, :] + 0.5) * steps[:, None]).astype(np.float32)


@cache
def _lowest_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the 64 lowest frequencies, so ordered that each band of 16 holds low and high ones."""
    frequencies = [(row, column) for row in range(SIDE) for column in range(SIDE) if row + column]
    frequencies.sort(key=lambda frequency: (sum(frequency), frequency))
    lowest = np.array(frequencies[:64])
    order = np.arange(64).reshape(-1, _BANDS).T.reshape(-1)
    return lowest[order, 0], lowest[order, 1]


def near_duplicate_pairs(
    hashes: np.ndarray, thumbnails: np.ndarray, *, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions (one, other), one < other, that show the same image, a block at a time.

    hashes: uint64 [N]; thumbnails: uint8 [N, 1152]; distance: the most bits two hashes may differ in.
    Signatures equal bit for bit are paired with the first of them only.
    """
    # Equal signatures first: a thousand copies are a thousand pairs, not half a million.
    signatures = np.concatenate([hashes.view(np.uint8).reshape(-1, 8), thumbnails], axis=1)
    rows = np.ascontiguousarray(signatures).view(f"V{signatures.shape[1]}").reshape(-1)
    _, firsts, groups = np.unique(rows, return_index=True, return_inverse=True)
    first_equal = firsts[groups]
    repeated = np.flatnonzero(first_equal != np.arange(len(hashes)))
    if len(repeated):
        yield first_equal[repeated], repeated

    distinct = np.sort(firsts)
    for some, others in near_hash_pairs(hashes[distinct], distance=distance):
        one = distinct[some]
        other = distinct[others]
        is_same = are_near_duplicates(thumbnails, one, other)
        if is_same.any():
            yield one[is_same], other[is_same]


def near_hash_pairs(hashes: np.ndarray, *, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of positions (one < other) whose hashes, uint64 [N], differ in at most `distance` bits, each once.

    Multi-index hashing (Norouzi et al. 2012, arXiv 1307.2982): split into 4 bands of 16 bits, two such hashes differ
    in at most distance // 4 bits in one of them, so each hash meets only those whose band is that near. The number of
    meetings grows with N²/65,536: a million random hashes take 13 s at distance 6 and 83 s at 10 on one core.
    """
    radius = distance // _BANDS
    masks = _masks_within(radius)
    bands: list[np.ndarray] = []
    for number in range(_BANDS):
        band = (hashes >> np.uint64(_BAND_BITS * number)) & np.uint64(0xFFFF)
        bands.append(band.astype(np.int64))
    for number, band in enumerate(bands):
        order = np.argsort(band, kind="stable")
        keys = band[order]
        starts = np.searchsorted(keys, np.arange((1 << _BAND_BITS) + 1))
        for mask in masks:
            for some, others in _matching_pairs(keys, starts, mask):
                one = order[some]
                other = order[others]
                is_near = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
                one = one[is_near]
                other = other[is_near]
                # a pair near in several bands was met in each of them: the first one reports it
                is_new = np.ones(len(one), dtype=bool)
                for earlier in bands[:number]:
                    is_new &= np.bitwise_count(earlier[one] ^ earlier[other]) > radius
                if is_new.any():
                    yield np.minimum(one, other)[is_new], np.maximum(one, other)[is_new]


def _masks_within(radius: int) -> list[int]:
    """All 16-bit numbers with at most `radius` bits set, by their number of bits."""
    masks: list[int] = []
    for count in range(radius + 1):
        for bits in combinations(range(_BAND_BITS), count):
            masks.append(sum(1 << bit for bit in bits))
    return masks


def _matching_pairs(keys: np.ndarray, starts: np.ndarray, mask: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of positions among sorted keys with one ^ other == mask, each once, in blocks of bounded size.

    starts: where each possible key begins among the sorted ones.
    """
    # The partners of position i are the run of keys equal to keys[i] ^ mask; from the pair seen from both its sides,
    # only the side of the smaller key is taken (mask 0: of the earlier position).
    partners = keys ^ mask
    first = np.where(partners > keys, starts[partners], np.arange(len(keys)) + 1)
    counts = np.where(partners >= keys, starts[partners + 1] - first, 0)

    with_partners = np.flatnonzero(counts)
    ends = np.cumsum(counts[with_partners])
    done = 0
    while done < len(with_partners):
        pairs_before = ends[done - 1] if done else 0
        upto = max(int(np.searchsorted(ends, pairs_before + _PAIRS_PER_BLOCK, side="right")), done + 1)
        block = with_partners[done:upto]
        sizes = counts[block]
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield np.repeat(block, sizes), np.repeat(first[block], sizes) + offsets
        done = upto


_PAIRS_PER_FIT = 512
_EDGE = 2
_WHITE = 245.0
_DARKENED_WHITE = 225.0
# of the brightest channel, in levels: where some of a pixel may be clipped, and where all of it may
_MAYBE_CLIPPED = 190.0
_SURELY_CLIPPED = 240.0
_DOUBTFUL_WEIGHT = 0.02
_FEWEST_PIXELS = 60
_FEWEST_BLOCKS = 4
_MAX_MOVED_PIXELS = 0.75
_MAX_GAIN = 0.18
_MAX_UNFITTED_LEVELS = 22.0
_MAX_UNFITTED_COLOUR = 16.0
_MAX_SHIFT = 14.0
# gradients where nothing moved are noise; a gain is told from an offset only where there is contrast
_RIDGE = np.diag(np.array([20, 20, 20, 20, 1e3, 10], dtype=np.float32))
_RAMP = np.linspace(-1, 1, SIDE, dtype=np.float32)

# Limits of the residuals. Set on one half (by hash of the key) of 800 fashion, 800 Flickr8k and 341 full-size clothing
# photos, then tightened until no copy of one of ten pairs of near-identical fashion products met a copy of the other
# (belts in black and brown came nearest). Missed of the other half of all photos (4,205 fashion / 3,432 Flickr8k / 174
# clothing), each copy against its original alone: quality 85 0/1/0, 50 0/1/0, 30 2/5/0, WebP 0/1/0, PNG 0/1/0, 1.5
# times the size 0/1/0, half 1/7/0, 3% brighter 2/1/0, 5% brighter 26/1/0 (pale products, whose edges are clipped away),
# 5% darker 2/0/1, cropped by 2% 2/4/0, contrast up 3% 0/1/0, 5% 10/5/0. None was joined that was mirrored, cropped by
# 20%, made grey, turned in hue or had red and blue swapped. Two pairs of fashion's originals are joined, both one
# photo; one more that is one photo, much brighter, is not. Below 64 pixels a side the colours of a JPEG are too coarse,
# and copies of another size may be missed.
MAX_LUMA_RMS = 0.95
MAX_LUMA = 5.0
MAX_COLOUR_BIAS = 1.4
MAX_COLOUR_RMS = 2.3
MAX_COLOUR = 9.0
MAX_COMBINED = 1.35


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """What is left between P pairs of thumbnails after the fit, in levels, each float32 [P].

    luma_rms, luma: root mean square of what is not white, and the largest, lessened where the image is steep.
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
        shares_of_limits = np.stack(
            [
                self.luma_rms / MAX_LUMA_RMS,
                self.luma / MAX_LUMA,
                self.colour_bias / MAX_COLOUR_BIAS,
                self.colour_rms / MAX_COLOUR_RMS,
                self.colour / MAX_COLOUR,
            ]
        )
        # each within its limit, and not all of them close to it
        is_noise = (shares_of_limits.max(axis=0) <= 1) & ((shares_of_limits**2).sum(axis=0) <= MAX_COMBINED**2)
        is_small = (self.moved <= _MAX_MOVED_PIXELS) & (self.gain <= _MAX_GAIN) & (self.shift <= _MAX_SHIFT)
        return is_noise & is_small


def are_near_duplicates(thumbnails: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """bool [P]: whether thumbnails[one[p]] and thumbnails[other[p]], uint8 [N, 1152], show the same image."""
    decisions = np.zeros(len(one), dtype=bool)
    pixels = SIDE * SIDE
    for start in range(0, len(one), _PAIRS_PER_FIT):
        block = slice(start, start + _PAIRS_PER_FIT)
        a = thumbnails[one[block]].astype(np.float32)
        b = thumbnails[other[block]].astype(np.float32)
        # most candidates are far off as they are; only the rest is worth the fit
        change = (a - b) ** 2
        is_luma_near = change[:, :pixels].mean(axis=1) <= _MAX_UNFITTED_LEVELS**2
        is_colour_near = change[:, pixels:].max(axis=1) <= _MAX_UNFITTED_COLOUR**2
        near = np.flatnonzero(is_luma_near & is_colour_near)
        if len(near):
            decisions[start + near] = compare_thumbnails(a[near], b[near]).is_same()
    return decisions


def compare_thumbnails(one: np.ndarray, other: np.ndarray) -> Residuals:
    """Explain the change from one to other (float32 [P, 1152]) by small changes, and say what is left.

    By least squares the luma may be shifted and stretched along each side, and made brighter by a gain and an offset
    (one linear step of Lucas and Kanade 1981). Where a channel of the brighter may be clipped at 255, any part of the
    brightening may be missing. The colours follow the movement and the gain alone, so that another colour stays
    another. The outermost pixels, where a crop shows, do not count.
    """
    luma = _smoothed_luma(one)
    other_luma = _smoothed_luma(other)
    colours = _colours(one)
    other_colours = _colours(other)
    middle = (luma + other_luma) / 2

    # how much of each pixel may be clipped, 0 to 1
    peak = np.maximum(luma, other_luma) + _above_luma((colours + other_colours) / 2)
    doubt = np.clip((peak - _MAYBE_CLIPPED) / (_SURELY_CLIPPED - _MAYBE_CLIPPED), 0, 1)

    # to first order, moving an image changes it by its slope; a ramp times the slope stretches it
    down = np.gradient(middle, axis=1)
    across = np.gradient(middle, axis=2)
    terms = [across, across * _RAMP, down, down * _RAMP[:, None], middle - 128, np.ones_like(middle)]
    fit = _fit_luma(_inner(luma), _inner(other_luma), _inner(np.stack(terms, axis=-1)), doubt=_inner(doubt))
    sizes = np.abs(fit.coefficients)

    # on a steep edge a fraction of a pixel makes many levels
    luma_left = fit.residuals / np.sqrt(1 + (0.1 * _inner(np.hypot(down, across))) ** 2)
    colour_left = _colour_residuals(colours, other_colours, fit.coefficients, luma=middle, doubt=doubt)

    # a mean over a small thing on a white ground is one over the thing
    white = _white_level(middle)
    num_pixels = (_inner(middle) < white).sum(axis=(1, 2))
    is_coloured = (_block_means(middle) < white)[..., None].astype(np.float32)
    num_blocks = np.maximum(is_coloured.sum(axis=(1, 2, 3)), _FEWEST_BLOCKS)
    return Residuals(
        luma_rms=np.sqrt((luma_left**2).sum(axis=(1, 2)) / np.maximum(num_pixels, _FEWEST_PIXELS)),
        luma=np.abs(luma_left).max(axis=(1, 2)),
        colour_bias=np.abs((colour_left * is_coloured).sum(axis=(1, 2))).max(axis=1) / num_blocks,
        colour_rms=np.sqrt((colour_left**2 * is_coloured).sum(axis=(1, 2, 3)) / (2 * num_blocks)),
        colour=np.abs(colour_left).max(axis=(1, 2, 3)),
        moved=np.maximum(sizes[:, 0] + sizes[:, 1], sizes[:, 2] + sizes[:, 3]),
        gain=sizes[:, 4],
        shift=fit.shift,
    )


def _white_level(luma: np.ndarray) -> np.ndarray:
    """The luma from which a pixel is background, [P, 1, 1]: less in an image that was darkened, all white included."""
    top = luma.max(axis=(1, 2), keepdims=True)
    return np.where(top > _DARKENED_WHITE, np.minimum(_WHITE, top - 8), _WHITE)


class _LumaFit(NamedTuple):
    """The six terms' sizes [P, 6], the luma they leave [P, ...], the brightening by gain and offset, and its mean [P].

    brightening: in levels, from the darker to the brighter image, at least 0.
    """

    coefficients: np.ndarray
    residuals: np.ndarray
    brightening: np.ndarray
    shift: np.ndarray


def _fit_luma(a: np.ndarray, b: np.ndarray, design: np.ndarray, *, doubt: np.ndarray) -> _LumaFit:
    """Fit b - a, [P, H, W], by the design's terms [P, H, W, 6].

    doubt: how much of each pixel may be clipped, 0 to 1. A doubtful pixel hardly counts, unless the first fit leaves it
    brighter than clipping can; what is white in both never counts.
    """
    shape = a.shape
    design = design.reshape(len(a), -1, 6)
    a = a.reshape(len(a), -1)
    b = b.reshape(len(b), -1)
    doubt = doubt.reshape(len(a), -1)
    is_grey = (np.maximum(a, b) < _WHITE).astype(np.float32)
    counts = np.minimum(a, b) < _WHITE

    # clipping can only take brightness away: a pixel left brighter than the fit says was not clipped
    trust = is_grey * np.maximum(1 - doubt, _DOUBTFUL_WEIGHT)
    first = _solve(a, b, design, trust=trust, is_grey=is_grey, counts=counts)
    trust = np.where((first.residuals > 0) & counts, 1, trust)
    fit = _solve(a, b, design, trust=trust, is_grey=is_grey, counts=counts)

    missing_brightness = np.clip(-fit.residuals, 0, doubt * fit.brightening)
    return fit._replace(residuals=(fit.residuals + missing_brightness).reshape(shape))


def _solve(
    a: np.ndarray, b: np.ndarray, design: np.ndarray, *, trust: np.ndarray, is_grey: np.ndarray, counts: np.ndarray
) -> _LumaFit:
    """Weighted ridge regression of b - a [P, n] on the design [P, n, 6].

    trust: the weight of each pixel. The residuals, zero where not `counts`, are those of the brighter image.
    """
    weighted = (design * trust[..., None]).transpose(0, 2, 1)
    coefficients = np.linalg.solve(weighted @ design + _RIDGE, weighted @ (b - a)[..., None])
    brightening = (design[..., 4:] @ coefficients[:, 4:])[..., 0]
    shift = (brightening * is_grey).sum(axis=1) / np.maximum(is_grey.sum(axis=1), 1)

    # clipping happens to the brighter image, whichever of the two it is
    sign = np.where(shift >= 0, 1, -1).astype(np.float32)[:, None]
    dark = np.where(sign > 0, a, b)
    bright = np.where(sign > 0, b, a)
    predicted = np.minimum(dark + sign * (design @ coefficients)[..., 0], 255)
    return _LumaFit(
        coefficients=coefficients[..., 0],
        residuals=(bright - predicted) * counts,
        brightening=np.maximum(sign * brightening, 0),
        shift=np.abs(shift),
    )


def _colour_residuals(
    a: np.ndarray, b: np.ndarray, coefficients: np.ndarray, *, luma: np.ndarray, doubt: np.ndarray
) -> np.ndarray:
    """Change of colour [P, 8, 8, 2] less what gain, movement and clipping (where in doubt) explain."""
    middle = (a + b) / 2
    ramp = _RAMP.reshape(COLOUR_SIDE, _BLOCK).mean(axis=1)[:, None]
    right, right_stretch, down, down_stretch = coefficients[:, :4, None, None, None].transpose(1, 0, 2, 3, 4)
    moved = np.gradient(middle, axis=2) * (right + right_stretch * ramp)
    moved += np.gradient(middle, axis=1) * (down + down_stretch * ramp[:, None])
    gain = coefficients[:, 4, None, None, None]
    left = b - a - gain * middle - moved / _BLOCK

    offset = coefficients[:, 5, None, None]
    brightening = _block_means(np.abs(gain[..., 0] * (luma - 128) + offset))[..., None]
    # of a block's darkest pixel: the white around a thing says nothing of its colour
    doubt = doubt.reshape(-1, COLOUR_SIDE, _BLOCK, COLOUR_SIDE, _BLOCK).min(axis=(2, 4))
    clipped = doubt[..., None] * (brightening + np.abs(gain * middle))
    return left - np.clip(left, -clipped, clipped)


def _colours(thumbnails: np.ndarray) -> np.ndarray:
    """The colour differences [P, 8, 8, 2], blue then red, centred at 0."""
    return thumbnails[:, SIDE * SIDE :].reshape(-1, COLOUR_SIDE, COLOUR_SIDE, 2) - 128


def _above_luma(colours: np.ndarray) -> np.ndarray:
    """Levels by which the brightest channel exceeds the luma, [P, 32, 32]."""
    blue = colours[..., 0] / 0.564
    red = colours[..., 1] / 0.713
    green = -(0.299 * red + 0.114 * blue) / 0.587
    brightest = np.maximum(np.maximum(blue, red), green)
    return brightest.repeat(_BLOCK, axis=1).repeat(_BLOCK, axis=2)


def _block_means(images: np.ndarray) -> np.ndarray:
    """Means of 4×4 pixels, [P, 8, 8]."""
    return images.reshape(-1, COLOUR_SIDE, _BLOCK, COLOUR_SIDE, _BLOCK).mean(axis=(2, 4))


def _smoothed_luma(thumbnails: np.ndarray) -> np.ndarray:
    """The luma [P, 32, 32], blurred by (1 2 1)/4 along both sides, so that differences are slopes."""
    luma = np.pad(thumbnails[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE), ((0, 0), (1, 1), (1, 1)), mode="edge")
    luma = (luma[:, :-2] + 2 * luma[:, 1:-1] + luma[:, 2:]) / 4
    return (luma[:, :, :-2] + 2 * luma[:, :, 1:-1] + luma[:, :, 2:]) / 4


def _inner(images: np.ndarray) -> np.ndarray:
    return images[:, _EDGE:-_EDGE, _EDGE:-_EDGE]


RGB_THUMBNAIL_SIDE = 16

# Measured on 600 fashion photos of 112 px: JPEG quality 75, WebP 80 and PNG change a 16×16 RGB thumbnail by at most
# 1.66 levels (root mean square) and 11 (largest). The nearest different photos of fashion (8,383) lie at 1.79;
# Flickr8k, CIFAR-10 and 5,000 synthetic shapes have none below 4.
MAX_REENCODED_RMS = 1.7
MAX_REENCODED_LEVELS = 12


def rgb_thumbnail(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 [16 * 16 * 3], for `reencoded_pairs`."""
    small = image.resize((RGB_THUMBNAIL_SIDE, RGB_THUMBNAIL_SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8).reshape(-1)


def reencoded_pairs(thumbnails: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of rows of uint8 [N, 768] that show the same image; rows equal bit for bit are paired with the first.

    Every such pair is found: a mean with weights ±1 cannot differ by more than the root mean square does, so
    the rows are sorted by their brightness, and only those near in it and in three contrasts are compared.
    Measured: 8,383 fashion photos 0.5 s, 100,000 random mixtures of them about half a minute.
    """
    first_of: dict[bytes, int] = {}
    for row, thumbnail in enumerate(thumbnails):
        first = first_of.setdefault(content_digest(thumbnail.tobytes()), row)
        if first != row:
            yield first, row

    rows = np.fromiter(first_of.values(), dtype=np.int64)
    means = thumbnails[rows] @ _contrasts()
    order = np.argsort(means[:, 0], kind="stable")
    rows = rows[order]
    means = means[order]

    # Compare each row with the one `step` further, all rows at once; a row whose neighbour at this step is already too
    # bright has no nearer one at a later step, so the rows still compared only become fewer.
    positions = np.arange(len(rows))
    for step in range(1, len(rows)):
        positions = positions[: np.searchsorted(positions, len(rows) - step)]
        positions = positions[means[positions + step, 0] - means[positions, 0] <= MAX_REENCODED_RMS]
        if not len(positions):
            return
        is_near = np.all(np.abs(means[positions + step, 1:] - means[positions, 1:]) <= MAX_REENCODED_RMS, axis=1)
        for position in positions[is_near]:
            one = rows[position]
            other = rows[position + step]
            if _is_reencoded(thumbnails[one], thumbnails[other]):
                yield int(one), int(other)


def _is_reencoded(one: np.ndarray, other: np.ndarray) -> bool:
    difference = one.astype(np.int32) - other
    return bool(np.abs(difference).max() <= MAX_REENCODED_LEVELS and np.mean(difference**2) <= MAX_REENCODED_RMS**2)


def _contrasts() -> np.ndarray:
    """float32 [768, 4]: brightness, left against right, top against bottom, inner against outer."""
    side = RGB_THUMBNAIL_SIDE
    half = np.where(np.arange(side) < side // 2, 1, -1)
    across, down = np.meshgrid(half, half)
    middle = np.where(np.abs(np.arange(side) - (side - 1) / 2) < side / 4, 1, -1)
    inner = np.minimum(*np.meshgrid(middle, middle))
    planes = np.stack([np.ones_like(across), across, down, inner], axis=-1).reshape(-1, 4)
    return np.repeat(planes, 3, axis=0).astype(np.float32) / (3 * side**2)


class DisjointSets:
    """Union-find with path halving; a set is named by its least member. Members are added as they are named."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    @property
    def members(self) -> list[int]:
        """All that were named so far."""
        return list(self._parents)

    def root(self, member: int) -> int:
        """The least member of the set of this one."""
        parents = self._parents
        while (parent := parents.setdefault(member, member)) != member:
            parents[member] = parents[parent]
            member = parents[member]
        return member

    def union(self, one: int, other: int) -> bool:
        """Join the sets of the two; whether they were different ones until now."""
        first, second = sorted((self.root(one), self.root(other)))
        self._parents[second] = first
        return first != second


def connected_components(pairs: Iterable[tuple[np.ndarray, np.ndarray]], number: int) -> np.ndarray:
    """int64 [number]: the least member of the group each belongs to, when these pairs belong together."""
    sets = DisjointSets()
    for some, others in pairs:
        for one, other in zip(some.tolist(), others.tolist(), strict=True):
            sets.union(one, other)
    groups = np.arange(number, dtype=np.int64)
    for member in sets.members:
        groups[member] = sets.root(member)
    return groups


DIGEST_BYTES = 16


class RepeatedDigest(NamedTuple):
    """A value that occurs more than once: the position of its first occurrence, and how often it occurs."""

    position: int
    times: int


class DigestList:
    """Digests in the order they came; texts and images are not kept."""

    def __init__(self) -> None:
        self._words = array("Q")

    def __len__(self) -> int:
        return len(self._words) // 2

    def __getitem__(self, position: int) -> bytes:
        return self._words[2 * position : 2 * position + 2].tobytes()

    def add(self, digest: bytes) -> None:
        """Append 16 bytes of `vlm.files.content_digest`."""
        self._words.frombytes(digest)

    def distinct(self, where: np.ndarray | None = None) -> int:
        """How many different ones there are, among all or those at the positions `where` marks."""
        words = self._pairs() if where is None else self._pairs()[where]
        return len(_equal_rows(words)[0])

    def most_repeated(self, number: int) -> list[RepeatedDigest]:
        """Those that occur most, more than once; of equals the one that came first."""
        firsts, times = _equal_rows(self._pairs())
        order = np.lexsort((firsts, -times))[:number]
        repeated: list[RepeatedDigest] = []
        for group in order:
            if times[group] > 1:
                repeated.append(RepeatedDigest(int(firsts[group]), int(times[group])))
        return repeated

    def _pairs(self) -> np.ndarray:
        """uint64 [N, 2]: a digest a row."""
        return np.frombuffer(self._words, dtype=np.uint64).reshape(-1, 2) if self._words else np.zeros((0, 2), "u8")


def _equal_rows(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of the first, and number, of each group of equal rows."""
    if not len(words):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.lexsort((words[:, 1], words[:, 0]))
    ordered = words[order]
    is_new = np.concatenate([[True], np.any(ordered[1:] != ordered[:-1], axis=1)])
    starts = np.flatnonzero(is_new)
    return order[starts], np.diff(np.append(starts, len(words)))
