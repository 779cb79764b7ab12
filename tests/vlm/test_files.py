import errno
import os
import stat
from pathlib import Path

import pytest

from vlm.errors import UsageError
from vlm.files import append_line, atomic_folder, atomic_write, compute_fingerprint, read_lines, write_text


def test_a_failing_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "old")

    def fill_the_disk():
        with atomic_write(path) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


def test_two_writers_of_a_file_in_one_process_do_not_meet(tmp_path):
    path = tmp_path / "x.txt"
    with atomic_write(path) as first:
        first.write(b"first")
        write_text(path, "second, and sooner")
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.txt"]


def test_a_file_is_synced_whole_before_it_takes_its_name_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append("folder synced" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes synced")
        fsync(descriptor)

    def record_replace(path, target):
        events.append(f"renamed to {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_text(tmp_path / "x.txt", "content")
    assert events == ["7 bytes synced", "renamed to x.txt", "folder synced"]


def test_lines_survive_odd_separators_and_half_a_line_is_left_out(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "one\u2028still one\x85")
    with path.open("a") as file:
        file.write("cut")
    assert read_lines(path) == ["one\u2028still one\x85"]


def test_a_line_after_a_torn_one_stands_alone(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "whole")
    with path.open("a") as file:
        file.write("torn")
    append_line(path, "next")
    assert read_lines(path) == ["whole", "next"]


def test_fingerprints_keep_parts_apart():
    assert compute_fingerprint("ab", "c") != compute_fingerprint("a", "bc")
    assert compute_fingerprint("a") == compute_fingerprint(b"a")


def test_a_new_folder_takes_its_name_only_when_the_work_is_done(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        (folder / "within").mkdir()
        (folder / "within" / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "within" / "a").read_text() == "a"
    with pytest.raises(UsageError, match="out exists already"), atomic_folder(tmp_path / "deep" / "out"):
        pytest.fail("it began")
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "other"):
        raise OSError(errno.ENOSPC, "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["deep", "out", "within", "a"]
