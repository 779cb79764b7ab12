"""What several training processes agree on; with one process each of these is the identity."""

from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from vlm.data.ledger import Ledger

Item = TypeVar("Item")


def gathered(items: list[Item]) -> list[Item]:
    """The items of all processes, in process order."""
    return gather_object(items) if dist.is_initialized() else items


def mean_of_parts(parts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss parts averaged over the processes, and their sum as `loss`."""
    values = torch.stack([part.detach().float() for part in parts.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    named = dict(zip(parts, values.tolist(), strict=True))
    return {"loss": sum(named.values()), **named}


def is_true_anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def summed_ledger(ledger: Ledger) -> Ledger:
    """The ledgers of all processes as one."""
    if not dist.is_initialized():
        return ledger
    first, *others = [Ledger.from_values(values) for values in gathered([ledger.to_values()])]
    return first.merged(others)
