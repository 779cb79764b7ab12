import json

import pytest

import vlm
from vlm.cli.main import main
from vlm.data.curation.pipeline import FILTERS
from vlm.data.selection import read_selection


def test_a_selection_is_written_with_its_table(scene_shards, tmp_path, capsys):
    out = tmp_path / "a.selection"
    words = ["curate", str(scene_shards / "train"), str(out), "--filter", "size:min=8", "--filter", "sample:share=0.5"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "sample:share=0.5" in shown.out
    assert f"--selection {out}" in shown.err
    selection = read_selection(out)
    assert 0 < selection.kept < 96
    assert [step.get("rule") for step in selection.lineage] == [None, "size", "sample"]
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_selections_given_compose_and_the_report_tells_the_curve(scene_shards, tmp_path, capsys):
    shards, concepts = str(scene_shards / "train"), tmp_path / "concepts.txt"
    concepts.write_text("red\nblue\n")
    one, both, report = tmp_path / "one.selection", tmp_path / "both.selection", tmp_path / "report.json"
    assert main(["curate", shards, str(one), "--filter", "sample:share=0.5"]) == 0
    rest = ["--and", str(one), "--weight", "2", "--report", str(report), "--json"]
    rule = f"balance:concepts={concepts},cap=5"
    capsys.readouterr()
    assert main(["curate", shards, str(both), "--filter", rule, "--filter", "weight:times=1", *rest]) == 0
    result = json.loads(capsys.readouterr().out)
    selection = read_selection(both)
    assert result["visits"] == selection.visits == 2 * selection.kept
    assert [step["step"] for step in result["lineage"]] == ["curate", "rule", "rule", "and", "weight"]
    curves = json.loads(report.read_text())["curves"]
    assert [curve["rule"] for curve in curves] == ["balance"]
    assert {row["concept"] for row in curves[0]["curve"]} == {"red", "blue"}
    assert main(["curate", shards, str(tmp_path / "rest.selection"), "--minus", str(one)]) == 0
    assert read_selection(tmp_path / "rest.selection").kept == 96 - read_selection(one).kept


def test_the_call_makes_and_gives_what_the_verb_does(scene_shards, tmp_path, capsys):
    shards, out, page = scene_shards / "train", tmp_path / "a.selection", tmp_path / "page.html"
    half = vlm.curate([shards], tmp_path / "half.selection", filter="sample:share=0.5", seed=3)
    flags = ["--filter", "size:min=8", "--filter", "sample:share=0.5", "--minus", str(half.out), "--weight", "2"]
    assert main(["curate", str(shards), str(out), *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = read_selection(out)
    out.unlink()
    filters = ["size:min=8", "sample:share=0.5"]
    options = {"filter": filters, "minus": half.out, "weight": 2}
    dry = vlm.curate(shards, out, **options, dry_run=True, html=page)
    assert page.exists()
    assert not out.exists()
    made = vlm.curate(shards, out, **options)
    assert made.to_json() == printed == dry.to_json() | {"out": str(out)}
    assert read_selection(out).fingerprint == written.fingerprint
    with pytest.raises(vlm.UsageError, match="exists already"):
        vlm.curate(shards, out)


def test_a_dry_run_writes_only_the_page(scene_shards, tmp_path, capsys):
    out, page = tmp_path / "a.selection", tmp_path / "page.html"
    words = ["curate", str(scene_shards / "val"), str(out), "--filter", "sample:share=0.5", "--dry-run"]
    assert main([*words, "--html", str(page)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert "drawn by chance" in page.read_text()
    assert "no selection was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "rest", "expected"),
    [
        ("a.txt", [], "must end in .selection"),
        ("none/a.selection", [], "There is no folder"),
        ("a.selection", ["--filter", "neer:top=0.5"], "did you mean 'near'"),
        ("a.selection", ["--filter", "near:top=0.5"], "vlm score"),
        ("a.selection", ["--and", "none.selection"], "There is no selection"),
        ("a.selection", ["--weight", "-1"], "outside"),
    ],
)
def test_misuse_is_said_and_leaves_nothing(scene_shards, tmp_path, capsys, out, rest, expected):
    assert main(["curate", str(scene_shards / "val"), str(tmp_path / out), *rest]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_rule():
    from vlm.cli.curate import Curate

    assert not [name for name in FILTERS if name not in (Curate.__doc__ or "")]
