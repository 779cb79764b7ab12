"""Tensors that several processes hold in parts (FSDP2), taken as whole ones; in one process, or with DDP, they are."""

import torch
import torch.distributed as dist
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor; where it is spread, all processes have to call this for the same tensors in turn."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor as `pattern` is held: on its device, and in parts where that is of the same shape and in parts."""
    moved = tensor.to(pattern.device)
    if not dist.is_initialized():
        return moved
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(pattern, DTensor) and pattern.shape == tensor.shape:
        return distribute_tensor(moved, pattern.device_mesh, pattern.placements)
    return moved


@torch.no_grad()
def fill(target: Tensor, tensor: Tensor) -> None:
    """Put the values of a whole tensor into `target`, however that is held."""
    target.copy_(spread_like(tensor, target))
