"""Which samples make up which batch: shuffled for training, in file order for evaluation and embedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vlm.data.order import Address, SampleOrder
from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Endless batches of one process: batch n of a run begun at `position` (samples seen before it).

    The global batch n holds positions position + n*batch_size ... in order; each process takes its own
    even share of it, so any number of processes sees the same global batches.
    """

    order: SampleOrder
    batch_size: int
    position: int = 0
    process: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.num_processes:
            raise UsageError(
                f"The global batch of {self.batch_size} does not divide by {self.num_processes} processes; "
                "choose a multiple."
            )

    def __getitem__(self, number: int) -> list[Address]:
        share = self.batch_size // self.num_processes
        first = self.position + number * self.batch_size + self.process * share
        return self.order.locate(range(first, first + share))

    def stand_in(self, address: Address, attempt: int) -> Address:
        """The sample `attempt` places further in file order, in place of one that cannot be read."""
        shard, number = address.shard, address.number + attempt
        while number >= self.order.counts[shard]:
            number -= self.order.counts[shard]
            shard = (shard + 1) % len(self.order.counts)
        return Address(address.epoch, shard, number)


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Every sample once, in file order; no batch holds samples of two shards, the last of each may be short."""

    counts: Sequence[int]
    batch_size: int

    @cached_property
    def _batches(self) -> list[tuple[int, int]]:
        return [(shard, first) for shard, count in enumerate(self.counts) for first in range(0, count, self.batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> list[Address]:
        shard, first = self._batches[number]
        last = min(first + self.batch_size, self.counts[shard])
        return [Address(0, shard, place) for place in range(first, last)]
