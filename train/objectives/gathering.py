"""The rows of all processes, in the order of the processes; alone, a process's own rows.

Every process must give as many rows as the others, in the same order of calls.
"""

import torch
import torch.distributed as dist

from vlm.tensors import Float, Int64, Tensor

_WITHOUT_REDUCE_SCATTER = frozenset({"mpi"})


def num_processes() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def own_columns(num_rows: int, device: torch.device) -> Int64[Tensor, " B"]:
    """Where this process's rows stand among those of all processes.

    >>> own_columns(3, torch.device("cpu")).tolist()
    [0, 1, 2]
    """
    first = process_number() * num_rows
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
    gathered = rows.new_empty(num_processes() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        return _gather(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        share = len(gradient) // num_processes()
        if dist.get_backend() in _WITHOUT_REDUCE_SCATTER:
            summed = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(summed)
            return summed[process_number() * share :][:share]
        own = gradient.new_empty(share, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
