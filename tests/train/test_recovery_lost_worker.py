"""Workers of a real loader that are killed."""

import os
import signal

import pytest
from torch.utils.data import DataLoader, Dataset

from vlm.errors import VlmError
from vlm.train.recovery import find_lost_worker, lost_worker_error


class Deadly(Dataset):
    """The third item kills the worker that makes it."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.fixture
def found():
    with pytest.raises(RuntimeError) as caught:  # one worker: the end of a second would raise the same once more
        list(DataLoader(Deadly(), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    told = VlmError(f"A loader worker was killed ({caught.value})")
    told.__cause__ = caught.value
    found = find_lost_worker(told)
    assert found
    return found


def test_a_killed_worker_is_named_with_the_newest_checkpoint_and_the_way_on(found, tmp_path):
    for name in ("step-00000004", "step-00000008"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").write_text("{}")
    told = str(lost_worker_error(found, run=tmp_path, checkpoints=tmp_path / "checkpoints", workers=2))
    assert found["pid"].strip().isdigit()
    assert f"worker with pid {found['pid'].strip()} of 2 was lost" in told
    assert "is killed by signal: Killed. " in told
    assert f"Everything up to step 8 is saved ({tmp_path / 'checkpoints' / 'step-00000008'})" in told
    assert "memory" in told
    assert told.endswith(f"vlm train {tmp_path} --resume")


def test_without_a_checkpoint_it_says_so(found, tmp_path):
    told = str(lost_worker_error(found, run=tmp_path, checkpoints=tmp_path / "checkpoints", workers=2))
    assert "No checkpoint was due yet." in told


def test_other_errors_are_no_lost_workers():
    assert find_lost_worker(VlmError("A shard is damaged")) is None
    several = find_lost_worker(RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"))
    assert several
    assert several["pid"] == "12, 13"
