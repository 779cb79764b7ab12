import numpy as np
import pytest

from vlm.errors import UsageError
from vlm.evaluation.heat_map_scores import insertion_deletion, pointing_hit


def test_the_maximum_decides_and_ties_count_in_part():
    mask = np.zeros((6, 6), bool)
    mask[2:4, 2:4] = True
    heat = np.zeros((6, 6), np.float32)
    heat[2, 3] = 2
    assert pointing_hit(heat, mask) == 1
    heat[0, 0] = 3
    assert pointing_hit(heat, mask) == 0
    heat[2, 3] = 3
    assert pointing_hit(heat, mask) == 0.5
    # a map of one value hits as often as chance
    assert pointing_hit(np.ones((6, 6), np.float32), mask) == pytest.approx(4 / 36)


def test_a_margin_lets_the_maximum_lie_beside_the_thing():
    mask = np.zeros((8, 8), bool)
    mask[4, 4] = True
    heat = np.zeros((8, 8), np.float32)
    heat[1, 0] = 1  # five away: three rows and four columns
    assert pointing_hit(heat, mask, margin=4.9) == 0
    assert pointing_hit(heat, mask, margin=5) == 1


def test_what_cannot_be_scored_is_refused():
    heat, image = np.ones((4, 4), np.float32), np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(UsageError, match="nothing to point at"):
        pointing_hit(heat, np.zeros((4, 4), bool))
    with pytest.raises(UsageError, match="one size"):
        pointing_hit(heat, np.ones((4, 5), bool))
    with pytest.raises(UsageError, match=r"A heat map of \(4, 4\) pixels for an image of \(4, 5\)"):
        insertion_deletion(lambda images: np.zeros(len(images)), np.zeros((3, 4, 5), np.uint8), heat)
    with pytest.raises(UsageError, match="steps = 0"):
        insertion_deletion(lambda images: np.zeros(len(images)), image, heat, steps=0)


def spot_image():
    """A white spot, a sixteenth of a black image, and how white the spot is as the score."""
    image = np.zeros((3, 32, 32), np.uint8)
    image[:, 8:16, 8:16] = 255
    heat = image[0].astype(np.float32) / 255
    return image, heat, lambda images: images[:, 0, 8:16, 8:16].mean(axis=(1, 2)) / 255


def test_a_map_of_what_counts_inserts_early_and_deletes_early():
    image, heat, score = spot_image()
    good = insertion_deletion(score, image, heat, steps=16)
    bad = insertion_deletion(score, image, 1 - heat, steps=16)
    assert good.insertion > bad.insertion
    assert good.deletion < bad.deletion
    assert good.difference > bad.difference
    # the spot is a sixteenth of the image, so one step inserts it all
    assert good.insertion_curve[1:] == (1.0,) * 16
    assert bad.deletion_curve[:16] == (1.0,) * 16
    mean = round(255 / 16) / 255
    assert good.deletion_curve[1] == good.deletion_curve[-1] == pytest.approx(mean)
    # trapezoids over 16 steps, the first of which goes from all to the mean
    assert good.deletion == pytest.approx(((1 + mean) / 2 + 15 * mean) / 16)
    assert set(good.to_json()) == {"insertion", "deletion", "insertion_curve", "deletion_curve"}


def test_all_maps_end_alike():
    image, heat, score = spot_image()
    rng = np.random.default_rng(0)
    ends = {
        (curves.insertion_curve[0], curves.insertion_curve[-1], curves.deletion_curve[0], curves.deletion_curve[-1])
        for curves in (insertion_deletion(score, image, of, steps=5) for of in (heat, rng.random((32, 32))))
    }
    assert len(ends) == 1
