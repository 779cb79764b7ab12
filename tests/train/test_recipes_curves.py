import math
import tomllib

import pytest

from tests.docs_script import load_write_docs
from tests.train.run_folders import falling
from vlm.errors import UsageError
from vlm.train.recipes import ReferenceCurve, compare_with_reference, reference_curve_of_runs, value_at


def reference(points, *, metric="loss", width=0.1):
    return ReferenceCurve(metric=metric, kind="measured", source="a test", width=width, points=points)


def test_the_value_at_a_share_is_the_mean_around_it():
    lines = falling()
    assert value_at(lines, "loss", share=0.5, steps=100, width=0.1) == pytest.approx(5 - 0.03 * (50 + 55) / 2)
    assert value_at(lines, "loss", share=1.0, steps=100, width=0.1) == pytest.approx(5 - 0.03 * 100)


def test_without_a_width_it_is_the_last_measured():
    assert value_at(falling(), "loss", share=1.0, steps=100, width=0.0) == pytest.approx(2)
    assert value_at(falling(until=95), "loss", share=1.0, steps=100, width=0.0) is None


def test_a_run_that_is_not_there_yet_has_no_value():
    assert value_at(falling(until=50), "loss", share=0.5, steps=100, width=0.1) is None
    assert value_at(falling(until=55), "loss", share=0.5, steps=100, width=0.1) is not None
    assert value_at([], "loss", share=0.5, steps=100, width=0.1) is None


def test_a_run_inside_its_band_is_said_to_be():
    comparison = compare_with_reference(reference(((0.5, 3, 4), (1.0, 1, 3))), falling(), 100)
    assert (comparison.compared, comparison.departures) == (2, ())
    assert "within the reference curve at all 2 points" in comparison.summary(100)


def test_where_a_run_leaves_its_band_is_said_with_step_value_limits_and_side():
    comparison = compare_with_reference(reference(((0.5, 3, 4), (0.8, 1, 2), (1.0, 1, 3))), falling(), 100)
    [out] = comparison.departures
    assert (out.share, out.low, out.high, out.is_better) == (0.8, 1, 2, False)
    assert comparison.summary(100) == (
        "loss (measured): leaves the reference curve at step 80 (80% of the run): 2.525, expected 1 to 2, so worse; "
        "outside at 1 of 3 points."
    )


@pytest.mark.parametrize(
    ("metric", "limits", "is_better"),
    [
        ("loss", (3, 4), True),
        ("loss", (0, 1), False),
        ("text_to_image_recall@10", (0.1, 0.2), True),
        ("text_to_image_recall@10", (0.7, 0.9), False),
    ],
)
def test_a_low_loss_and_a_high_recall_are_the_better_side(metric, limits, is_better):
    [out] = compare_with_reference(reference(((1.0, *limits),), metric=metric), falling(), 100).departures
    assert out.is_better is is_better


def test_only_what_the_run_has_done_is_compared():
    comparison = compare_with_reference(reference(((0.2, 0, 9), (0.9, 0, 9))), falling(until=50), 100)
    assert comparison.compared == 1
    nothing = compare_with_reference(reference(((0.9, 0, 9),)), falling(until=50), 100)
    assert "nothing to compare yet" in nothing.summary(100)


def test_the_length_of_the_run_scales_the_band():
    doubled = [line | {"step": 2 * line["step"]} for line in falling()]
    assert compare_with_reference(reference(((0.5, 3.3, 3.5),)), doubled, 200).departures == ()


def test_the_band_of_runs_is_the_prediction_interval_with_pooled_spread():
    runs = [(falling(shift), 100) for shift in (-0.1, 0.0, 0.1)]
    made = reference_curve_of_runs(runs, "loss", source="3 seeds")
    assert [share for share, _, _ in made.points] == pytest.approx([number / 10 for number in range(1, 11)])
    means = [value_at(falling(), "loss", share=share, steps=100, width=0.1) or 0.0 for share, _, _ in made.points]
    relative = math.sqrt(sum(0.1**2 / mean**2 for mean in means) / len(means))
    half = 2.23 * math.sqrt(4 / 3) * relative  # t for (3 - 1) · 10 / 2 degrees of freedom
    for (_, low, high), mean in zip(made.points, means, strict=True):
        assert (low, high) == pytest.approx((mean * (1 - half), mean * (1 + half)))
    assert all(not compare_with_reference(made, lines, steps).departures for lines, steps in runs)
    assert compare_with_reference(made, falling(1.0), 100).departures


def test_a_band_of_recall_keeps_to_its_range():
    def runs(shift):
        return [line | {"text_to_image_recall@10": min(0.97 + shift, 1.0)} for line in falling()]

    made = reference_curve_of_runs([(runs(0.0), 100), (runs(0.02), 100)], "text_to_image_recall@10", source="")
    assert all(0 <= low < 0.97 and high == 1 for _, low, high in made.points)


def test_shares_that_a_run_did_not_measure_are_left_out():
    sparse = [line if line["step"] % 50 == 0 else {"step": line["step"]} for line in falling()]
    made = reference_curve_of_runs([(sparse, 100), (falling(0.1), 100)], "loss", source="")
    assert [share for share, _, _ in made.points] == [0.5, 1.0]


def test_too_few_runs_or_nothing_measured_is_refused():
    with pytest.raises(UsageError, match="at least two runs"):
        reference_curve_of_runs([(falling(), 100)], "loss", source="")
    with pytest.raises(UsageError, match="nothing"):
        reference_curve_of_runs([(falling(), 100)] * 2, "nothing", source="")


def test_a_curve_is_printed_as_an_entry_that_makes_it_again():
    made = reference_curve_of_runs([(falling(), 100), (falling(0.1), 100)], "loss", source="2 \"seeds\", 'quoted'")
    [again] = tomllib.loads(load_write_docs().baseline_entry("tiny", made))["tiny"]
    assert (again["metric"], again["source"], again["width"]) == (made.metric, made.source, made.width)
    for point, printed in zip(made.points, again["points"], strict=True):
        assert printed == pytest.approx(point, rel=1e-3)


def test_at_one_point_three_runs_leave_two_degrees_of_freedom():
    runs = [([{"step": 100, "text_to_image_recall@10": 0.8 + shift}], 100) for shift in (-0.01, 0.0, 0.01)]
    ((_, low, high),) = reference_curve_of_runs(runs, "text_to_image_recall@10", source="").points
    half = 4.30 * math.sqrt(4 / 3) * 0.01
    assert (low, high) == pytest.approx((0.8 - half, 0.8 + half), abs=1e-3)
