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
    """Loss parts averaged over the processes."""
    values = torch.stack([part.detach().float() for part in parts.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(parts, values.tolist(), strict=True))


def summed_ledger(ledger: Ledger) -> Ledger:
    """The ledgers of all processes as one."""
    if not dist.is_initialized():
        return ledger
    first, *others = [Ledger.from_values(values) for values in gathered([ledger.to_values()])]
    return first.merged(others)
