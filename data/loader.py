"""The streaming loader: batches by number, read and prepared in worker processes, the same for any number of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from vlm.data.order import Address
from vlm.data.samples import Sample
from vlm.data.shards import ShardReader

Made = TypeVar("Made", covariant=True)

_MAX_OPEN_SHARDS = 64


@runtime_checkable
class Plan(Protocol):
    """Which samples batch `number` holds."""

    def __getitem__(self, number: int) -> list[Address]: ...


class ShardSet:
    """Samples by address; keeps the shards used last open. Each worker process has its own."""

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = tuple(shards)
        self._open: dict[int, ShardReader] = {}

    def read(self, address: Address) -> Sample:
        """The sample at an address.

        Raises:
            BadSample: it cannot be read.
        """
        reader = self._open.pop(address.shard, None) or ShardReader(self.shards[address.shard])
        self._open[address.shard] = reader
        if len(self._open) > _MAX_OPEN_SHARDS:
            self._open.pop(next(iter(self._open))).close()
        return reader.read(address.number)

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "_open": {}}


@runtime_checkable
class Assemble(Protocol[Made]):
    """Turns the addresses of a batch into a batch; runs in the workers, so it must pickle."""

    def __call__(self, addresses: list[Address], shards: ShardSet) -> Made:
        """The batch made of the samples at these addresses."""
        ...


@dataclass
class _Batches(Dataset, Generic[Made]):
    plan: Plan
    shards: ShardSet
    assemble: Assemble[Made]

    def __getitem__(self, index: int) -> Made:
        return self.assemble(self.plan[index], self.shards)


def stream_batches(
    plan: Plan, shards: Sequence[str], assemble: Assemble[Made], *, numbers: range, workers: int = 0, prefetch: int = 4
) -> Iterator[Made]:
    """The batches of the given numbers, in order.

    workers: processes that read, decode and tokenize; 0 does it in this one. Which worker makes a batch has no
        influence on what is in it, and nothing here draws from a global random generator.
    prefetch: batches each worker keeps ready.
    """
    loader: DataLoader[Made] = DataLoader(
        _Batches(plan, ShardSet(shards), assemble),
        batch_size=None,
        sampler=numbers,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_use_one_thread,
    )
    return iter(loader)


def _use_one_thread(_: int) -> None:
    torch.set_num_threads(1)
