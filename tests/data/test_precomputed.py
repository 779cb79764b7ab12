import numpy as np
import pytest

from vlm.data.caption_sampler import SampledCaption
from vlm.data.precomputed_features import PrecomputedFeatures, view_rng
from vlm.data.samples import Sample
from vlm.errors import BadSample, UsageError, VlmError

NAMES = ("teacher_image", "teacher_text")


def reinforced(**changed):
    arrays = {
        "view_seeds": np.array([7, 8, 9], np.uint64),
        "teacher_image": np.arange(6, dtype=np.float16).reshape(3, 2),
        "teacher_text": np.arange(10, dtype=np.float32).reshape(5, 2),
    }
    return Sample(key="k", image=b"", captions={}, metadata={}, arrays=arrays | changed)


def caption(number):
    return SampledCaption(text="a dog", language="en", number=number)


def test_the_view_and_the_rows_belong_together():
    stored, sample = PrecomputedFeatures(names=NAMES), reinforced()
    number, rng = stored.sample_view(sample, np.random.default_rng(0))
    assert rng.random() == view_rng([7, 8, 9][number]).random()
    image, text = stored.rows(sample, view=number, caption=caption(4))
    assert (image.tolist(), text.tolist()) == ([2 * number, 2 * number + 1], [8, 9])
    assert image.dtype == text.dtype == np.float32


def test_only_what_is_needed_is_read():
    assert PrecomputedFeatures(names=NAMES).members == ("view_seeds", *NAMES)
    assert PrecomputedFeatures(names=("text_embedding",)).members == ("text_embedding",)
    assert PrecomputedFeatures().members == ()


@pytest.mark.parametrize(
    "changed",
    [
        {"view_seeds": np.zeros(3)},
        {"view_seeds": np.zeros(0, np.uint64)},
        {"teacher_image": np.zeros((3, 2), np.int64)},
        {"teacher_image": np.zeros(3, np.float32)},
        {"teacher_text": np.zeros((2, 2), np.float32)},
        {"teacher_text": np.full((5, 2), 1e300)},
        {"view_seeds": np.array([1, -2, 3])},
    ],
)
def test_arrays_that_do_not_fit_make_a_bad_sample(changed):
    stored, sample = PrecomputedFeatures(names=NAMES), reinforced(**changed)
    with pytest.raises(BadSample, match="bad array"):
        stored.rows(sample, view=stored.sample_view(sample, np.random.default_rng(0))[0], caption=caption(4))


def test_tags_have_no_row():
    with pytest.raises(BadSample, match="row -1"):
        PrecomputedFeatures(names=("teacher_text",)).rows(reinforced(), view=0, caption=caption(-1))


def test_rows_become_matrices_and_different_lengths_are_named():
    stored = PrecomputedFeatures(names=("teacher_text",))
    rows = [(np.ones(2, np.float32),), (np.ones(2, np.float32),)]
    assert stored.stack(rows, ["a", "b"])["teacher_text"].shape == (2, 2)
    with pytest.raises(VlmError, match="different lengths"):
        stored.stack([*rows, (np.ones(3, np.float32),)], ["a", "b", "c"])


def test_an_unknown_array_is_refused():
    with pytest.raises(UsageError, match="no stored array 'teacher'"):
        PrecomputedFeatures(names=("teacher",))
