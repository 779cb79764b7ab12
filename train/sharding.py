"""Weights, gradients and optimiser spread over processes (FSDP2), so that each holds its share of them only."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vlm.errors import UsageError
from vlm.train.checkpoints.sharded import whole

_LEAST_SHARDED = 1 << 16


def shard_student(student: nn.Module, device: torch.device, *, is_bf16: bool) -> None:
    """Spread the student's weights over all processes, in place: block by block, and what is left as one.

    Numbers that belong to no row (temperature, bias) stay whole on every process, see `average_whole_gradients`.

    Raises:
        UsageError: there is one process only.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise UsageError("--sharding fsdp spreads weights over processes, and there is one; use accelerate launch.")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if is_bf16 else None
    told = {"mesh": mesh, "mp_policy": precision or MixedPrecisionPolicy()}
    for block in _blocks(student):
        fully_shard(block, **told)
    scalars = {parameter for parameter in student.parameters() if not parameter.ndim}
    fully_shard(student, ignored_params=scalars, **told)


def average_whole_gradients(student: nn.Module) -> None:
    """Average over processes the gradients of what is not spread; FSDP does so for what is."""
    if not isinstance(student, FSDPModule):
        return
    for parameter in student.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@contextlib.contextmanager
def without_exchange(student: nn.Module) -> Iterator[None]:
    """Gradients are kept whole and summed up on each process, and exchanged with those of the next backward pass."""
    assert isinstance(student, FSDPModule)
    student.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        student.set_requires_gradient_sync(True)


@contextlib.contextmanager
def whole_weights(student: nn.Module) -> Iterator[None]:
    """The network can be used by itself, on all processes at once; nothing to do where nothing is spread."""
    spread = [module for module in student.modules() if isinstance(module, FSDPModule)]
    for module in spread:
        module.unshard()
    try:
        yield
    finally:
        for module in spread:
            module.reshard()


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Cut the norm over all gradients, spread or not, to `limit`; returns the norm before."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    groups = [group for group in by_kind(trained) if group]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return float(norm)


def by_kind(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that are spread and those that are whole, which fused operations do not take together."""
    is_spread = [isinstance(parameter, DTensor) for parameter in parameters]
    spread = [parameter for parameter, there in zip(parameters, is_spread, strict=True) if there]
    return spread, [parameter for parameter, there in zip(parameters, is_spread, strict=True) if not there]


def _blocks(student: nn.Module) -> list[nn.Module]:
    """The members of lists of layers that are worth a message of their own; innermost first."""
    lists = [module for module in student.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    members = [member for layers in reversed(lists) for member in layers]
    large = [member for member in members if sum(p.numel() for p in member.parameters()) >= _LEAST_SHARDED]
    return [member for member in dict.fromkeys(large) if not isinstance(member, nn.ModuleList | nn.Sequential)]
