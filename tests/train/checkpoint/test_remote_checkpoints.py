import logging
import threading
import uuid

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from tests.train.checkpoint.small_state import small_state, step
from vlm.data.sample_ledger import Ledger
from vlm.errors import UsageError, VlmError
from vlm.storage import RetryPolicy
from vlm.train.checkpoint.checkpoint_files import list_checkpoints
from vlm.train.checkpoint.manager import CheckpointWriter, RemoteCheckpointStore, restore_newest
from vlm.train.state import BestCheckpoint

QUICK = RetryPolicy(attempts=3, seconds=5, first_wait=0.01, longest_wait=0.02)


@pytest.fixture(params=["memory", "file", "folder"])
def remote_store(request, tmp_path):
    unique = uuid.uuid4().hex
    address = {"memory": f"memory://{unique}", "file": f"file://{tmp_path}/copies/", "folder": str(tmp_path / "copies")}
    return RemoteCheckpointStore(address=address[request.param], run="run", retry_policy=QUICK)


def copied(writer):
    """Wait until all is copied."""
    assert writer.uploader
    writer.uploader.wait()


def run_steps(folder, remote_store, number, *, keep=2, state=None):
    state = state or small_state()
    with CheckpointWriter(folder, keep=keep, remote_store=remote_store) as writer:
        for _ in range(number):
            writer.save(state, ledger=Ledger(), is_scheduled=True)
            writer.wait()
            copied(writer)
            step(state, torch.randn(6, 4))
    return state


def test_copies_follow_the_folder_and_a_run_goes_on_from_them_elsewhere(
    remote_store, folder, tmp_path, tensors, caplog
):
    caplog.set_level(logging.INFO)
    state = small_state()
    state.best = BestCheckpoint(metric="recall", value=0.5, step=1)
    run_steps(folder, remote_store, 4, state=state)
    names = [path.name for path in list_checkpoints(folder)]
    assert names == ["step-00000001", "step-00000003", "step-00000004"]
    assert remote_store.names() == names
    assert [info.step for info in remote_store.infos().values()] == [1, 3, 4]
    own, elsewhere = small_state(5), small_state(6)
    restore_newest(folder, own)
    assert restore_newest(tmp_path / "elsewhere" / "checkpoints", elsewhere, remote_store=remote_store)
    assert "Fetching step-00000004" in caplog.text
    want, got = tensors(own), tensors(elsewhere)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert own.to_values() == elsewhere.to_values()


def test_a_damaged_checkpoint_comes_back_from_its_copy(folder, remote_store, caplog):
    run_steps(folder, remote_store, 2)
    newest = list_checkpoints(folder)[-1]
    (newest / "optimizer.safetensors").write_bytes(b"")
    state = small_state(3)
    assert restore_newest(folder, state, remote_store=remote_store)
    assert state.step == 2
    assert "trying its copy" in caplog.text
    assert restore_newest(folder, small_state(3))


def test_a_copy_without_its_last_file_is_none_and_is_cleared_away(folder, remote_store):
    run_steps(folder, remote_store, 1)
    remote_store.write("step-00000007/optimizer.safetensors", "half")
    remote_store.write("step-00000008/state.json", '{"step": 8, "gua')
    assert remote_store.names() == ["step-00000001", "step-00000008"]
    assert restore_newest(folder, small_state(), remote_store=remote_store)
    run_steps(folder, remote_store, 1, state=small_state())
    system, root = fsspec.url_to_fs(remote_store.url)
    assert {path.split("/")[-2] for path in system.glob(f"{root}/step-*/*")} == {"step-00000001"}


def test_state_json_is_the_last_to_come_and_the_first_to_go(folder, monkeypatch):
    remote_store = RemoteCheckpointStore(address=f"memory://{uuid.uuid4().hex}", run="run", retry_policy=QUICK)
    calls = []
    kind = type(fsspec.filesystem("memory"))
    for name in ("put_file", "rm_file", "rm"):
        real = getattr(kind, name)
        url = 2 if name == "put_file" else 1

        def told(*args, real=real, name=name, url=url, **more):
            calls.append((name, str(args[url]).rpartition("/")[2]))
            return real(*args, **more)

        monkeypatch.setattr(kind, name, told)
    run_steps(folder, remote_store, 1)
    puts = [file for name, file in calls if name == "put_file"]
    assert len(puts) == 7
    assert puts[-1] == "state.json"
    calls.clear()
    remote_store.remove("step-00000001")
    assert calls[0] == ("rm_file", "state.json")
    assert remote_store.names() == []


