import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.data.decode import open_image, to_rgb
from vlm.data.sources.source_registry import open_source
from vlm.data.split import MAX_LEVELS, MAX_RMS_LEVELS, GroupedSplit, find_duplicate_pairs, make_thumbnail
from vlm.errors import UsageError

WORDS = ["a dog", "A  Dog", "a cat", "ein Hund", "狗", "red", "blue"]


def thumbnail(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, 768, dtype=np.uint8)


def normal(text: str) -> str:
    return " ".join(text.casefold().split())


samples = st.lists(
    st.tuples(st.lists(st.sampled_from(WORDS) | st.text(min_size=1), min_size=1, max_size=3), st.integers(0, 30)),
    min_size=2,
    max_size=40,
)


@settings(deadline=None)
@given(samples=samples, at_least=st.integers(1, 20), seed=st.integers(0, 5))
def test_samples_with_a_common_caption_or_image_are_never_separated(samples, at_least, seed):
    groups = GroupedSplit(by_caption=True)
    for number, (texts, image) in enumerate(samples):
        groups.add(number, f"key-{number}", {"": tuple(texts)}, thumbnail(image))
    try:
        held_out = groups.hold_out(at_least, seed=seed)
    except UsageError:
        return
    assert at_least <= len(held_out.numbers) < len(samples)
    sides = [number in held_out.numbers for number in range(len(samples))]
    for one, (texts, image) in enumerate(samples):
        for other, (other_texts, other_image) in enumerate(samples):
            if image == other_image or {*map(normal, texts)} & {*map(normal, other_texts)}:
                assert sides[one] == sides[other]
    joined = held_out.merged_by_caption + held_out.merged_by_picture
    assert held_out.groups == len(samples) - joined


def test_the_draw_depends_on_the_seed_alone():
    def draw(seed: int) -> frozenset[int]:
        groups = GroupedSplit(by_caption=True)
        for number in range(50):
            groups.add(number, f"key-{number}", {"": (f"caption {number}",)}, thumbnail(number))
        return groups.hold_out(10, seed=seed).numbers

    assert draw(0) == draw(0)
    assert len(draw(0)) == 10
    assert draw(0) != draw(1)


def test_labels_do_not_group_but_images_do():
    groups = GroupedSplit(by_caption=False)
    for number in range(20):
        groups.add(number, f"key-{number}", {"": ("a photo of a dog.",)}, thumbnail(number // 2))
    held_out = groups.hold_out(3, seed=0)
    assert (held_out.groups, held_out.merged_by_caption, held_out.merged_by_picture) == (10, 0, 10)
    assert len(held_out.numbers) == 4


def test_a_large_group_is_held_out_last():
    groups = GroupedSplit(by_caption=True)
    for number in range(100):
        text = "one of many" if number < 60 else f"caption {number}"
        groups.add(number, f"key-{number}", {"": (text,)}, thumbnail(number))
    for seed in range(10):
        assert min(groups.hold_out(20, seed=seed).numbers) >= 60


def test_holding_out_everything_is_refused():
    groups = GroupedSplit(by_caption=True)
    for number in range(10):
        groups.add(number, f"key-{number}", {"": ("the same",)}, thumbnail(number))
    with pytest.raises(UsageError, match=r"10 usable samples form 1 groups .* Hold out fewer"):
        groups.hold_out(2, seed=0)


@pytest.mark.parametrize("seed", range(3))
def test_same_images_finds_what_a_full_comparison_finds(seed):
    rng = np.random.default_rng(seed)
    originals = rng.integers(40, 215, (60, 768))
    noisy = originals[rng.integers(0, 60, 200)] + rng.normal(0, rng.uniform(0, 4, (200, 1)), (200, 768)).round()
    thumbnails = np.concatenate([originals, noisy, originals[:5]]).astype(np.uint8)
    found = {frozenset(pair) for pair in find_duplicate_pairs(thumbnails)}
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
                if difference.max() <= MAX_LEVELS and (difference**2).mean() <= MAX_RMS_LEVELS**2:
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
    thumbnails = np.stack([make_thumbnail(image) for image in originals + copies])
    pairs = set(find_duplicate_pairs(thumbnails))
    copied = {(min(pair), max(pair)) for pair in pairs if max(pair) >= 200}
    assert copied >= {(number, 200 + number) for number in range(40)}
    bytes_of = [source.read(number).image for number in range(3000, 3200)]
    assert all(bytes_of[one] == bytes_of[other] for one, other in pairs if max(one, other) < 200)


def test_fashion_forms_the_groups_that_were_measured(datasets):
    source = open_source(str(datasets / "fashion"))
    groups = GroupedSplit(by_caption=True)
    for number in range(len(source)):
        pair = source.read(number)
        groups.add(number, pair.key, pair.captions, make_thumbnail(to_rgb(open_image(pair.image))))
    held_out = groups.hold_out(1000, seed=0)
    assert (held_out.samples, held_out.groups, held_out.largest_group) == (8383, 6000, 25)
    assert (held_out.merged_by_caption, held_out.merged_by_picture) == (2354, 29)
    assert 1000 <= len(held_out.numbers) <= 1010
