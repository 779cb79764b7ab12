import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.decode import open_image, to_rgb
from vlm.data.dedup import rgb_thumbnail
from vlm.data.sources.source_registry import open_source
from vlm.data.split import GroupedSplit
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


def test_fashion_forms_the_groups_that_were_measured(datasets):
    source = open_source(str(datasets / "fashion"))
    groups = GroupedSplit(by_caption=True)
    for number in range(len(source)):
        pair = source.read(number)
        groups.add(number, pair.key, pair.captions, rgb_thumbnail(to_rgb(open_image(pair.image))))
    held_out = groups.hold_out(1000, seed=0)
    assert (held_out.samples, held_out.groups, held_out.largest_group) == (8383, 6000, 25)
    assert (held_out.merged_by_caption, held_out.merged_by_picture) == (2354, 29)
    assert 1000 <= len(held_out.numbers) <= 1010
