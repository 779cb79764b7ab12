"""Which samples make up which batch: shuffled for training, in file order for evaluation and embedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlm.data.order import Address, Order, Visits
from vlm.errors import UsageError

_SHARDS_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Endless batches of one process: batch n of a run begun at `position` (samples seen before it).

    The global batch n holds positions position + n*batch_size ... in order; each process takes its own
    even share of it, so any number of processes sees the same global batches.
    parts: even parts in which a share is handed over, one after the other; number n*parts + i is part i of batch n.
    """

    order: Order
    batch_size: int
    position: int = 0
    process: int = 0
    num_processes: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.num_processes:
            raise UsageError(
                f"The global batch of {self.batch_size} does not divide by {self.num_processes} processes; "
                "choose a multiple."
            )
        if self.share % self.parts:
            raise UsageError(
                f"A process's share of {self.share} samples does not divide into {self.parts} even parts; choose the "
                "batch as a multiple of the parts."
            )

    @property
    def share(self) -> int:
        """Samples of a global batch that this process takes."""
        return self.batch_size // self.num_processes

    @property
    def largest(self) -> int:
        """Samples handed over at once."""
        return self.share // self.parts

    def __getitem__(self, number: int) -> Visits:
        first = self.first_position(number)
        return Visits(self.order.locate(range(first, first + self.largest)), position=first)

    def first_position(self, number: int) -> int:
        """Position of the first sample handed over under this number."""
        batch, part = divmod(number, self.parts)
        return self.position + batch * self.batch_size + self.process * self.share + part * self.largest

    def shards_from(self, number: int) -> list[int]:
        """The shards that number and those soon after it need, of any process."""
        return self.order.shards_from(self.position + number // self.parts * self.batch_size)

    def stand_in(self, address: Address, attempt: int) -> Address:
        """The sample `attempt` places further in file order, in place of one that cannot be read."""
        return self.order.stand_in(address, attempt)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardPlan:
    """Every sample once, in file order; no batch holds samples of two shards, the last of each may be short.

    times: of a selection; samples with 0 are left out.
    """

    counts: Sequence[int]
    batch_size: int
    times: Sequence[np.ndarray] | None = None

    @property
    def largest(self) -> int:
        """Most samples a batch may hold."""
        return self.batch_size

    @cached_property
    def kept(self) -> list[int]:
        """Samples of each shard that are in some batch."""
        if self.times is None:
            return list(self.counts)
        return [int(np.count_nonzero(times)) for times in self.times]

    @cached_property
    def _batches(self) -> list[tuple[int, int]]:
        return [(shard, first) for shard, count in enumerate(self.kept) for first in range(0, count, self.batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> list[Address]:
        shard, first = self._batches[number]
        last = min(first + self.batch_size, self.kept[shard])
        places = range(first, last) if self.times is None else np.flatnonzero(self.times[shard])[first:last].tolist()
        return [Address(0, shard, place) for place in places]

    def shards_from(self, number: int) -> list[int]:
        """The shard of batch `number` and the next few."""
        if number >= len(self._batches):
            return []
        shard = self._batches[number][0]
        return list(range(shard, min(shard + _SHARDS_AHEAD, len(self.counts))))
