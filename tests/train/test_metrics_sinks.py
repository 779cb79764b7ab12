"""Metrics in Weights & Biases, offline, and in Trackio, on this machine; each is skipped where it is not installed."""

import json
import sqlite3
import struct
import sys
import time
from pathlib import Path

import pytest

from vlm.errors import UsageError
from vlm.train.logger import WANDB_ID, TrackioLog, WandbLog, open_sinks


@pytest.mark.parametrize(("sink", "package"), [(WandbLog, "wandb"), (TrackioLog, "trackio")])
def test_what_is_not_installed_is_asked_for_by_name(monkeypatch, tmp_path, sink, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install {package}, or leave the flag out"):
        sink("project", tmp_path, {})


def wandb_rows(folder: Path) -> list[dict[str, object]]:
    """The rows of history that the files of offline runs hold: protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, object]] = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        data, place, content = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            # blocks of 32 KiB, whose end is padded where no header fits
            if place % 32768 > 32768 - 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            content += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(content)
                content = b""
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


def test_wandb_keeps_the_numbers_offline_and_a_resumed_run_continues_there(configure, monkeypatch, tmp_path, capfd):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = configure("run", wandb="trial")
    run = tmp_path / "run"
    run.mkdir()
    (log,) = open_sinks(config, run, resumed_step=0)
    log.write(10, {"loss": 1.5, "samples": "1a2b"})
    log.write(20, {"loss": 1.25})
    log.close()
    identity = (run / WANDB_ID).read_text()
    # offline files are named by the second in which they are begun
    time.sleep(1.1)
    (resumed,) = open_sinks(config, run, resumed_step=10)
    # a step that the interrupted run had sent already
    resumed.write(20, {"loss": 1.0})
    resumed.close()
    assert (run / WANDB_ID).read_text() == identity
    # its own process writes the file, and may end a moment after the run
    deadline = time.monotonic() + 20
    while len(rows := wandb_rows(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 1.5), (20, 1.25), (20, 1.0)]
    assert all("samples" not in row for row in rows)
    assert capfd.readouterr().out == ""


def test_a_missing_login_is_told_with_its_cure(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    # it reads its environment once
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match="WANDB_MODE=offline"):
        WandbLog("project", tmp_path, {})
    wandb.teardown()


def test_trackio_keeps_the_numbers_on_this_machine(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    (tmp_path / "run").mkdir()
    log = TrackioLog("trial", tmp_path / "run", {"seed": 1})
    log.write(1, {"loss": 1.5, "samples": "1a2b"})
    log.write(2, {"loss": 1.25})
    log.close()
    resumed = TrackioLog("trial", tmp_path / "run", {"seed": 1})
    resumed.write(3, {"loss": 1.0})
    resumed.close()
    assert capfd.readouterr().out == ""
    with sqlite3.connect(tmp_path / "trackio" / "trial.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step, json.loads(metrics)["loss"]) for name, step, metrics in rows] == [
        ("run", 1, 1.5),
        ("run", 2, 1.25),
        ("run", 3, 1.0),
    ]
