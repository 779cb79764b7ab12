import json

import pytest

import vlm
from tests.train.run_folders import falling, write_run
from vlm.cli.main import main
from vlm.train import recipes
from vlm.train.recipes import ReferenceCurve


def run(capsys, *words):
    """(exit code, stdout, stderr) of a command."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def banded(monkeypatch):
    """The fashion recipe, with a reference curve that `falling` stays in."""
    points = tuple((share, 4.0 - 3 * share, 6.0 - 3 * share) for share in (0.2, 0.4, 0.6, 0.8, 1.0))
    reference = ReferenceCurve(metric="loss", kind="measured", source="three hands", width=0.1, points=points)
    recipe = recipes.RECIPES["fashion"]
    changed = type(recipe)(preset="fashion", data="", prepare=(), train="", published=(reference,))
    monkeypatch.setitem(recipes.RECIPES, "fashion", changed)


def test_runs_are_listed_with_state_speed_and_best(capsys, tmp_path):
    write_run(tmp_path / "done", falling(), is_finished=True)
    write_run(tmp_path / "group" / "half", falling(until=50), steps=100)
    code, out, _ = run(capsys, "runs", tmp_path)
    assert code == 0
    for shown in ("done", "finished", "group/half", "stopped at 50", "50 of 100", "tiny", "clip", "20.0 / 50.0 at 100"):
        assert shown in out
    assert "40%" in out


def test_runs_as_json_hold_all_there_is(capsys, tmp_path):
    write_run(tmp_path / "half", falling(until=50), steps=100)
    _, out, _ = run(capsys, "runs", tmp_path, "--json")
    [told] = json.loads(out)
    assert told["best"] == {"step": 50, "text_to_image_recall@10": 0.25, "text_to_image_recall@1": 0.1}
    assert (told["state"], told["samples"], told["seconds"], told["mfu"]) == ("stopped", 400, 100.0, 0.4)
    assert (told["architecture"], told["objective"], told["peak_source"]) == ("tiny", "clip", "a hand")


def test_the_calls_give_what_the_verbs_print(capsys, tmp_path, banded):
    one = write_run(tmp_path / "one", falling(), is_finished=True)
    write_run(tmp_path / "two", falling(0.5, until=50), steps=100)
    assert json.loads(run(capsys, "runs", tmp_path, "--json")[1]) == vlm.list_runs(tmp_path).to_json()
    comparison = vlm.compare_runs([one], to="fashion")
    assert json.loads(run(capsys, "runs", "compare", one, "--to", "fashion", "--json")[1]) == comparison.to_json()
    assert comparison.verdicts()[0] == "one: as expected, within its reference curves."
    comparison.draw(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
    with pytest.raises(vlm.UsageError, match="cannot be compared with itself"):
        vlm.compare_runs([one])


def test_no_runs_and_no_folder_are_said(capsys, tmp_path):
    assert run(capsys, "runs", tmp_path / "nowhere")[0] == 2
    code, _, err = run(capsys, "runs", tmp_path)
    assert code == 0
    assert "There is no run" in err


def test_a_run_without_a_line_yet_is_listed(capsys, tmp_path):
    write_run(tmp_path / "fresh", [], age_seconds=0)
    code, out, _ = run(capsys, "runs", tmp_path)
    assert code == 0
    assert "running" in out


def test_runs_are_set_side_by_side_with_a_image(capsys, tmp_path):
    one = write_run(tmp_path / "one", falling(), is_finished=True)
    changed = 'seed = 0\n[model]\narchitecture = "small"\n[objective]\nobjective = "clip"\n'
    other = write_run(tmp_path / "other", falling(0.5), is_finished=True, config=changed)
    code, out, _ = run(capsys, "runs", "compare", one, other, "--out", tmp_path / "compare.png")
    assert code == 0
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "model.architecture" in out
    assert "seed" not in out
    _, out, _ = run(capsys, "runs", "compare", one, other, "--json")
    told = json.loads(out)
    assert told["settings"] == {"model.architecture": ["tiny", "small"]}
    assert told["figures"]["loss"] == pytest.approx([2.0, 2.5])


def test_a_run_inside_the_band_of_its_recipe_is_as_expected(capsys, tmp_path, banded):
    good = write_run(tmp_path / "good", falling(), is_finished=True)
    code, out, _ = run(capsys, "runs", "compare", good, "--to", "fashion", "--out", tmp_path / "compare.png")
    assert code == 0
    assert "good: as expected, within its reference curves." in out
    assert "Source: three hands" in out
    assert (tmp_path / "compare.png").is_file()


def test_a_run_that_leaves_the_band_is_told_where(capsys, tmp_path, banded):
    lines = [line | {"loss": line["loss"] + (3 if line["step"] > 50 else 0)} for line in falling()]
    bad = write_run(tmp_path / "bad", lines, is_finished=True)
    code, out, _ = run(capsys, "runs", "compare", bad, "--to", "fashion")
    assert code == 0
    assert "bad: NOT as expected" in out
    assert "leaves the reference curve at step 60 (60% of the run)" in out
    _, out, _ = run(capsys, "runs", "compare", bad, "--to", "fashion", "--json")
    [[verdict]] = json.loads(out)["verdicts"]
    assert [departure["step"] for departure in verdict["departures"]] == [60, 80, 100]


def test_a_run_that_goes_on_is_judged_so_far(capsys, tmp_path, banded):
    half = write_run(tmp_path / "half", falling(until=50), steps=100)
    _, out, _ = run(capsys, "runs", "compare", half, "--to", "fashion")
    assert "half: as expected" in out
    assert "stopped at step 50 of 100; this is so far" in out


def test_a_run_of_unknown_length_cannot_be_judged(capsys, tmp_path, banded):
    lost = write_run(tmp_path / "lost", falling(until=50))
    code, _, err = run(capsys, "runs", "compare", lost, "--to", "fashion")
    assert code == 2
    assert "how many steps" in err


def test_a_published_figure_is_compared_with_what_was_evaluated(capsys, tmp_path):
    done = write_run(tmp_path / "done", falling(), is_finished=True)
    _, out, _ = run(capsys, "runs", "compare", done, "--to", "cc3m")
    assert "nothing to compare yet" in out
    (done / "evaluation").mkdir()
    (done / "evaluation" / "evaluation.json").write_text(json.dumps({"zero_shot": {"top1": 0.12}}))
    _, out, _ = run(capsys, "runs", "compare", done, "--to", "cc3m")
    assert "NOT as expected" in out
    assert "12.0%, expected 15.8% to 18.5%" in out


@pytest.mark.parametrize("words", [["one"], ["one", "--to", "fashon"], ["one", "nowhere"]])
def test_too_little_or_unknown_is_misuse(capsys, tmp_path, words):
    write_run(tmp_path / "one", falling(), is_finished=True)
    places = [tmp_path / word if word in ("one", "nowhere") else word for word in words]
    assert run(capsys, "runs", "compare", *places)[0] == 2


def test_the_listing_needs_no_torch(tmp_path):
    import subprocess
    import sys

    write_run(tmp_path / "done", falling(), is_finished=True)
    code = (
        f"import sys; from vlm.cli.main import main; main(['runs', {str(tmp_path)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
