"""The verbs that change, check and tell about an index."""

import io
import json
import sys

import numpy as np
import pytest

from vlm.cli.main import main
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, Origin, normalize_rows
from vlm.index.writer import IndexWriter


def run(capsys, *words):
    """(exit code, stdout, stderr) of a command."""
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def embed(folder, uids, *, seed=0, fingerprint="given"):
    """An embeddings folder of random rows with these uids."""
    space = EmbeddingSpace(model="given", fingerprint=fingerprint, dimension=8, modality="image")
    writer = EmbeddingsWriter(folder, space=space, identity={})
    vectors = normalize_rows(np.random.default_rng(seed).standard_normal((len(uids), 8)).astype(np.float32))
    origins = [
        Origin(
            uid=uid, key=uid, shard="/nowhere/0.tar", number=number, image_offset=0, image_size=0,
            caption_number=None, captions={}, metadata={"width": number},
        )
        for number, uid in enumerate(uids)
    ]  # fmt: skip
    writer.add("/nowhere/0.tar", vectors, origins)
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    return folder


@pytest.fixture
def index(tmp_path):
    """Twenty rows named a0 … a19."""
    build_index(embed(tmp_path / "embeddings", [f"a{n}" for n in range(20)]), tmp_path / "index")
    return tmp_path / "index"


def test_rows_come_and_go_by_the_commands(capsys, index, tmp_path):
    more = embed(tmp_path / "more", ["a3", "b0"], seed=1)
    code, _, err = run(capsys, "index", "add", index, more)
    assert code == 2
    assert "has 'a3' already" in err
    changes = [
        ("update", index, more),
        ("delete", index, "--uid", "a0", "b0"),
        ("delete", index, "--where", "width >= 15"),
        ("compact", index),
    ]
    found = []
    for words in changes:
        code, out, _ = run(capsys, "index", *words, "--json")
        assert code == 0
        change = json.loads(out)
        found.append([change[name] for name in ("added", "replaced", "removed", "rows", "dead")])
    assert found == [[1, 1, 0, 21, 1], [0, 0, 2, 19, 3], [0, 0, 5, 14, 8], [0, 0, 0, 14, 0]]
    code, out, _ = run(capsys, "index", "info", index, "--json")
    info = json.loads(out)
    assert (info["rows"], info["generation"], [segment["rows"] for segment in info["segments"]]) == (14, 5, [14])


def test_an_update_may_be_narrowed_by_a_filter(capsys, index, tmp_path):
    more = embed(tmp_path / "more", ["a0", "a1", "b0"], seed=1)
    code, out, _ = run(capsys, "index", "update", index, more, "--where", "key = 'a1'", "--json")
    change = json.loads(out)
    assert code == 0
    assert [change[name] for name in ("added", "replaced", "left_out", "rows")] == [0, 1, 2, 20]
    code, _, err = run(capsys, "index", "update", index, more, "--where", "key =")
    assert (code, "filter" in err) == (2, True)


def test_uids_to_delete_are_read_from_a_file_or_from_standard_input(capsys, index, tmp_path, monkeypatch):
    (tmp_path / "uids.txt").write_text("a1\na2\n")
    assert run(capsys, "index", "delete", index, "--uids", tmp_path / "uids.txt")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("a3\n"))
    code, out, _ = run(capsys, "index", "delete", index, "--uids", "-", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 17)


def test_a_byte_order_mark_is_no_part_of_the_first_uid(capsys, index, tmp_path):
    (tmp_path / "uids.txt").write_text("a1\r\na2\r\n", encoding="utf-8-sig", newline="")
    code, out, _ = run(capsys, "index", "delete", index, "--uids", tmp_path / "uids.txt", "--json")
    assert (code, json.loads(out)["removed"]) == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9\n", "uids.txt is not UTF-8 text: byte 3 is 0xe9"), (b"\n\n", "uids.txt holds no uid")],
)
def test_a_file_that_holds_no_uids_is_refused(capsys, index, tmp_path, content, message):
    (tmp_path / "uids.txt").write_bytes(content)
    code, _, err = run(capsys, "index", "delete", index, "--uids", tmp_path / "uids.txt")
    assert code == 2
    assert message in err


def test_an_index_of_nothing_answers_every_filter_with_nothing(capsys, index):
    run(capsys, "index", "delete", index, "--where", "width >= 0", "--yes")
    run(capsys, "index", "compact", index)
    for where in ("width < 3", "hight = 'x'", "hight is missing", "not width = 1"):
        code, out, _ = run(capsys, "index", "delete", index, "--where", where, "--json")
        assert (code, json.loads(out)["removed"]) == (0, 0)


@pytest.mark.parametrize("sample", ["0", "-3"])
def test_a_check_of_no_rows_is_refused(capsys, index, sample):
    code, _, err = run(capsys, "index", "check", index, "--sample", sample)
    assert (code, f"sample = {sample} is out of range" in err) == (2, True)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--held-out", "nan"), ("--held-out", "0"), ("--held-out", "1"), ("--max-images", "-5"), ("--max-images", "0")],
)
def test_a_head_is_not_fitted_to_what_cannot_be(capsys, index, tmp_path, option, value):
    texts = ("--old-texts", index, "--new-texts", index)
    code, _, err = run(capsys, "index", "fit-head", index, index, tmp_path / "head", *texts, option, value)
    shown = float(value) if option == "--held-out" else value
    assert (code, f"{option[2:].replace('-', '_')} = {shown} is out of range" in err) == (2, True)


def test_many_deleted_rows_call_for_a_compaction(capsys, index):
    _, _, err = run(capsys, "index", "delete", index, "--where", "width < 10")
    assert f"Next: vlm index compact {index}, since every search skips 10 deleted rows" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Name the rows to delete"),
        (("--uid", "a1", "--where", "width < 3"), "Name the rows to delete"),
        (("--uid", "nobody"), "no 'nobody'"),
        (("--where", "width <"), "filter"),
        (("--where", "hight < 3"), "No row has the field 'hight'"),
    ],
)
def test_a_deletion_that_says_nothing_clear_deletes_nothing(capsys, index, words, message):
    code, _, err = run(capsys, "index", "delete", index, *words)
    assert code == 2
    assert message in err
    assert json.loads((index / "manifest.json").read_text())["counts"]["rows"] == 20


def test_rows_of_another_model_are_refused(capsys, index, tmp_path):
    other = embed(tmp_path / "other", ["c0"], fingerprint="other")
    code, _, err = run(capsys, "index", "add", index, other)
    assert code == 2
    assert "fingerprint other" in err


def test_a_locked_index_is_refused(capsys, index, tmp_path):
    more = embed(tmp_path / "more", ["b0"])
    with IndexWriter(index):
        code, _, err = run(capsys, "index", "add", index, more)
    assert code == 2
    assert "being changed by another process" in err


def test_a_sound_index_passes_its_check_and_a_damaged_one_fails_it(capsys, index):
    code, out, _ = run(capsys, "index", "check", index)
    assert code == 0
    assert "faults" in out
    path = index / "segments" / "segment-00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, out, err = run(capsys, "index", "check", index, "--json")
    assert code == 1
    assert json.loads(out)["faults"][0]["part"] == "files"
    assert "1 faults" in err


def test_info_has_a_line_for_each_segment(capsys, index, tmp_path):
    run(capsys, "index", "add", index, embed(tmp_path / "more", ["b0"]))
    code, out, _ = run(capsys, "index", "info", index)
    assert code == 0
    assert "segments" in out
    assert out.count("flat") >= 2
