import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.data.decode import open_image, to_rgb
from vlm.data.dedup import (
    MAX_REENCODED_LEVELS,
    MAX_REENCODED_RMS,
    THUMBNAIL_BYTES,
    are_near_duplicates,
    compare_thumbnails,
    connected_components,
    image_signature,
    near_duplicate_pairs,
    near_hash_pairs,
    reencoded_pairs,
    rgb_thumbnail,
)
from vlm.data.sources.source_registry import open_source


def pairs_of(blocks):
    return [(int(one), int(other)) for some, others in blocks for one, other in zip(some, others, strict=True)]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), number=st.integers(0, 60), distance=st.integers(0, 15))
def test_every_pair_of_near_hashes_is_found_once(seed, number, distance):
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, 4, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 9), replace=False)) for _ in range(number)]
    hashes = centres[rng.integers(0, 4, number)] ^ np.array(flips, dtype=np.uint64)
    found = pairs_of(near_hash_pairs(hashes, distance=distance))
    expected = {
        (one, other)
        for one in range(number)
        for other in range(one + 1, number)
        if int(hashes[one] ^ hashes[other]).bit_count() <= distance
    }
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_signature_does_not_depend_on_the_scale_it_was_decoded_at(make_image):
    small, large = (image_signature(make_image(3, size=size)) for size in ((160, 120), (640, 480)))
    assert (small.hash ^ large.hash).bit_count() <= 6
    assert small.thumbnail.shape == (THUMBNAIL_BYTES,)
    assert small.thumbnail.dtype == np.uint8
    thumbnails = np.stack([small.thumbnail, large.thumbnail])
    assert are_near_duplicates(thumbnails, np.array([0]), np.array([1])).all()


def test_signatures_equal_bit_for_bit_are_paired_with_the_first(make_image):
    signatures = [image_signature(make_image(number)) for number in (1, 0, 0, 1, 0, 2)]
    hashes = np.array([signature.hash for signature in signatures], dtype=np.uint64)
    thumbnails = np.stack([signature.thumbnail for signature in signatures])
    assert sorted(pairs_of(near_duplicate_pairs(hashes, thumbnails, distance=10))) == [(0, 3), (1, 2), (1, 4)]
    assert pairs_of(near_duplicate_pairs(hashes[:0], thumbnails[:0], distance=10)) == []


def test_brightness_is_explained_and_another_colour_is_not(make_image):
    one = image_signature(make_image(5, size=(160, 120))).thumbnail[None].astype(np.float32)
    brighter, coloured = one.copy(), one.copy()
    brighter[:, :1024] = np.minimum(brighter[:, :1024] * 1.02 + 2, 255)
    coloured[:, 1024:] += 4
    left = compare_thumbnails(one, brighter)
    assert left.is_same().all()
    assert left.shift[0] > 2
    assert not compare_thumbnails(one, coloured).is_same().any()


def test_a_jpeg_decoded_at_a_reduced_size_is_not_shifted(make_image):
    image = Image.open(io.BytesIO(make_image(4, size=(401, 533)))).convert("RGB")
    thumbnails = []
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        image.save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
        thumbnails.append(image_signature(file.getvalue()).thumbnail[None].astype(np.float32))
    assert compare_thumbnails(*thumbnails).moved[0] < 0.05


def patches() -> np.ndarray:
    """Soft grey patches of luma 40 to 240."""
    small = Image.fromarray(np.random.default_rng(3).integers(40, 240, (8, 8), dtype=np.uint8))
    luma = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32).ravel()
    return np.concatenate([luma, np.full(128, 128, dtype=np.float32)])[None]


def test_brightening_that_is_clipped_is_explained_and_too_much_is_not():
    one = patches()
    brighter, much_brighter = one.copy(), one.copy()
    brighter[:, :1024] = np.minimum(one[:, :1024] * 1.05, 235)
    much_brighter[:, :1024] = np.minimum(one[:, :1024] * 1.12, 255)
    assert compare_thumbnails(one, brighter).is_same().all()
    assert compare_thumbnails(brighter, one).is_same().all()
    assert not compare_thumbnails(one, much_brighter).is_same().any()


def test_darkening_takes_white_along():
    one = np.concatenate([np.full((32, 32), 255.0).ravel(), np.full(128, 128)]).astype(np.float32)[None]
    one[:, :1024].reshape(32, 32)[8:24, 8:24] = patches()[0, :1024].reshape(32, 32)[8:24, 8:24]
    darker, spoilt = one.copy(), one.copy()
    darker[:, :1024] *= 0.95
    spoilt[:, :1024].reshape(32, 32)[:4] = 235
    assert compare_thumbnails(one, darker).is_same().all()
    assert not compare_thumbnails(one, spoilt).is_same().any()


@settings(deadline=None, max_examples=50)
@given(number=st.integers(1, 30), pairs=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_a_component_is_named_by_its_least_member(number, pairs):
    pairs = [(one % number, other % number) for one, other in pairs]
    groups = list(range(number))
    for one, other in pairs * number:  # the slow, plain way: pass the least number on until nothing changes
        groups[one] = groups[other] = min(groups[one], groups[other])
    block = (np.array([one for one, _ in pairs], np.int64), np.array([other for _, other in pairs], np.int64))
    assert connected_components([block], number).tolist() == groups


@pytest.mark.parametrize("seed", range(3))
def test_reencoded_pairs_are_those_a_full_comparison_finds(seed):
    rng = np.random.default_rng(seed)
    originals = rng.integers(40, 215, (60, 768))
    noisy = originals[rng.integers(0, 60, 200)] + rng.normal(0, rng.uniform(0, 4, (200, 1)), (200, 768)).round()
    thumbnails = np.concatenate([originals, noisy, originals[:5]]).astype(np.uint8)
    found = {frozenset(pair) for pair in reencoded_pairs(thumbnails)}
    wide = thumbnails.astype(int)
    expected = set()
    firsts = {thumbnail.tobytes(): row for row, thumbnail in reversed(list(enumerate(thumbnails)))}
    for one in range(len(wide)):
        if firsts[thumbnails[one].tobytes()] != one:
            expected.add(frozenset((firsts[thumbnails[one].tobytes()], one)))
            continue
        for other in range(one):
            if firsts[thumbnails[other].tobytes()] == other:
                difference = np.abs(wide[one] - wide[other])
                if difference.max() <= MAX_REENCODED_LEVELS and (difference**2).mean() <= MAX_REENCODED_RMS**2:
                    expected.add(frozenset((one, other)))
    assert found == expected
    assert len(found) > 20


@pytest.mark.parametrize("form", [{"format": "JPEG", "quality": 80}, {"format": "PNG"}, {"format": "WEBP"}])
def test_an_encoded_copy_is_the_same_image_and_its_neighbours_are_not(datasets, form):
    source = open_source(str(datasets / "fashion"))
    originals = [to_rgb(open_image(source.read(number).image)) for number in range(3000, 3200)]
    copies = []
    for image in originals[:40]:
        file = io.BytesIO()
        image.save(file, **form)
        copies.append(to_rgb(Image.open(io.BytesIO(file.getvalue()))))
    thumbnails = np.stack([rgb_thumbnail(image) for image in originals + copies])
    pairs = set(reencoded_pairs(thumbnails))
    copied = {(min(pair), max(pair)) for pair in pairs if max(pair) >= 200}
    assert copied >= {(number, 200 + number) for number in range(40)}
    bytes_of = [source.read(number).image for number in range(3000, 3200)]
    assert all(bytes_of[one] == bytes_of[other] for one, other in pairs if max(one, other) < 200)
