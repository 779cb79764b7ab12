import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.train.checkpoint.small_state import small_state, step
from vlm.data.sample_ledger import Ledger
from vlm.errors import UsageError, VlmError
from vlm.models.load import WEIGHTS
from vlm.train.checkpoint import manager
from vlm.train.checkpoint.checkpoint_files import (
    BestCheckpoint,
    CheckpointInfo,
    find_damage,
    list_checkpoints,
    new_best,
    remove_partial_checkpoints,
    steps_to_remove,
)
from vlm.train.checkpoint.manager import CheckpointWriter, restore_newest


def save(writer, state, *, is_scheduled=True):
    writer.save(state, ledger=Ledger(num_requested=state.position), is_scheduled=is_scheduled)


def steps(folder):
    return [int(path.name.split("-")[1]) for path in list_checkpoints(folder)]


def test_everything_is_read_back_bit_for_bit_and_training_goes_on_the_same(folder, make_state, tensors):
    state = make_state()
    state.spike_guard.losses, state.spike_guard.in_a_row, state.num_rollbacks = [0.1, 1 / 3], 2, 1
    state.skipped = [{"step": 1, "reason": "the loss is nan"}]
    state.best = BestCheckpoint(metric="recall", value=0.1 + 0.2, step=1)
    with CheckpointWriter(folder, keep=2) as writer:
        save(writer, state)
    again = make_state(seed=7)
    assert restore_newest(folder, again)
    assert again.to_values() == state.to_values()
    assert again.ledger.num_requested == state.position
    want, got = tensors(state), tensors(again)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    rows = torch.randn(6, 4)
    assert step(state, rows) == step(again, rows)
    want, got = tensors(state), tensors(again)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_checkpoint_holds_no_pickle_and_is_a_model_folder(folder, make_state):
    with CheckpointWriter(folder, keep=2) as writer:
        save(writer, make_state())
    files = {path.name for path in list_checkpoints(folder)[0].iterdir()}
    assert files == {
        WEIGHTS,
        "open_clip_config.json",
        "vlm_tokenizer.json",
        "heads.safetensors",
        "average.safetensors",
        "optimizer.safetensors",
        "state.json",
    }


def test_without_heads_and_average_there_are_no_such_files(folder):
    state = small_state(has_head=False, has_average=False)
    with CheckpointWriter(folder, keep=2) as writer:
        save(writer, state)
    assert not {"heads.safetensors", "average.safetensors"} & {
        path.name for path in list_checkpoints(folder)[0].iterdir()
    }
    assert restore_newest(folder, small_state(3, has_head=False, has_average=False))


def test_what_is_saved_is_the_step_of_the_call_though_training_goes_on(folder, make_state, tensors, monkeypatch):
    may_write = threading.Event()
    real = manager.write_checkpoint
    monkeypatch.setattr(manager, "write_checkpoint", lambda *rest: may_write.wait(20) and real(*rest))
    state = make_state()
    with CheckpointWriter(folder, keep=2) as writer:
        save(writer, state)
        want, values = tensors(state), state.to_values()
        step(state, torch.randn(6, 4))
        state.skipped.append({"step": 99})
        assert not list_checkpoints(folder)
        may_write.set()
    again = make_state(seed=5)
    restore_newest(folder, again)
    assert again.to_values() == values
    got = tensors(again)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_second_request_waits_for_the_first(folder, make_state, monkeypatch):
    running, most = [0], [0]
    real = manager.write_checkpoint

    def slow(*rest):
        running[0] += 1
        most[0] = max(most[0], running[0])
        made = real(*rest)
        running[0] -= 1
        return made

    monkeypatch.setattr(manager, "write_checkpoint", slow)
    state = make_state()
    with CheckpointWriter(folder, keep=9) as writer:
        for _ in range(5):
            save(writer, state)
            assert len(list_checkpoints(folder)) >= state.step - 2
            step(state, torch.randn(6, 4))
    assert most == [1]
    assert len(list_checkpoints(folder)) == 5


@pytest.mark.parametrize("surfaces", ["save", "check", "wait", "close"])
def test_an_error_of_the_thread_comes_up_at_the_next_call(folder, make_state, monkeypatch, surfaces):
    def fail(*rest):
        raise VlmError("no such luck")

    monkeypatch.setattr(manager, "write_checkpoint", fail)
    writer, state = CheckpointWriter(folder, keep=2), make_state()
    save(writer, state)

    def check_until_the_thread_is_done():
        for _ in range(1000):
            writer.check()
            time.sleep(0.01)

    calls = {
        "save": lambda: save(writer, state),
        "check": check_until_the_thread_is_done,
        "wait": writer.wait,
        "close": writer.close,
    }
    with pytest.raises(VlmError, match="no such luck"):
        calls[surfaces]()
    writer.close()


def test_an_error_that_ends_the_run_is_not_hidden_by_one_of_the_writer(folder, make_state, monkeypatch, caplog):
    def fail(*rest):
        raise VlmError("no such luck")

    def run():
        with CheckpointWriter(folder, keep=2) as writer:
            save(writer, make_state())
            raise VlmError("the true reason")

    monkeypatch.setattr(manager, "write_checkpoint", fail)
    with pytest.raises(VlmError, match="the true reason"):
        run()
    assert "no such luck" in caplog.text


