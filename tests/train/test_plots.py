import pytest
from matplotlib.figure import Figure

from tests.train.run_folders import falling
from vlm.train.plots import draw_comparison, draw_curves
from vlm.train.recipes import ReferenceCurve


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: heading of each panel → (label → points), and labels of reference curves."""
    panels: dict[str, dict[str, list]] = {}
    save = Figure.savefig

    def spy(figure, *arguments, **options):
        for axes in figure.axes:
            lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
            panels[axes.get_title()] = {name: points for name, points in lines.items() if not name.startswith("_")}
            panels[axes.get_title()] |= {area.get_label(): [] for area in axes.collections}
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return panels


def test_a_run_is_drawn_as_it_was_measured(tmp_path, drawn):
    draw_curves(falling(), tmp_path / "plots.png", title="a run")
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")
    assert drawn["loss"]["loss"][0] == pytest.approx([5, 4.85])
    assert drawn["recall on val"]["text→image @10"][-1] == pytest.approx([100, 0.5])
    assert drawn["inverse temperature"]["logit_scale"][-1] == pytest.approx([100, 24])
    assert {"gradient norm, before clipping", "time waiting for data", "model FLOP utilisation"} <= drawn.keys()


def test_parts_of_the_loss_are_drawn_where_there_are_several(tmp_path, drawn):
    lines = [line | {"clip": 1.0, "caption": 2.0} for line in falling()]
    draw_curves(lines, tmp_path / "plots.png", title="")
    assert set(drawn["loss"]) == {"loss", "clip", "caption"}


def test_what_was_not_measured_is_left_out(tmp_path, drawn):
    draw_curves([{"step": 1, "loss": 2.0}], tmp_path / "plots.png", title="")
    assert set(drawn) == {"loss"}
    draw_curves([], tmp_path / "empty.png", title="")
    assert (tmp_path / "empty.png").is_file()


def test_many_points_are_smoothed_but_never_past_their_ends(tmp_path, drawn):
    lines = [{"step": step, "loss": float(step % 2)} for step in range(400)]
    draw_curves(lines, tmp_path / "plots.png", title="")
    smooth = drawn["loss"]["loss"]
    assert smooth[0] == [0, 0]
    assert smooth[-1] == [399, 1]
    assert all(0.4 < value < 0.6 for _, value in smooth[20:-20])


def test_runs_are_drawn_over_one_another_with_the_band_behind(tmp_path, drawn):
    reference = ReferenceCurve(metric="loss", kind="measured", source="", width=0.1, points=((0.5, 3, 4), (1.0, 1, 2)))
    runs = {"a": falling(), "b": falling(1.0)}
    draw_comparison(runs, tmp_path / "compare.png", title="", references=[reference], steps=100)
    assert set(drawn["loss, measured reference"]) == {"a", "b", "expected"}
    assert "loss" not in drawn
    assert set(drawn["recall on val, text→image @1"]) == {"a", "b"}


def test_a_published_figure_is_drawn_though_nothing_was_measured(tmp_path, drawn):
    reference = ReferenceCurve(metric="zero_shot_top1", kind="published", source="", points=((1.0, 0.1, 0.2),))
    draw_comparison({"a": falling()}, tmp_path / "compare.png", title="", references=[reference], steps=100)
    assert "zero shot top1, published reference" in drawn
