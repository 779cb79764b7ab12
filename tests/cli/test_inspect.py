import json

import pytest

import vlm
import vlm.data.inspection.inspection as inspection
from tests.data.tar_fixture import write_tar
from vlm.cli.main import main


@pytest.mark.parametrize("number", [1, 3])
def test_shards_of_which_none_can_be_read_end_in_the_cause(tmp_path, capsys, number):
    for place in range(number):
        (tmp_path / f"{place}.tar").write_bytes(b"this was never a tar" * 100)
    assert main(["inspect", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "0.tar is not a tar" in shown.err
    assert ("The other 2 cannot be read either" in shown.err) == (number == 3)
    assert shown.out == ""
    write_tar(tmp_path / "whole.tar", ["", ""])
    assert main(["inspect", str(tmp_path)]) == 0
    assert "damaged shards" in capsys.readouterr().out


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, capsys, monkeypatch):
    shard = write_tar(tmp_path / "0.tar", [""])
    monkeypatch.setattr(inspection, "inspect_shards", lambda *_, **__: pytest.fail("the shards are read first"))
    assert main(["inspect", shard, "--html", str(tmp_path / "none" / "x.html")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_facts_are_told_in_units_and_numbers_that_fit(tmp_path, capsys):
    shard = write_tar(tmp_path / "0.tar", [""])
    assert main(["inspect", shard, "--html", str(tmp_path / "x.html")]) == 0
    facts = dict(line.strip("│ ").split("│")[:2] for line in capsys.readouterr().out.splitlines() if "│" in line)
    assert {name.strip(): value.strip() for name, value in facts.items()}["total size of images"].endswith(" B")
    page = (tmp_path / "x.html").read_text()
    assert "1 sample in 1 shard<" in page
    assert "<dt>language</dt><dd>1</dd>" in page


def test_the_call_gives_what_the_verb_prints(scene_shards, scene_tokenizer, tmp_path, capsys):
    selection = tmp_path / "half.selection"
    vlm.curate(scene_shards / "val", selection, filter="sample:share=0.5")
    words = ["inspect", str(scene_shards / "val"), "--selection", str(selection), "--sample", "10", "--json"]
    assert main([*words, "--tokenizer", str(scene_tokenizer)]) == 0
    printed = json.loads(capsys.readouterr().out)
    page = tmp_path / "page.html"
    inspection = vlm.inspect(
        [scene_shards / "val"], selection=selection, sample=10, tokenizer=scene_tokenizer, html=page
    )
    assert inspection.to_json() == printed
    assert inspection.looked_at == 10 == len(inspection.shown)
    assert page.read_text().count("data:image/jpeg") == 10
    with pytest.raises(vlm.UsageError, match="sample = 0 is outside its range"):
        vlm.inspect(scene_shards / "val", sample=0)