def test_a_failing_address_is_tried_again_then_said_while_training_goes_on(folder, tmp_path, monkeypatch, caplog):
    remote_store = RemoteCheckpointStore(address=str(tmp_path / "copies"), run="run", retry_policy=QUICK)
    tries, real, is_broken = [], LocalFileSystem.exists, [True]

    def exists(self, path, **options):
        tries.append(path)
        if is_broken[0]:
            raise ConnectionError("unplugged")
        return real(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "exists", exists)
    state = small_state()
    writer = CheckpointWriter(folder, keep=2, remote_store=remote_store)
    writer.save(state, ledger=Ledger(), is_scheduled=True)
    writer.wait()
    copied(writer)
    assert len(tries) == 3
    said = caplog.text
    assert f"{tmp_path / 'copies'}/run cannot be written to (3 attempts): ConnectionError: unplugged" in said
    assert "Training continues" in said
    step(state, torch.randn(6, 4))
    is_broken[0] = False
    writer.save(state, ledger=Ledger(), is_scheduled=True)
    writer.close()
    assert remote_store.names() == ["step-00000002"]
    is_broken[0] = True
    again = CheckpointWriter(folder, keep=2, remote_store=remote_store)
    again.save(state, ledger=Ledger(), is_scheduled=True)
    with pytest.raises(VlmError, match="copy it by hand"):
        again.close()


def test_a_newer_checkpoint_takes_the_place_of_one_that_waits_and_what_is_read_stays(folder, tmp_path, monkeypatch):
    remote_store = RemoteCheckpointStore(address=str(tmp_path / "copies"), run="run", retry_policy=QUICK)
    may_go_on, copied, real = threading.Event(), [], RemoteCheckpointStore.upload

    def upload(self, checkpoint):
        may_go_on.wait(20)
        copied.append(checkpoint.name)
        assert checkpoint.is_dir()
        real(self, checkpoint)

    monkeypatch.setattr(RemoteCheckpointStore, "upload", upload)
    state = small_state()
    with CheckpointWriter(folder, keep=1, remote_store=remote_store) as writer:
        for _ in range(4):
            writer.save(state, ledger=Ledger(), is_scheduled=True)
            writer.wait()
            step(state, torch.randn(6, 4))
        assert [path.name for path in list_checkpoints(folder)] == ["step-00000001", "step-00000004"]
        may_go_on.set()
    assert copied == ["step-00000001", "step-00000004"]
    assert remote_store.names() == ["step-00000004"]


def test_addresses_that_cannot_be_written_to_are_refused():
    with pytest.raises(UsageError, match="cannot be written to"):
        RemoteCheckpointStore(address="https://host/folder", run="run")
    with pytest.raises(UsageError, match="protocol 'ftp'"):
        RemoteCheckpointStore(address="ftp://host/folder", run="run")


def test_unreachable_copies_do_not_hide_the_own_ones_but_nothing_is_begun_anew(folder, tmp_path, monkeypatch, caplog):
    remote_store = RemoteCheckpointStore(address=str(tmp_path / "copies"), run="run", retry_policy=QUICK)
    run_steps(folder, None, 0)
    with CheckpointWriter(folder, keep=2) as writer:
        writer.save(small_state(), ledger=Ledger(), is_scheduled=True)

    def refuse(self, path, **options):
        raise ConnectionError("unplugged")

    monkeypatch.setattr(LocalFileSystem, "glob", refuse)
    assert restore_newest(folder, small_state(), remote_store=remote_store)
    assert "using the checkpoints in" in caplog.text
    with pytest.raises(VlmError, match="cannot be listed"):
        restore_newest(tmp_path / "elsewhere", small_state(), remote_store=remote_store)


@pytest.mark.slow
def test_copies_in_s3(s3_bucket, folder, tmp_path):
    remote_store = RemoteCheckpointStore(address=f"s3://{s3_bucket}/runs", run="run", retry_policy=QUICK)
    run_steps(folder, remote_store, 3)
    assert remote_store.names() == ["step-00000002", "step-00000003"]
    state = small_state(9)
    assert restore_newest(tmp_path / "elsewhere", state, remote_store=remote_store)
    assert state.step == 3
    absent = RemoteCheckpointStore(address="s3://nowhere/runs", run="run", retry_policy=QUICK)
    with pytest.raises(VlmError, match=r"s3://nowhere/runs/run cannot be written to \(1 attempt\)"):
        absent.upload(list_checkpoints(folder)[-1])
