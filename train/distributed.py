"""What several training processes agree on; with one process each of these is the identity.

Tensors that several processes hold in parts (FSDP2), taken as whole ones; in one process, or with DDP, they are.

Weights, gradients and optimizer spread over processes (FSDP2), so that each holds its share of them only.

The rows of all processes, in the order of the processes; alone, a process's own rows.

Every process must give as many rows as the others, in the same order of calls.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from vlm.data.ledger import Ledger
from vlm.errors import UsageError
from vlm.tensors import Float, Int64, Tensor

Item = TypeVar("Item")


def gather_objects(items: list[Item]) -> list[Item]:
    """The items of all processes, in process order."""
    return gather_object(items) if dist.is_initialized() else items


def average_losses(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss parts averaged over the processes."""
    values = torch.stack([part.detach().float() for part in losses.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(losses, values.tolist(), strict=True))


def merge_ledgers(ledger: Ledger) -> Ledger:
    """The ledgers of all processes as one."""
    if not dist.is_initialized():
        return ledger
    first, *others = [Ledger.from_values(values) for values in gather_objects([ledger.to_values()])]
    return first.merged(others)


def to_full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor; where it is spread, all processes have to call this for the same tensors in turn."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor as `pattern` is held: on its device, and in parts where that is of the same shape and in parts."""
    moved = tensor.to(pattern.device)
    if not dist.is_initialized():
        return moved
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(pattern, DTensor) and pattern.shape == tensor.shape:
        return distribute_tensor(moved, pattern.device_mesh, pattern.placements)
    return moved


@torch.no_grad()
def copy_full_tensor(target: Tensor, tensor: Tensor) -> None:
    """Put the values of a whole tensor into `target`, however that is held."""
    target.copy_(shard_like(tensor, target))


_MIN_SHARDED_PARAMETERS = 1 << 16


def apply_fsdp(task: nn.Module, device: torch.device, *, is_bf16: bool) -> None:
    """Spread the task's weights over all processes, in place: block by block, and what is left as one.

    Numbers that belong to no row (temperature, bias) stay whole on every process, see `average_whole_gradients`.

    Raises:
        UsageError: there is one process only.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise UsageError("--sharding fsdp spreads weights over processes, and there is one; use accelerate launch.")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if is_bf16 else None
    fsdp_options = {"mesh": mesh, "mp_policy": precision or MixedPrecisionPolicy()}
    for block in _blocks_to_shard(task):
        fully_shard(block, **fsdp_options)
    scalars = {parameter for parameter in task.parameters() if not parameter.ndim}
    fully_shard(task, ignored_params=scalars, **fsdp_options)


def average_unsharded_gradients(task: nn.Module) -> None:
    """Average over processes the gradients of what is not spread; FSDP does so for what is."""
    if not isinstance(task, FSDPModule):
        return
    for parameter in task.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@contextlib.contextmanager
def no_gradient_sync(task: nn.Module) -> Iterator[None]:
    """Gradients are kept whole and summed up on each process, and exchanged with those of the next backward pass."""
    assert isinstance(task, FSDPModule)
    task.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        task.set_requires_gradient_sync(True)


@contextlib.contextmanager
def unsharded_weights(task: nn.Module) -> Iterator[None]:
    """The network can be used by itself, on all processes at once; nothing to do where nothing is spread."""
    spread = [module for module in task.modules() if isinstance(module, FSDPModule)]
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
    groups = [group for group in split_by_sharding(trained) if group]
    norms = [
        to_full_tensor(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return float(norm)


def split_by_sharding(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that are spread and those that are whole, which fused operations do not take together."""
    is_spread = [isinstance(parameter, DTensor) for parameter in parameters]
    spread = [parameter for parameter, there in zip(parameters, is_spread, strict=True) if there]
    return spread, [parameter for parameter, there in zip(parameters, is_spread, strict=True) if not there]


def _blocks_to_shard(task: nn.Module) -> list[nn.Module]:
    """The members of lists of layers that are worth a message of their own; innermost first."""
    lists = [module for module in task.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    members = [member for layers in reversed(lists) for member in layers]
    large = [member for member in members if sum(p.numel() for p in member.parameters()) >= _MIN_SHARDED_PARAMETERS]
    return [member for member in dict.fromkeys(large) if not isinstance(member, nn.ModuleList | nn.Sequential)]


_BACKENDS_WITHOUT_REDUCE_SCATTER = frozenset({"mpi"})


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_columns(num_rows: int, device: torch.device) -> Int64[Tensor, " B"]:
    """Where this process's rows stand among those of all processes.

    >>> local_columns(3, torch.device("cpu")).tolist()
    [0, 1, 2]
    """
    first = process_rank() * num_rows
    return torch.arange(first, first + num_rows, device=device)


def gather_with_gradient(rows: Float[Tensor, "B ..."]) -> Float[Tensor, "N ..."]:
    """The rows of all processes; gradients flow back, summed, to the process a row came from.

    They are held once: the collective writes into the tensor that is returned.
    """
    return rows if num_processes() == 1 else _Gather.apply(rows)  # pyright: ignore[reportReturnType]


def gather_detached(rows: Tensor) -> Tensor:
    """The rows of all processes, of any type, as constants."""
    return rows.detach() if num_processes() == 1 else _gather(rows.detach())


def _gather(rows: Tensor) -> Tensor:
    output = rows.new_empty(num_processes() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(output, rows.contiguous())
    return output


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        return _gather(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        share = len(gradient) // num_processes()
        if dist.get_backend() in _BACKENDS_WITHOUT_REDUCE_SCATTER:
            summed = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(summed)
            return summed[process_rank() * share :][:share]
        own = gradient.new_empty(share, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
