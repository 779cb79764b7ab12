"""Whether two pictures are one: encoded anew, resized, a little brighter, or cut by a hair at the edges.

A look is a 64-bit hash, by which candidates are found, and a thumbnail, by which they are confirmed.

Confirming that two thumbnails show one picture: what small changes cannot explain must be within the noise.

Which values occur again, at 16 bytes a value: texts and pictures are kept as digests only.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm.data.decode import open_image, to_rgb, upright_size

SIDE = 32
COLOUR_SIDE = 8
THUMBNAIL_BYTES = SIDE * SIDE + COLOUR_SIDE * COLOUR_SIDE * 2
"""Of a thumbnail: 32×32 of luma, then 8×8 of the two colour differences (centred at 128)."""

DISTANCE = 10
"""Bits two hashes of one picture may differ in: of 13 kinds of copy of 15,724 photos all but 5 copies lay within."""

_DECODED_SIDE = 64
_BANDS = 4
_BAND_BITS = 16
_PAIRS_PER_BLOCK = 1 << 22
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class ImageSignature(NamedTuple):
    """What a picture is recognised by: a 64-bit hash, and a thumbnail, uint8 [1152]."""

    hash: int
    thumbnail: np.ndarray


def image_signature(data: bytes) -> ImageSignature:
    """The look of an encoded picture, decoded no larger than needed.

    The hash says which of the 64 lowest frequencies of its 32×32 cosine transform, the mean left out, are above
    their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", takes the
    8×8 lowest). Two hashes therefore differ in an even number of bits.

    Raises:
        BadSample: the picture cannot be decoded.
    """
    image = open_image(data)
    width, height = upright_size(image)
    rgb = to_rgb(image, resolution=min(1.0, _DECODED_SIDE / min(width, height)))
    # of a JPEG decoded at 1/2, 1/4 or 1/8 the last pixels of a side may lie partly outside the picture
    reduction = round(width / rgb.width)
    # a triangle, not a box: Pillow's box takes whole pixels only, so that copies of another size would differ
    frame = (0, 0, width / reduction, height / reduction)
    small = np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=frame), dtype=np.float32)
    luma = small @ _LUMA
    lowest = (_COSINES @ luma @ _COSINES.T)[_ROWS, _COLUMNS]
    bits = np.packbits(lowest > np.median(lowest))
    block = SIDE // COLOUR_SIDE
    colours = np.stack([(small[..., 2] - luma) * 0.564, (small[..., 0] - luma) * 0.713], axis=-1)
    colours = colours.reshape(COLOUR_SIDE, block, COLOUR_SIDE, block, 2).mean(axis=(1, 3)) + 128
    thumbnail = np.round(np.concatenate([luma.reshape(-1), colours.reshape(-1)])).astype(np.uint8)
    return ImageSignature(int.from_bytes(bits.tobytes(), "big"), thumbnail)


def _lowest_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the 64 lowest frequencies, so ordered that each band of 16 holds low and high ones."""
    positions = sorted(((i, j) for i in range(SIDE) for j in range(SIDE) if i + j), key=lambda p: (sum(p), p))[:64]
    dealt = [position for band in range(_BANDS) for position in positions[band::_BANDS]]
    return np.array([row for row, _ in dealt]), np.array([column for _, column in dealt])


_STEPS = np.arange(SIDE)
_COSINES = np.cos(np.pi / SIDE * (_STEPS[None, :] + 0.5) * _STEPS[:, None]).astype(np.float32)
_ROWS, _COLUMNS = _lowest_frequencies()


