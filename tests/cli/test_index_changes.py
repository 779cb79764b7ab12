"""The daily verbs of an index: a folder added, metadata set, deletions looked at and undone, shards that moved."""

import io
import json
import runpy
import sys
from pathlib import Path

import pytest

from vlm.cli.main import main
from vlm.index.reader import Index

_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "index" / "conftest.py"))
_CHANGES = runpy.run_path(str(Path(__file__).with_name("test_index.py")))

index = _CHANGES["index"]
run = _CHANGES["run"]
paint = _SHARED["paint"]


@pytest.fixture
def photos(tmp_path, paint, monkeypatch):
    """A folder of three images, and the model of the index that embeds them."""
    monkeypatch.setattr("vlm.models.load.load_model", lambda _, **__: _SHARED["ColourModel"](fingerprint="given"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in ("red", "green", "blue"):
        (folder / f"{colour}.png").write_bytes(paint(colour))
    return folder


def generation(folder):
    """The number of the version."""
    return json.loads((folder / "manifest.json").read_text())["generation"]


def test_a_folder_is_added_searched_and_taken_back(capsys, index, photos):
    (photos / "broken.png").write_bytes(b"nothing")
    code, out, err = run(capsys, "index", "add", index, photos, "--json")
    summary = json.loads(out)
    assert code == 0
    assert [summary[name] for name in ("added", "known", "rows", "generation")] == [3, 0, 23, 2]
    assert list(summary["unreadable"]) == ["broken.png"]
    assert "1 cannot be embedded; the first, broken.png" in err
    code, out, _ = run(capsys, "search", index, "red", "--where", 'folder == ""', "--top", "1")
    assert code == 0
    assert "red.png" in out
    assert json.loads(run(capsys, "index", "add", index, photos, "--json")[1])["known"] == 3
    assert json.loads(run(capsys, "index", "update", index, photos, "--json")[1])["replaced"] == 3
    code, out, _ = run(capsys, "index", "rollback", index, "--json")
    assert (code, json.loads(out)["rows"]) == (0, 23)


def test_like_takes_a_file_as_well_as_a_uid(capsys, index, photos):
    run(capsys, "index", "add", index, photos)
    code, out, _ = run(capsys, "search", index, "--like", photos / "blue.png", "--top", "1", "--json")
    assert (code, json.loads(out)["hits"][0]["uid"]) == (0, "blue.png")
    code, out, _ = run(capsys, "search", index, "--like", "green.png", "--top", "1", "--json")
    assert (code, json.loads(out)["hits"][0]["path"]) == (0, str(photos / "green.png"))


def test_metadata_is_set_from_a_table_and_unknown_keys_are_named(capsys, index, tmp_path):
    (tmp_path / "prices.csv").write_text("uid,price,stock\na3,9007199254740993,\na4,12,0\nzz,1,1\n")
    code, out, err = run(capsys, "index", "set", index, "--from", tmp_path / "prices.csv", "--key", "uid", "--json")
    assert code == 0
    summary = json.loads(out)
    assert [summary[name] for name in ("edited", "keys", "unknown", "rows")] == [2, 3, 1, 20]
    assert "1 key of" in err
    assert "that no row has: zz" in err
    entry = Index.open(index).catalogue.find("a3")
    assert entry.metadata == {"width": 3, "price": 2**53 + 1}
    code, out, _ = run(
        capsys, "index", "set", index, "--from", tmp_path / "prices.csv", "--key", "uid", "--columns", "stock"
    )
    assert code == 0
    assert "stock" in out


def test_a_dry_run_deletes_nothing(capsys, index):
    code, out, _ = run(capsys, "index", "delete", index, "--where", "width < 12", "--dry-run", "--json")
    assert (code, generation(index)) == (0, 1)
    preview = json.loads(out)
    assert (preview["rows"], preview["remaining"], preview["examples"][:2]) == (12, 8, ["a0", "a1"])
    code, out, err = run(capsys, "index", "delete", index, "--where", "width = 99", "--dry-run")
    assert code == 0
    assert "Nothing was deleted" in out
    assert "0 rows match: 99 is not a value of width; its values go from 0 to 19." in err


def test_most_of_an_index_is_deleted_only_with_yes(capsys, index, monkeypatch):
    words = ("index", "delete", index, "--where", "width < 12")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, _, err = run(capsys, *words)
    assert (code, generation(index)) == (2, 1)
    assert "12 of 20 rows of" in err
    assert "add --yes if that is meant" in err
    code, out, _ = run(capsys, *words, "--yes", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 8)


@pytest.mark.parametrize(("answer", "rows"), [("y\n", 8), ("yes\n", 8), ("n\n", 20), ("\n", 20), ("", 20)])
def test_at_a_terminal_most_of_an_index_is_asked_about(capsys, index, monkeypatch, answer, rows):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", Terminal())
    code = main(["index", "delete", str(index), "--where", "width < 12"])
    assert "12 of 20 rows of" in sys.stderr.getvalue()
    assert (code == 0) == (rows == 8)
    assert len(Index.open(index)) == rows


def test_rollback_undoes_and_redoes_and_a_compaction_may_keep_nothing(capsys, index):
    code, _, err = run(capsys, "index", "rollback", index)
    assert code == 2
    assert "has no version before 1 to roll back to: nothing has changed since it was built" in err
    run(capsys, "index", "delete", index, "--uid", "a0")
    counts = [json.loads(run(capsys, "index", "rollback", index, "--json")[1])["rows"] for _ in range(2)]
    assert counts == [20, 19]
    assert run(capsys, "index", "compact", index, "--discard-previous")[0] == 0
    code, _, err = run(capsys, "index", "rollback", index)
    assert (code, "its last change kept none" in err) == (2, True)


def test_images_that_moved_are_said_to_lie_elsewhere(capsys, index, photos, tmp_path):
    run(capsys, "index", "add", index, photos)
    photos.rename(tmp_path / "elsewhere")
    code, out, _ = run(capsys, "index", "relocate", index, photos, tmp_path / "elsewhere", "--json")
    assert (code, json.loads(out)["edited"]) == (0, 3)
    code, out, _ = run(capsys, "search", index, "--like", "red.png", "--top", "1", "--json")
    assert json.loads(out)["hits"][0]["path"] == str(tmp_path / "elsewhere" / "red.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("add", "INDEX", "/nowhere/photos"), "There is nothing at /nowhere/photos"),
        (("add", "/nowhere", "/nowhere/photos"), "/nowhere has no manifest"),
        (("add", "INDEX", "EMPTY"), "holds no images, no shards (*.tar) and no embeddings"),
        (("update", "INDEX", "EMPTY", "--where", "width <"), "The filter"),
        (("set", "INDEX", "--from", "/nowhere/p.csv", "--key", "uid"), "/nowhere/p.csv cannot be read"),
        (("set", "INDEX", "--from", "TABLE", "--key", "skus"), "The table has no column 'skus'; did you mean 'sku'"),
        (("set", "INDEX", "--from", "TABLE", "--key", "sku"), "No row has the field 'sku' to find it by"),
        (("set", "INDEX", "--from", "TABLE"), "--key"),
        (("delete", "INDEX", "--uid", "nobody", "--dry-run"), "has no 'nobody'"),
        (("rollback", "/nowhere"), "/nowhere has no manifest"),
        (("relocate", "INDEX", "/a"), "either OLD and NEW, or the shards where they are now"),
        (("relocate", "INDEX", "/nowhere", "EMPTY", "--shards", "EMPTY"), "either OLD and NEW"),
        (("relocate", "INDEX", "--shards", "EMPTY"), "No shards (*.tar) at"),
        (("build", "EMBEDDINGS", "NEW", "--uid-column", "widht"), "has no 'widht' to be its uid; did you mean 'width'"),
    ],
)
def test_misuse_is_said_and_changes_nothing(capsys, index, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("sku,price\ns1,3\n")
    places = {"INDEX": index, "EMPTY": tmp_path / "empty", "TABLE": tmp_path / "table.csv"}
    places |= {"EMBEDDINGS": tmp_path / "embeddings", "NEW": tmp_path / "new"}
    before = sorted(path.name for path in index.rglob("*"))
    try:
        code, out, err = run(capsys, "index", *(places.get(word, word) for word in words))
    except SystemExit as stop:  # of the parser
        code, out, err = stop.code, "", capsys.readouterr().err
    assert (code, out) == (2, "")
    assert message in err
    assert sorted(set(path.name for path in index.rglob("*")) - {"writer.lock"}) == before
    assert not (tmp_path / "new").exists()
