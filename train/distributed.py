"""Training in several processes: what they agree on, what they exchange, and weights sharded over them (FSDP2).

With one process each function is the identity, so callers need not ask how many there are. Where tensors are exchanged,
every process must call with the same shapes, in the same order.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm.console import format_bytes
from vlm.data.sample_ledger import Ledger
from vlm.errors import UsageError
from vlm.tensor_types import Float, Int64, Tensor

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


def gather_objects(items: list[Item]) -> list[Item]:
    """The items of all processes, in process order."""
    return gather_object(items) if dist.is_initialized() else items


def average_losses(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Losses averaged over the processes."""
    # one exchange for all terms
    values = torch.stack([part.detach().float() for part in losses.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(losses, values.tolist(), strict=True))


def merge_ledgers(ledger: Ledger) -> Ledger:
    """The ledgers of all processes as one."""
    if not dist.is_initialized():
        return ledger
    first, *others = map(Ledger.from_values, gather_objects([ledger.to_values()]))
    return first.merged(others)


def to_full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor; where it is sharded, all processes have to call this for the same tensors in turn."""
    if not dist.is_initialized():
        return tensor
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor held like `pattern`: on its device, and sharded where that is sharded and of the same shape."""
    moved = tensor.to(pattern.device)
    if not dist.is_initialized():
        return moved
    if isinstance(pattern, DTensor) and pattern.shape == tensor.shape:
        return distribute_tensor(moved, pattern.device_mesh, pattern.placements)
    return moved


@torch.no_grad()
def copy_full_tensor(target: Tensor, tensor: Tensor) -> None:
    """Copy the values of a whole tensor into `target`, sharded or not."""
    target.copy_(shard_like(tensor, target))


# a gather of fewer numbers costs its latency only
MIN_SHARDED_PARAMETERS = 1 << 16


def apply_fsdp(
    task: nn.Module, device: torch.device, *, is_bf16: bool, min_parameters: int = MIN_SHARDED_PARAMETERS
) -> None:
    """Shard the task's weights over all processes, in place: block by block, and the rest as one.

    Scalars (temperature, bias) stay whole on every process, see `average_unsharded_gradients`. Blocks of fewer than
    `min_parameters` weights are sharded with the rest.

    The first process logs what came of it, in bytes of the tensors themselves: a launcher's own setting of FSDP can be
    passed over without a word.

    Raises:
        UsageError: there is one process only.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        raise UsageError("--sharding fsdp shards weights over processes, and there is one; use accelerate launch.")
    # one dimension: every process holds 1/N of each weight
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # gradients are summed in single precision: bf16 has 8 bits
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if is_bf16 else None
    fsdp_options = {"mesh": mesh, "mp_policy": precision or MixedPrecisionPolicy()}
    for block in _blocks_to_shard(task, min_parameters):
        fully_shard(block, **fsdp_options)
    # fully_shard splits along the first dimension, which scalars do not have
    scalars = {parameter for parameter in task.parameters() if not parameter.ndim}
    fully_shard(task, ignored_params=scalars, **fsdp_options)
    if dist.get_rank() == 0:
        logger.info(describe_sharding(task, device))


def describe_sharding(task: nn.Module, device: torch.device) -> str:
    """How much of the weights is sharded, counted from the tensors themselves, in one line."""
    whole = 0
    sharded = 0
    held = 0
    for parameter in task.parameters():
        size = parameter.numel() * parameter.element_size()
        whole += size
        if isinstance(parameter, DTensor):
            sharded += size
            local = parameter.to_local()
            held += local.numel() * local.element_size()
        else:
            held += size
    if not sharded:
        return f"FSDP2 shards nothing of the {format_bytes(whole)} of weights: every process holds all of them."
    return (
        f"FSDP2: {sharded / whole:.1%} of {format_bytes(whole)} of weights are sharded over {dist.get_world_size()} "
        f"{device.type} processes; this one holds {format_bytes(held)}."
    )


def average_unsharded_gradients(task: nn.Module) -> None:
    """Average over processes the gradients of what is not sharded; FSDP does so for what is."""
    if not isinstance(task, FSDPModule):
        return
    for parameter in task.parameters():
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


@contextlib.contextmanager
def no_gradient_sync(task: nn.Module) -> Iterator[None]:
    """Gradients are accumulated whole on each process, and exchanged with those of the next backward pass."""
    assert isinstance(task, FSDPModule)
    task.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        task.set_requires_gradient_sync(True)


@contextlib.contextmanager
def unsharded_weights(task: nn.Module) -> Iterator[None]:
    """The network can be used by itself, on all processes at once; nothing to do where nothing is sharded."""
    sharded = [module for module in task.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Clip the norm over all gradients, sharded or not, to `max_norm`; returns the norm before."""
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    groups = list(filter(None, split_by_sharding(trained)))
    # the norms of sharded and whole gradients are computed apart and combined
    norms: list[Tensor] = []
    for group in groups:
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        norms.append(to_full_tensor(torch.nn.utils.get_total_norm(gradients)))
    # one norm for all: processes that scaled by norms of their own would drift apart where weights are whole
    total_norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total_norm)
    return float(total_norm)


def split_by_sharding(parameters: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The sharded ones and the whole ones, which fused operations do not take together."""
    sharded: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for parameter in parameters:
        (sharded if isinstance(parameter, DTensor) else whole).append(parameter)
    return sharded, whole


def _blocks_to_shard(task: nn.Module, min_parameters: int) -> list[nn.Module]:
    """The layers of lists of layers that are large enough for a message of their own; innermost first."""
    lists = [module for module in task.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    blocks: dict[nn.Module, None] = {}
    # fully_shard must be applied bottom-up, so that an outer block manages only what no inner one does
    for layers in reversed(lists):
        for layer in layers:
            num_parameters = sum(parameter.numel() for parameter in layer.parameters())
            is_list = isinstance(layer, nn.ModuleList | nn.Sequential)
            if num_parameters >= min_parameters and not is_list:
                blocks[layer] = None
    return list(blocks)


_BACKENDS_WITHOUT_REDUCE_SCATTER = frozenset({"mpi"})


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_columns(num_rows: int, device: torch.device) -> Int64[Tensor, " B"]:
    """The positions of this process's rows among those of all processes.

    >>> local_columns(3, torch.device("cpu")).tolist()
    [0, 1, 2]
    """
    first = process_rank() * num_rows
    return torch.arange(first, first + num_rows, device=device)


def gather_with_gradient(rows: Float[Tensor, "B ..."]) -> Float[Tensor, "N ..."]:
    """The rows of all processes; gradients flow back, summed, to the process a row came from.

    They are in memory once: the collective writes into the tensor that is returned.
    """
    return rows if num_processes() == 1 else _Gather.apply(rows)  # pyright: ignore[reportReturnType]


def gather_detached(rows: Tensor) -> Tensor:
    """The rows of all processes, of any type, as constants."""
    return rows.detach() if num_processes() == 1 else _gather(rows.detach())


def _gather(rows: Tensor) -> Tensor:
    # collectives take memory as it lies, so a view is copied first
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
        # each process has the gradient of all rows by its own losses; a row's gradient is the sum over processes
        share = len(gradient) // num_processes()
        if dist.get_backend() in _BACKENDS_WITHOUT_REDUCE_SCATTER:
            summed = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(summed)
            return summed[process_rank() * share :][:share]
        own = gradient.new_empty(share, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