def near_hash_pairs(hashes: np.ndarray, *, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places (one < other) whose hashes, uint64 [N], differ in at most `distance` bits, each once.

    Split into 4 bands of 16 bits, two such hashes differ in at most distance // 4 bits in one of them, so each hash
    meets only those whose band is that near (multi-index hashing, Norouzi et al. 2012, arXiv 1307.2982). The cost of
    the meetings grows with N²/65,536: a million random
    hashes take 13 s at distance 6 and 83 s at 10 on one core.
    """
    radius = distance // _BANDS
    bands = [((hashes >> np.uint64(_BAND_BITS * band)) & np.uint64(0xFFFF)).astype(np.int64) for band in range(_BANDS)]
    masks = [sum(1 << bit for bit in bits) for count in range(radius + 1) for bits in combinations(range(16), count)]
    for number, band in enumerate(bands):
        order = np.argsort(band, kind="stable")
        keys = band[order]
        starts = np.searchsorted(keys, np.arange((1 << _BAND_BITS) + 1))
        for mask in masks:
            for one, other in _matching_pairs(keys, starts, mask):
                one, other = order[one], order[other]
                is_near = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
                one, other = one[is_near], other[is_near]
                is_new = np.ones(len(one), dtype=bool)
                for earlier in bands[:number]:
                    is_new &= np.bitwise_count(earlier[one] ^ earlier[other]) > radius
                if is_new.any():
                    yield np.minimum(one, other)[is_new], np.maximum(one, other)[is_new]


def _matching_pairs(keys: np.ndarray, starts: np.ndarray, mask: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places among sorted keys with one ^ other == mask, each once, in blocks of bounded size."""
    partners = keys ^ mask
    first = np.where(partners > keys, starts[partners], np.arange(len(keys)) + 1)
    counts = np.where(partners >= keys, starts[partners + 1] - first, 0)
    chosen = np.flatnonzero(counts)
    ends = np.cumsum(counts[chosen])
    done = 0
    while done < len(chosen):
        before = ends[done - 1] if done else 0
        upto = max(int(np.searchsorted(ends, before + _PAIRS_PER_BLOCK, side="right")), done + 1)
        block = chosen[done:upto]
        sizes = counts[block]
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield np.repeat(block, sizes), np.repeat(first[block], sizes) + offsets
        done = upto


_PAIRS_PER_FIT = 512
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
MAX_COMBINED = 1.35


@dataclass(frozen=True, kw_only=True)
class Residuals:
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
        is_noise = (left.max(axis=0) <= 1) & ((left**2).sum(axis=0) <= MAX_COMBINED**2)
        is_small = (self.moved <= _MAX_MOVED_PIXELS) & (self.gain <= _MAX_GAIN) & (self.shift <= _MAX_SHIFT)
        return is_noise & is_small


def near_duplicate_pairs(
    hashes: np.ndarray, thumbnails: np.ndarray, *, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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
    for one, other in near_hash_pairs(hashes[firsts], distance=distance):
        is_same = are_near_duplicates(thumbnails, firsts[one], firsts[other])
        if is_same.any():
            yield firsts[one[is_same]], firsts[other[is_same]]


def are_near_duplicates(thumbnails: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """bool [P]: whether thumbnails[one[p]] and thumbnails[other[p]], uint8 [N, 1152], show the same picture."""
    decisions = np.zeros(len(one), dtype=bool)
    for start in range(0, len(one), _PAIRS_PER_FIT):
        block = slice(start, start + _PAIRS_PER_FIT)
        a, b = thumbnails[one[block]].astype(np.float32), thumbnails[other[block]].astype(np.float32)
        change = (a - b) ** 2
        pixels = SIDE * SIDE
        near = np.flatnonzero(
            (change[:, :pixels].mean(axis=1) <= _MAX_UNFITTED_LEVELS**2)
            & (change[:, pixels:].max(axis=1) <= _MAX_UNFITTED_COLOUR**2)
        )
        if len(near):
            decisions[start + near] = compare(a[near], b[near]).is_same()
    return decisions


def compare(one: np.ndarray, other: np.ndarray) -> Residuals:
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
    colour_left = _colour_residuals(colours, others_colours, fit.coefficients, luma=middle, doubt=doubt)
    white = _white_level(middle)
    num_pixels = (_inner(middle) < white).sum(axis=(1, 2))
    is_coloured = (_blocks(middle) < white)[..., None].astype(np.float32)
    number = np.maximum(is_coloured.sum(axis=(1, 2, 3)), _FEWEST_BLOCKS)
    size = np.abs(fit.coefficients)
    return Residuals(
        luma_rms=np.sqrt((left**2).sum(axis=(1, 2)) / np.maximum(num_pixels, _FEWEST_PIXELS)),
        luma=np.abs(left).max(axis=(1, 2)),
        colour_bias=np.abs((colour_left * is_coloured).sum(axis=(1, 2))).max(axis=1) / number,
        colour_rms=np.sqrt((colour_left**2 * is_coloured).sum(axis=(1, 2, 3)) / (2 * number)),
        colour=np.abs(colour_left).max(axis=(1, 2, 3)),
        moved=np.maximum(size[:, 0] + size[:, 1], size[:, 2] + size[:, 3]),
        gain=size[:, 4],
        shift=fit.shift,
    )


def _white_level(luma: np.ndarray) -> np.ndarray:
    """The luma from which a pixel is background, [P, 1, 1]: less in a picture that was darkened, all white included."""
    top = luma.max(axis=(1, 2), keepdims=True)
    return np.where(top > _DARKENED_WHITE, np.minimum(_WHITE, top - 8), _WHITE)


class _Fit(NamedTuple):
    """The six terms' sizes [P, 6], luma left [P, H, W], and the mean brightening [P]."""

    coefficients: np.ndarray
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
        coefficients = np.linalg.solve(weighed @ design + _RIDGE, weighed @ (b - a)[..., None])
        brightening = (design[..., 4:] @ coefficients[:, 4:])[..., 0]
        shift = (brightening * is_grey).sum(axis=1) / np.maximum(is_grey.sum(axis=1), 1)
        sign = np.where(shift >= 0, 1, -1).astype(np.float32)[:, None]
        dark, bright = np.where(sign > 0, a, b), np.where(sign > 0, b, a)
        left = (bright - np.minimum(dark + sign * (design @ coefficients)[..., 0], 255)) * counts
        return coefficients[..., 0], left, np.maximum(sign * brightening, 0), np.abs(shift)

    trust = np.where((fitted()[1] > 0) & counts, 1, trust)
    coefficients, left, brightening, shift = fitted()
    left += np.clip(-left, 0, doubt * brightening)
    return _Fit(coefficients, left.reshape(shape), shift)


def _colours(thumbnails: np.ndarray) -> np.ndarray:
    """The colour differences [P, 8, 8, 2], blue then red, centred at 0."""
    return thumbnails[:, SIDE * SIDE :].reshape(-1, COLOUR_SIDE, COLOUR_SIDE, 2) - 128


def _above_luma(colours: np.ndarray) -> np.ndarray:
    """Levels by which the brightest channel exceeds the luma, [P, 32, 32]."""
    blue, red = colours[..., 0] / 0.564, colours[..., 1] / 0.713
    green = -(0.299 * red + 0.114 * blue) / 0.587
    return np.maximum(np.maximum(blue, red), green).repeat(_BLOCK, axis=1).repeat(_BLOCK, axis=2)


def _colour_residuals(
    a: np.ndarray, b: np.ndarray, coefficients: np.ndarray, *, luma: np.ndarray, doubt: np.ndarray
) -> np.ndarray:
    """Change of colour [P, 8, 8, 2] less what gain, movement and clipping (where in doubt) explain."""
    gain, offset = coefficients[:, 4, None, None, None], coefficients[:, 5, None, None]
    middle = (a + b) / 2
    ramp = _RAMP.reshape(COLOUR_SIDE, _BLOCK).mean(axis=1)[:, None]
    right, right_stretch, down, down_stretch = coefficients[:, :4, None, None, None].transpose(1, 0, 2, 3, 4)
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


DIGEST_BYTES = 16


def content_digest(data: bytes | str) -> bytes:
    """16 bytes that stand for the content (BLAKE2b)."""
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=DIGEST_BYTES).digest()


class RepeatedDigest(NamedTuple):
    """A value that occurs more than once: the place of its first occurrence, and how often it occurs."""

    position: int
    times: int


class DigestList:
    """Digests in the order they came."""

    def __init__(self) -> None:
        self._words = array("Q")

    def __len__(self) -> int:
        return len(self._words) // 2

    def __getitem__(self, position: int) -> bytes:
        return self._words[2 * position : 2 * position + 2].tobytes()

    def add(self, digest: bytes) -> None:
        """Append one of `digest_of`."""
        self._words.frombytes(digest)

    def distinct(self, where: np.ndarray | None = None) -> int:
        """How many different ones there are, among all or those at the places `where` marks."""
        words = self._pairs() if where is None else self._pairs()[where]
        return len(_groups(words)[0])

    def most_repeated(self, number: int) -> list[RepeatedDigest]:
        """Those that occur most, more than once; of equals the one that came first."""
        first, times = _groups(self._pairs())
        order = np.lexsort((first, -times))[:number]
        return [RepeatedDigest(int(first[n]), int(times[n])) for n in order if times[n] > 1]

    def _pairs(self) -> np.ndarray:
        return np.frombuffer(self._words, dtype=np.uint64).reshape(-1, 2) if self._words else np.zeros((0, 2), "u8")


def _groups(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of the first, and number, of each group of equal rows."""
    if not len(words):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.lexsort((words[:, 1], words[:, 0]))
    ordered = words[order]
    is_new = np.concatenate([[True], np.any(ordered[1:] != ordered[:-1], axis=1)])
    starts = np.flatnonzero(is_new)
    return order[starts], np.diff(np.append(starts, len(words)))
