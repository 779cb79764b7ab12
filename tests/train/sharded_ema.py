"""Run by two processes: the EMA of a sharded network is that of the whole one. Prints `equal` at the end."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.leaving import leave_group
from vlm.train.averaging import EMA


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    undivided = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    # the whole weights stay in memory after a forward pass: a mean put in must reach them all the same
    sharded: Any = fully_shard(copy.deepcopy(undivided), mesh=mesh, reshard_after_forward=False)
    means = [EMA.from_network(0.9, network) for network in (sharded, undivided)]
    torch.set_grad_enabled(False)
    for step in range(1, 5):
        for own, parameter in zip(sharded.parameters(), undivided.parameters(), strict=True):
            change = torch.randn(parameter.shape)
            parameter.add_(change)
            own.add_(distribute_tensor(change, mesh, own.placements))
        for mean, network in zip(means, (sharded, undivided), strict=True):
            mean.update(network, step)
    for name, value in means[1].weights.items():
        assert torch.equal(whole(means[0].weights[name]), value), name
    pixels = torch.ones(2, 3)
    before = sharded(pixels)
    with means[0].swapped_in(sharded), means[1].swapped_in(undivided):
        averaged = sharded(pixels)
        assert torch.equal(averaged, undivided(pixels))
    assert torch.equal(sharded(pixels), before)
    assert torch.equal(undivided(pixels), before)
    assert not torch.equal(averaged, before)
    leave_group()
    print("equal", flush=True)


if __name__ == "__main__":
    main()
