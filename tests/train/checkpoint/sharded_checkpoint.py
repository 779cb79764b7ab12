"""What each of several processes does in test_processes: restore, save elsewhere, step, save again."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from tests.leaving import leave_group
from tests.train.checkpoint.small_state import small_state, step
from vlm.data.sample_ledger import Ledger
from vlm.train.checkpoint.manager import CheckpointWriter, any_across_processes, restore_newest
from vlm.train.state import TrainState


def rebuilt(kind: str) -> TrainState:
    """A state of other values than the saved one, held as the kind says."""
    state = small_state(seed=11)
    if kind == "ddp":
        DistributedDataParallel(state.task)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(state.network, mesh=mesh)
        fully_shard(state.task.heads["side"], mesh=mesh)
        state.ema_weights = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    state.optimizer = torch.optim.AdamW(state.task.parameters(), lr=1e-2)
    return state


def work(process: int, processes: int, kind: str, root: str) -> None:
    """Begin from ROOT/checkpoints; leave ROOT/KIND with what was read, and with one step more."""
    folder, is_main = Path(root), process == 0
    dist.init_process_group("gloo", init_method=f"file://{folder}/{kind}-meet", rank=process, world_size=processes)
    assert any_across_processes([process == 1, False, is_main], torch.device("cpu")) == [True, False, True]
    state = rebuilt(kind)
    assert restore_newest(folder / "checkpoints", state, is_main=is_main)
    assert state.ledger.num_requested == (6 if is_main else 0)
    with CheckpointWriter(folder / kind, keep=5, is_main=is_main) as writer:
        writer.save(state, ledger=Ledger(num_requested=6), is_scheduled=True)
        torch.manual_seed(3)
        step(state, torch.randn(6, 4))
        writer.save(state, ledger=Ledger(num_requested=6), is_scheduled=True)
    leave_group()


if __name__ == "__main__":
    kind, processes, root = sys.argv[1:]
    spawn(work, args=(int(processes), kind, root), nprocs=int(processes))
