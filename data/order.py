"""The order in which samples are seen: a pure function of seed, epoch and shard sizes, addressed by one number."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

DEFAULT_WINDOW = 1 << 16
_KEPT_WINDOWS = 4
_KEPT_SHARDS = 256

Value = TypeVar("Value")


class Address(NamedTuple):
    """A sample at one visit: in which epoch of its source, from which shard, which number in it.

    repeat: which visit of this sample in the epoch, from 0; a selection may ask for several.
    """

    epoch: int
    shard: int
    number: int
    repeat: int = 0


class Visits(list[Address]):
    """The visits at consecutive positions of a run, from `position` on."""

    def __init__(self, addresses: Iterable[Address], *, position: int) -> None:
        super().__init__(addresses)
        self.position = position


@runtime_checkable
class Order(Protocol):
    """An endless sequence of visits, addressed by position."""

    @property
    def num_samples(self) -> int:
        """Visits in one epoch of the whole."""
        ...

    def locate(self, positions: Sequence[int]) -> list[Address]:
        """The visits at the given positions."""
        ...

    def stand_in(self, address: Address, attempt: int) -> Address:
        """The sample `attempt` places further in file order, in place of one that cannot be used."""
        ...

    def shards_from(self, position: int) -> list[int]:
        """The shards of the window at a position and of the next, in the order in which windows need them."""
        ...

    def finished_epochs(self, position: int) -> tuple[int, ...]:
        """Whole epochs that lie before a position, for each source."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOrder:
    """Two-level shuffle: the shards, then the samples inside windows over the shuffled shards.

    Every sample occurs exactly once in an epoch, or as often as its selection says. Position p counts visits from the
    first epoch on, so that epoch = p // num_samples; a batch over the end of an epoch is filled from both sides.

    counts: visits of each shard in an epoch. times: how often each sample of each shard is visited (a selection's,
    memory-mapped); without it, once each.

    Memory: 20 bytes a shard, and for the windows and shards used last one permutation of at most `window` visits
    (4 bytes each) and the running sums of their times (4 bytes a sample). Nothing grows with the samples besides
    `times` itself: 2 bytes a sample, on disk.
    """

    counts: tuple[int, ...]
    seed: int = 0
    window: int = DEFAULT_WINDOW
    times: Sequence[np.ndarray] | None = None
    _kept: dict[str, "_Recent"] = field(default_factory=dict, repr=False)

    @classmethod
    def of_selection(cls, times: Sequence[np.ndarray], *, seed: int = 0, window: int = DEFAULT_WINDOW) -> "SampleOrder":
        """The order of visits that a selection asks for."""
        counts = tuple(int(part.sum(dtype=np.int64)) for part in times)
        return cls(counts=counts, seed=seed, window=window, times=times)

    @property
    def num_samples(self) -> int:
        """Visits in one epoch."""
        return self._total

    @cached_property
    def _total(self) -> int:
        return sum(self.counts)

    def locate(self, positions: Sequence[int]) -> list[Address]:
        """The visits at the given positions."""
        return [
            address
            for (epoch, first), inside in groupby(positions, self._window_of)
            for address in self._addresses(epoch, first, [position % self.num_samples - first for position in inside])
        ]

    def stand_in(self, address: Address, attempt: int) -> Address:
        """The first visit of the sample `attempt` places further in file order, among those that are visited."""
        shard, place = address.shard, self._rank(address) + attempt
        while place >= (kept := self._kept_samples(shard)):
            place -= kept
            shard = (shard + 1) % len(self.counts)
        number = place if self.times is None else int(self._numbers(shard)[place])
        return Address(address.epoch, shard, number)

    def shards_from(self, position: int) -> list[int]:
        """The shards of the window at a position and of the next one, also across the end of an epoch."""
        found: dict[int, None] = {}
        for _ in range(2):
            epoch, offset = divmod(position, self.num_samples)
            shards, starts = self._shuffled_shards(epoch)
            first = offset - offset % self.window
            last = min(first + self.window, self.num_samples)
            slots = range(int(np.searchsorted(starts, first, "right")) - 1, int(np.searchsorted(starts, last, "left")))
            found |= dict.fromkeys(int(shards[slot]) for slot in slots if self.counts[int(shards[slot])])
            position += last - offset
        return list(found)

    def finished_epochs(self, position: int) -> tuple[int, ...]:
        """Whole epochs before a position."""
        return (position // self.num_samples,)

    def _window_of(self, position: int) -> tuple[int, int]:
        """The epoch of a position, and where its window begins in it."""
        epoch, offset = divmod(position, self.num_samples)
        return epoch, offset - offset % self.window

    def _addresses(self, epoch: int, first: int, offsets: list[int]) -> list[Address]:
        """The visits at these offsets from the beginning of a window."""
        shards, starts = self._shuffled_shards(epoch)
        places = self._window_permutation(epoch, first)[offsets] + np.int64(first)
        slots = starts.searchsorted(places, "right") - 1
        inside = (places - starts[slots]).tolist()
        return [self._visit(epoch, shard, place) for shard, place in zip(shards[slots].tolist(), inside, strict=True)]

    def _visit(self, epoch: int, shard: int, place: int) -> Address:
        if self.times is None:
            return Address(epoch, shard, place)
        ends = self._ends(shard)
        number = int(ends.searchsorted(ends.dtype.type(place), "right"))
        return Address(epoch, shard, number, place - int(ends[number - 1] if number else 0))

    def _rank(self, address: Address) -> int:
        """Which of the visited samples of its shard this is."""
        if self.times is None:
            return address.number
        return int(self._numbers(address.shard).searchsorted(address.number))

    def _kept_samples(self, shard: int) -> int:
        return self.counts[shard] if self.times is None else len(self._numbers(shard))

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers in this epoch's order, and where each begins in it, with the total at the end."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            shards = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.counts))
            return shards, np.concatenate([[0], np.cumsum(np.asarray(self.counts, dtype=np.int64)[shards])])

        return self._recent("epochs", _KEPT_WINDOWS).get(epoch, make)

    def _window_permutation(self, epoch: int, first: int) -> np.ndarray:
        def make() -> np.ndarray:
            length = min(self.window, self.num_samples - first)
            return np.random.default_rng([self.seed, epoch, 1, first]).permutation(length).astype(np.uint32)

        return self._recent("windows", _KEPT_WINDOWS).get((epoch, first), make)

    def _ends(self, shard: int) -> np.ndarray:
        """Where the visits of each sample of a shard end, among the shard's visits."""
        assert self.times is not None
        times = self.times[shard]
        return self._recent("ends", _KEPT_SHARDS).get(shard, lambda: np.cumsum(times, dtype=np.uint32))

    def _numbers(self, shard: int) -> np.ndarray:
        """The samples of a shard that are visited."""
        assert self.times is not None
        times = self.times[shard]
        return self._recent("numbers", _KEPT_WINDOWS).get(shard, lambda: np.flatnonzero(times).astype(np.uint32))

    def _recent(self, name: str, size: int) -> "_Recent":
        return self._kept.setdefault(name, _Recent(size))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}


class _Recent:
    """The values made last, by key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key in self._values:
            self._values.move_to_end(key)
        else:
            self._values[key] = make()
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return self._values[key]
