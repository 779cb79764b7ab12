"""A checkpoint is the same whether one process holds everything or several hold parts of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.checkpoint.small_state import small_state, step
from vlm.data.sample_ledger import Ledger
from vlm.train.checkpoint.checkpoint_files import list_checkpoints
from vlm.train.checkpoint.manager import CheckpointWriter, restore_newest


def read(path):
    return {
        f"{file.name}:{name}": tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_read_what_one_wrote_and_write_what_one_reads(kind, folder, make_state):
    state = make_state()
    with CheckpointWriter(folder, keep=2) as writer:
        writer.save(state, ledger=Ledger(num_requested=6), is_scheduled=True)
    words = [sys.executable, "-m", "tests.train.checkpoint.sharded_checkpoint", kind, "2", str(folder.parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[3])
    assert done.returncode == 0, done.stderr
    restored, stepped = list_checkpoints(folder.parent / kind)
    want, got = read(list_checkpoints(folder)[0]), read(restored)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    torch.manual_seed(3)
    step(state, torch.randn(6, 4))
    again = small_state(seed=12)
    restore_newest(folder.parent / kind, again)
    assert again.step == state.step == 2
    for name, parameter in state.task.named_parameters():
        # a bias before a batch norm has no gradient but that of rounding, which AdamW makes a step of up to its rate
        bound = 1e-2 if name == "network.first.bias" else 1e-6
        torch.testing.assert_close(again.task.get_parameter(name), parameter, rtol=1e-5, atol=bound)
    assert read(stepped).keys() == want.keys()
