"""Whether two pictures are one: encoded anew, resized, a little brighter, or cut by a hair at the edges.

A look is a 64-bit hash, by which candidates are found, and a thumbnail, by which they are confirmed.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm.data.decode import open_picture, to_rgb, upright_size

SIDE = 32
COLOUR_SIDE = 8
THUMBNAIL_BYTES = SIDE * SIDE + COLOUR_SIDE * COLOUR_SIDE * 2
"""Of a thumbnail: 32×32 of luma, then 8×8 of the two colour differences (centred at 128)."""

DISTANCE = 10
"""Bits two hashes of one picture may differ in: of 13 kinds of copy of 15,724 photos all but 5 copies lay within."""

_DECODED_SIDE = 64
_BANDS = 4
_BAND_BITS = 16
_PAIRS_AT_ONCE = 1 << 22
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class Look(NamedTuple):
    """What a picture is recognised by: a 64-bit hash, and a thumbnail, uint8 [1152]."""

    hash: int
    thumbnail: np.ndarray


def look_of(data: bytes) -> Look:
    """The look of an encoded picture, decoded no larger than needed.

    The hash says which of the 64 lowest frequencies of its 32×32 cosine transform, the mean left out, are above
    their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", takes the
    8×8 lowest). Two hashes therefore differ in an even number of bits.

    Raises:
        BadSample: the picture cannot be decoded.
    """
    picture = open_picture(data)
    width, height = upright_size(picture)
    rgb = to_rgb(picture, resolution=min(1.0, _DECODED_SIDE / min(width, height)))
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
    return Look(int.from_bytes(bits.tobytes(), "big"), thumbnail)


def _lowest_frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the 64 lowest frequencies, so ordered that each band of 16 holds low and high ones."""
    places = sorted(((i, j) for i in range(SIDE) for j in range(SIDE) if i + j), key=lambda p: (sum(p), p))[:64]
    dealt = [place for band in range(_BANDS) for place in places[band::_BANDS]]
    return np.array([row for row, _ in dealt]), np.array([column for _, column in dealt])


_STEPS = np.arange(SIDE)
_COSINES = np.cos(np.pi / SIDE * (_STEPS[None, :] + 0.5) * _STEPS[:, None]).astype(np.float32)
_ROWS, _COLUMNS = _lowest_frequencies()


def near_hashes(hashes: np.ndarray, *, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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
            for one, other in _meetings(keys, starts, mask):
                one, other = order[one], order[other]
                is_near = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
                one, other = one[is_near], other[is_near]
                is_new = np.ones(len(one), dtype=bool)
                for earlier in bands[:number]:
                    is_new &= np.bitwise_count(earlier[one] ^ earlier[other]) > radius
                if is_new.any():
                    yield np.minimum(one, other)[is_new], np.maximum(one, other)[is_new]


def _meetings(keys: np.ndarray, starts: np.ndarray, mask: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places among sorted keys with one ^ other == mask, each once, in blocks of bounded size."""
    partners = keys ^ mask
    first = np.where(partners > keys, starts[partners], np.arange(len(keys)) + 1)
    counts = np.where(partners >= keys, starts[partners + 1] - first, 0)
    chosen = np.flatnonzero(counts)
    ends = np.cumsum(counts[chosen])
    done = 0
    while done < len(chosen):
        before = ends[done - 1] if done else 0
        upto = max(int(np.searchsorted(ends, before + _PAIRS_AT_ONCE, side="right")), done + 1)
        block = chosen[done:upto]
        sizes = counts[block]
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield np.repeat(block, sizes), np.repeat(first[block], sizes) + offsets
        done = upto
