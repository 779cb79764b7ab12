"""`vlm find` and `vlm watch` on a folder of painted images, with a tiny model of random weights."""

import contextlib
import io
import json
import os
import random
import shlex
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

import vlm
from tests.data.raw_fixture import make_dng
from tests.preloaded import Popen
from tests.random_model import write_random_model
from vlm.cli.main import main
from vlm.index.reader import Index


@pytest.fixture
def model(scene_tokenizer: Path, tmp_path: Path) -> Path:
    """A folder with a tiny model of random weights."""
    return write_random_model(tmp_path / "model", "micro", scene_tokenizer)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 200 images, and user data of its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("VLM_MODEL", raising=False)
    folder = tmp_path / "photos"
    for number in range(200):
        paint(folder / f"{number % 4}/{number:03d}.png", number)
    return folder


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(file, "PNG")
    path.write_bytes(file.getvalue())
    os.utime(path, (1_600_000_000 + number, 1_600_000_000))


def rows(index: Path) -> dict[str, Any]:
    opened = Index.open(index)
    found = {}
    for row, origin in opened.snapshot.entries():
        found[origin.uid] = (opened.snapshot.vectors(np.array([row])).tobytes(), origin.metadata, origin.captions)
    opened.close()
    return found


def test_find_prints_files_that_can_be_piped_and_json_that_python_gives(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_MODEL", str(model))
    assert main(["find", str(photos), "a red circle", "--top", "3"]) == 0
    first = capsys.readouterr()
    assert "200 images: 200 new; 200 embedded" in first.err
    # from then on the index knows its model
    monkeypatch.setenv("VLM_MODEL", "another")
    assert main(["find", str(photos), "a red circle", "--top", "3", "-f"]) == 0
    piped = capsys.readouterr()
    paths = piped.out.split("\n")
    assert len(paths) == 4
    assert all(Path(path).is_file() and path in first.out for path in paths[:3])
    assert "200 images: no change" in piped.err
    monkeypatch.chdir(photos.parent)
    assert main(["find", "photos", "a red circle", "--minus", "blue", "--where", "folder = '2'", "-0"]) == 0
    within = capsys.readouterr().out.split("\0")
    assert len(within) == 11
    assert all(path.startswith("photos/2/") for path in within[:-1])

    assert main(["find", str(photos), "a", "b", "--top", "2", "--no-update", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    given = vlm.find(photos, ["a", "b"], top=2).to_json()
    with pytest.raises(vlm.UsageError, match="rebuild is an update"):
        vlm.find(photos, "a", update=False, rebuild=True)
    for result in (printed, given):
        del result["embed_milliseconds"], result["search_milliseconds"]
    assert printed == given
    assert list(photos.rglob("*.sqlite")) == []

    assert main(["find", str(photos), "a", "--min-probability", "0.01", "--no-update", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    result = vlm.find(photos, "a", relevant=0.01)
    assert printed["relevance"] == result.to_json()["relevance"]
    assert [hit["probability"] for hit in printed["hits"]] == [hit.probability for hit in result]


def test_an_image_of_the_folder_is_searched_by_without_the_model(
    photos: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find", str(photos), "--model", str(model)]) == 0
    model_is_away = {"model": "", "like": photos / "1/005.png", "top": 1}
    assert [hit.entry.uid for hit in vlm.find(photos, **model_is_away).hits] == ["1/005.png"]
    assert vlm.find(photos, **model_is_away).query.items == ("1/005.png",)
    assert vlm.find(photos, ["a"], like=photos / "1/005.png", model=vlm.load(str(model)), top=1).hits
    # any other is embedded, whatever form it has
    other = Image.open(photos / "1/005.png").resize((40, 40))
    hits = vlm.find(photos, like=[other, np.asarray(other)], top=1).hits
    assert hits[0].entry.uid == "1/005.png"
    capsys.readouterr()
    assert main(["find", str(photos), "--like", str(tmp_path / "no.jpg")]) == 2
    assert "no.jpg cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "no.jpg").write_bytes(b"nothing")
    assert main(["find", str(photos), "--like", str(tmp_path / "no.jpg")]) == 1
    assert "cannot be used as a query: unreadable image" in capsys.readouterr().err


def test_without_a_query_the_update_is_shown_and_what_is_wrong_is_named(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "bad.jpg").write_bytes(b"nothing")
    assert main(["find", str(photos), "--model", str(model), "--json"]) == 0
    update = json.loads(capsys.readouterr().out)
    assert (update["images"], update["embedded"], list(update["unreadable"])) == (200, 200, ["bad.jpg"])
    assert Path(update["index"], "manifest.json").is_file()
    assert main(["find", str(photos)]) == 0
    shown = capsys.readouterr()
    assert "200 images: no change" in shown.out
    assert "1 cannot be read" in shown.err
    assert "bad.jpg: unreadable image" in shown.err
    # the index is one like any other
    assert main(["search", update["index"], "--like", "1/005.png", "--json", "--top", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["uid"] == "1/005.png"


def test_the_command_that_lists_what_is_unreadable_can_be_run_as_it_is_shown(
    photos: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos.rename(tmp_path / "my photos")
    (folder / "bad.jpg").write_bytes(b"nothing")
    home = tmp_path / "the index"
    assert main(["find", str(folder), "a", "--model", str(model), "--index", str(home)]) == 0
    shown = capsys.readouterr()
    assert "caption or date" in shown.out
    command = shown.err.partition("unreadable image")[2].partition(". vlm ")[2].partition(" lists all")[0]
    assert main(shlex.split(command)) == 0
    assert list(json.loads(capsys.readouterr().out)["unreadable"]) == ["bad.jpg"]


def test_a_field_of_find_that_no_image_has_matches_nothing_and_an_unknown_one_is_an_error(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["find", str(photos), "a", "--model", str(model), "--where", "year = 2024", "-f"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "0 rows match: no row has a year" in shown.err
    either = vlm.find(photos, "a", where="camera like 'Canon%' or folder = '1'", top=100)
    assert {hit.entry.metadata["folder"] for hit in either.hits} == {"1"}
    assert len(vlm.find(photos, "a", where="taken is missing", top=300).hits) == 200
    assert main(["find", str(photos), "a", "--where", "yaer = 2024"]) == 2
    assert "No row has the field 'yaer'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a dog"], 2, "no model is named. Give --model MODEL or set VLM_MODEL"),
        (["a dog"], 2, "vlm models lists them"),
        (["--where", "year = 2000"], 2, "nothing to search for"),
        (["a dog", "--no-update"], 2, "never indexed"),
        (["a dog", "--no-update", "--rebuild"], 2, "leave out --no-update"),
        (["a dog", "--model", "nowhere/model"], 2, "nowhere/model"),
        (["a dog", "--json", "-f"], 2, "--json prints the results as JSON, --files (-f)"),
        (["a dog", "--json", "-0"], 2, "give one"),
    ],
)
def test_mistakes_are_one_sentence(
    photos: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(["find", str(photos), *words]) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("vlm: ") == 1
    assert "Traceback" not in printed.err
    assert main(["find", str(photos / "nowhere"), "a dog"]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_without_a_model_those_that_work_here_are_named(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos.parent / "runs").mkdir()
    model.rename(photos.parent / "runs/mine")
    monkeypatch.chdir(photos.parent)
    assert main(["find", "photos", "a dog"]) == 2
    assert "These work offline here: runs/mine" in capsys.readouterr().err


def test_a_page_of_the_results_opens(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(opened.append(address)))
    assert main(["find", str(photos), "a", "--model", str(model), "--top", "4", "--open"]) == 0
    assert "open the page yourself" in capsys.readouterr().err
    page = Path(opened[0].removeprefix("file://"))
    assert page.read_text().count("data:image/jpeg;base64") == 4
    assert not page.is_relative_to(photos)
    # formats that need converting are shown too
    pytest.importorskip("rawpy")
    (photos / "raw.dng").write_bytes(make_dng(jpeg()))
    assert main(["find", str(photos), "--like", str(photos / "raw.dng"), "--top", "1", "--open"]) == 0
    assert "raw.dng" in capsys.readouterr().out
    assert page.read_text().count("data:image/jpeg;base64") == 1


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), "red").save(file, "JPEG")
    return file.getvalue()


def test_while_another_process_updates_the_last_version_is_searched(
    photos: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vlm.service.folder.folder_index.LOCK_SECONDS", 0.05)
    words = ["find", str(photos), "a", "--model", str(model), "--index", str(tmp_path / "home"), "-f", "--top", "1"]
    (tmp_path / "home").mkdir()
    with FileLock(tmp_path / "home/lock"):
        assert main(words) == 2
        assert "being updated by another process" in capsys.readouterr().err
    assert main(words) == 0
    paint(photos / "new.png", 1000)
    with FileLock(tmp_path / "home/lock"):
        assert main([*words, "--like", str(photos / "new.png")]) == 0
    shown = capsys.readouterr()
    assert "Until then its last version is searched" in shown.err
    assert len(shown.out.splitlines()) == 2


def start(*words: str, folder: Path) -> Popen:
    return Popen([sys.executable, "-m", "vlm", *words], cwd=folder, stdout=-1, stderr=-2, start_new_session=True)


def num_stored(home: Path) -> int:
    try:
        # not read-only: what a killed process left half done is to be rolled back
        database = sqlite3.connect(f"file:{home / 'files.sqlite'}?mode=rw", uri=True, timeout=10)
        with contextlib.closing(database):
            return database.execute("SELECT count(*) FROM files").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_killed_three_times_the_index_is_that_of_an_uninterrupted_run(
    photos: Path, model: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    killed = tmp_path / "killed"
    words = ["find", str(photos), "--model", str(model), "--index"]
    stored: list[int] = []
    for _ in range(3):
        before = num_stored(killed)
        process = start(*words, str(killed), folder=tmp_path)
        deadline = time.monotonic() + 60
        # as soon as it has stored something more, or has begun to write the index
        while process.poll() is None and num_stored(killed) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        stored.append(num_stored(killed))
    assert stored[0] in (64, 128, 192, 200)
    assert stored == sorted(stored)
    for home in (killed, tmp_path / "whole"):
        process = start(*words, str(home), "--json", folder=tmp_path)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    assert rows(killed / "index") == rows(tmp_path / "whole/index")
    assert len(rows(killed / "index")) == 200


def test_a_pause_between_looks_is_longer_than_nothing(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(vlm.UsageError, match="poll_seconds = -1 is out of range"):
        vlm.watch(photos, poll_seconds=-1)
    assert main(["watch", str(photos), "--poll", "0"]) == 2
    assert "poll_seconds = 0 is out of range: give seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize("poll", [[], ["--poll", "0.2"]])
def test_watch_says_a_line_for_each_batch_of_changes_and_ends_clean(
    photos: Path, model: Path, tmp_path: Path, poll: list[str]
) -> None:
    if not poll:
        pytest.importorskip("watchfiles")
    process = start("watch", str(photos), "--model", str(model), *poll, folder=tmp_path)
    assert process.stdout is not None

    # a line that never comes ends the test, not the patience of whoever runs it
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()

    def line_with(text: str) -> str:
        for line in process.stdout:
            if text in line.decode():
                return line.decode()
        raise AssertionError(f"watch ended without {text!r}")

    try:
        line_with("200 images: 200 new")
        paint(photos / "new/1.png", 1000)
        paint(photos / "new/2.png", 1001)
        (photos / ".hidden").write_text("")
        seen = line_with("new")
        if "2 new" not in seen:  # the clock may fall between the two
            assert "1 new" in seen
            line_with("1 new")
        (photos / "new/1.png").unlink()
        assert "201 images: 1 gone" in line_with("gone")
    finally:
        process.send_signal(signal.SIGINT)
        watchdog.cancel()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"Stopped watching" in out
    assert b"Traceback" not in out