def test_the_newest_and_the_best_stay(folder, make_state):
    state = make_state()
    with CheckpointWriter(folder, keep=2) as writer:
        for number in range(6):
            if number == 1:
                state.best = BestCheckpoint(metric="recall", value=0.5, step=state.step)
            save(writer, state)
            step(state, torch.randn(6, 4))
    assert steps(folder) == [2, 5, 6]
    assert json.loads((folder / "best.json").read_text()) == {
        "metric": "recall",
        "value": 0.5,
        "step": 2,
        "checkpoint": "step-00000002",
    }


@pytest.mark.parametrize(
    ("kinds", "keep", "best", "in_use", "want"),
    [
        ("rrrr", 2, None, (), [1, 2]),
        ("rrrr", 1, 1, (), [2, 3]),
        ("rrrr", 1, None, (2,), [1, 3]),
        ("rrxx", 1, None, (), [1, 3]),  # x: saved by a signal in the midst of trouble
        ("rrss", 1, None, (), [1, 3]),  # s: saved by a signal
        ("rrrss", 2, None, (), [1]),
        ("rrrxs", 2, 1, (), []),
        ("rxsx", 1, None, (), [2]),
        ("r", 1, None, (), []),
        ("xx", 1, None, (), [1]),
    ],
)
def test_what_a_rewind_needs_is_never_removed(kinds, keep, best, in_use, want):
    found = [
        CheckpointInfo(step=number, is_scheduled=kind == "r", is_good=kind != "x")
        for number, kind in enumerate(kinds, start=1)
    ]
    assert steps_to_remove(found[::-1], keep=keep, best=best, in_use=in_use) == want


def test_best_is_the_highest_and_an_unknown_metric_is_named():
    first = new_best(None, "recall", {"recall": 0.5}, 10)
    assert first == BestCheckpoint(metric="recall", value=0.5, step=10)
    assert new_best(first, "recall", {"recall": 0.5}, 20) is None
    assert new_best(first, "recall", {"recall": float("nan")}, 20) is None
    assert new_best(first, "recall", {"recall": 0.6}, 30) == BestCheckpoint(metric="recall", value=0.6, step=30)
    with pytest.raises(UsageError, match=r"'recal' is not measured on val; name one of recall"):
        new_best(first, "recal", {"recall": 0.6, "keys": "abc"}, 30)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_said(folder, make_state, caplog):
    state = make_state()
    with CheckpointWriter(folder, keep=3) as writer:
        for _ in range(2):
            save(writer, state)
            step(state, torch.randn(6, 4))
    newest = list_checkpoints(folder)[-1]
    for name in ("average.safetensors", "open_clip_config.json"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert name in find_damage(newest)
        again = make_state(seed=4)
        restore_newest(folder, again)
        assert again.step == 1
        assert f"{newest} is damaged ({name} does not have its checksum)" in caplog.text
        (newest / name).write_bytes(whole)
    for path in list_checkpoints(folder):
        (path / "state.json").write_text("{")
    with pytest.raises(VlmError, match="All 2 checkpoints"):
        restore_newest(folder, make_state())


def test_a_damaged_one_is_written_anew_and_a_whole_one_of_another_course_is_replaced(folder, make_state):
    state = make_state()
    with CheckpointWriter(folder, keep=3) as writer:
        save(writer, state)
        writer.wait()
        path = list_checkpoints(folder)[0]
        before = (path / WEIGHTS).stat().st_ino
        save(writer, state)
        writer.wait()
        assert (path / WEIGHTS).stat().st_ino == before
        (path / WEIGHTS).write_bytes(b"")
        save(writer, state)
        writer.wait()
        assert not find_damage(path)
        state.num_rollbacks = 1
        save(writer, state)
    assert json.loads((path / "state.json").read_text())["rewinds"] == 1


def test_what_a_kill_left_is_removed_at_the_next_start(folder, make_state):
    with CheckpointWriter(folder, keep=2) as writer:
        save(writer, make_state())
    for name in (".step-00000009.part", ".step-00000003.removed"):
        (folder / name).mkdir()
        (folder / name / WEIGHTS).write_bytes(b"half")
    assert steps(folder) == [1]
    CheckpointWriter(folder, keep=2, is_main=False).close()
    assert len(list(folder.iterdir())) == 3
    CheckpointWriter(folder, keep=2).close()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    remove_partial_checkpoints(folder / "nowhere")


def test_every_file_is_synced_before_the_checkpoint_takes_its_name(folder, make_state, monkeypatch):
    synced, synced_at_rename = set(), set()
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_rename(path, target):
        if target.name == "step-00000001":
            synced_at_rename.update(synced)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with CheckpointWriter(folder, keep=2) as writer:
        save(writer, make_state())
    files = list(list_checkpoints(folder)[0].iterdir())
    assert len(files) > 3
    assert [path.name for path in files if path.stat().st_ino not in synced_at_rename] == []
    # the rename itself is durable only once the folder is
    assert folder.stat().st_ino in synced


def test_a_checkpoint_of_another_network_is_refused_by_name(folder, make_state):
    with CheckpointWriter(folder, keep=2) as writer:
        save(writer, make_state())
    with pytest.raises(VlmError, match=r"heads.safetensors is not of the network being trained: side"):
        restore_newest(folder, small_state(width=5))
    with pytest.raises(VlmError, match=r"heads.safetensors is not of the network"):
        restore_newest(folder, small_state(has_head=False))


def test_only_the_main_process_writes(folder, make_state):
    with CheckpointWriter(folder, keep=2, is_main=False) as writer:
        save(writer, make_state())
    assert not folder.exists()


def test_nothing_is_restored_where_there_is_nothing(folder, make_state, tensors):
    state = make_state()
    before = tensors(state)
    assert not restore_newest(folder, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(state).items())
