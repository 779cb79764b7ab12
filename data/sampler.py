"""The order in which samples are seen: a pure function of seed, epoch and shard sizes, addressed by one number.

Several sources as one sequence, in exact proportions, each with its own epochs.

Which samples make up which batch: shuffled for training, in file order for evaluation and embedding.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, groupby
from math import gcd, lcm
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from vlm.errors import UsageError

DEFAULT_WINDOW = 1 << 16
_CACHED_WINDOWS = 4
_CACHED_SHARDS = 256

Value = TypeVar("Value")


class SampleIndex(NamedTuple):
    """A sample at one visit: in which epoch of its source, from which shard, which number in it.

    repeat: which visit of this sample in the epoch, from 0; a selection may ask for several.
    """

    epoch: int
    shard: int
    number: int
    repeat: int = 0


class BatchIndices(list[SampleIndex]):
    """The visits at consecutive positions of a run, from `position` on."""

    def __init__(self, sample_indices: Iterable[SampleIndex], *, position: int) -> None:
        super().__init__(sample_indices)
        self.position = position


@runtime_checkable
class Sampler(Protocol):
    """An endless sequence of visits, addressed by position."""

    @property
    def num_samples(self) -> int:
        """Visits in one epoch of the whole."""
        ...

    def locate(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The visits at the given positions."""
        ...

    def replacement(self, sample_index: SampleIndex, attempt: int) -> SampleIndex:
        """The sample `attempt` places further in file order, in place of one that cannot be used."""
        ...

    def upcoming_shards(self, position: int) -> list[int]:
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
    _kept: dict[str, "_LruCache"] = field(default_factory=dict, repr=False)

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

    def locate(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The visits at the given positions."""
        return [
            sample_index
            for (epoch, first), inside in groupby(positions, self._window_of)
            for sample_index in self._sample_indices(
                epoch, first, [position % self.num_samples - first for position in inside]
            )
        ]

    def replacement(self, sample_index: SampleIndex, attempt: int) -> SampleIndex:
        """The first visit of the sample `attempt` places further in file order, among those that are visited."""
        shard, place = sample_index.shard, self._rank(sample_index) + attempt
        while place >= (kept := self._num_kept_samples(shard)):
            place -= kept
            shard = (shard + 1) % len(self.counts)
        number = place if self.times is None else int(self._numbers(shard)[place])
        return SampleIndex(sample_index.epoch, shard, number)

    def upcoming_shards(self, position: int) -> list[int]:
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

    def _sample_indices(self, epoch: int, first: int, offsets: list[int]) -> list[SampleIndex]:
        """The visits at these offsets from the beginning of a window."""
        shards, starts = self._shuffled_shards(epoch)
        places = self._window_permutation(epoch, first)[offsets] + np.int64(first)
        slots = starts.searchsorted(places, "right") - 1
        inside = (places - starts[slots]).tolist()
        return [
            self._sample_index(epoch, shard, place) for shard, place in zip(shards[slots].tolist(), inside, strict=True)
        ]

    def _sample_index(self, epoch: int, shard: int, place: int) -> SampleIndex:
        if self.times is None:
            return SampleIndex(epoch, shard, place)
        ends = self._ends(shard)
        number = int(ends.searchsorted(ends.dtype.type(place), "right"))
        return SampleIndex(epoch, shard, number, place - int(ends[number - 1] if number else 0))

    def _rank(self, sample_index: SampleIndex) -> int:
        """Which of the visited samples of its shard this is."""
        if self.times is None:
            return sample_index.number
        return int(self._numbers(sample_index.shard).searchsorted(sample_index.number))

    def _num_kept_samples(self, shard: int) -> int:
        return self.counts[shard] if self.times is None else len(self._numbers(shard))

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers in this epoch's order, and where each begins in it, with the total at the end."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            shards = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.counts))
            return shards, np.concatenate([[0], np.cumsum(np.asarray(self.counts, dtype=np.int64)[shards])])

        return self._recent("epochs", _CACHED_WINDOWS).get(epoch, make)

    def _window_permutation(self, epoch: int, first: int) -> np.ndarray:
        def make() -> np.ndarray:
            length = min(self.window, self.num_samples - first)
            return np.random.default_rng([self.seed, epoch, 1, first]).permutation(length).astype(np.uint32)

        return self._recent("windows", _CACHED_WINDOWS).get((epoch, first), make)

    def _ends(self, shard: int) -> np.ndarray:
        """Where the visits of each sample of a shard end, among the shard's visits."""
        assert self.times is not None
        times = self.times[shard]
        return self._recent("ends", _CACHED_SHARDS).get(shard, lambda: np.cumsum(times, dtype=np.uint32))

    def _numbers(self, shard: int) -> np.ndarray:
        """The samples of a shard that are visited."""
        assert self.times is not None
        times = self.times[shard]
        return self._recent("numbers", _CACHED_WINDOWS).get(shard, lambda: np.flatnonzero(times).astype(np.uint32))

    def _recent(self, name: str, size: int) -> "_LruCache":
        return self._kept.setdefault(name, _LruCache(size))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}


class _LruCache:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Sources interleaved by whole-number shares; shards are numbered through, source after source.

    Of every sum(shares) positions, from each multiple of that on, source k has exactly shares[k], evenly spread; any
    other stretch of length n holds n * shares[k] / sum(shares) of them to within the number of sources. What a source
    shows is its own order from its own position, which follows from the common one: no state.
    """

    orders: tuple[SampleOrder, ...]
    shares: tuple[int, ...]
    num_samples: int

    def locate(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The visits at the given positions."""
        places = [self.source_at(position) for position in positions]
        found = [
            iter(order.locate([rank for source, rank in places if source == number]))
            for number, order in enumerate(self.orders)
        ]
        sample_indices = [(next(found[source]), self._first_shards[source]) for source, _ in places]
        return [sample_index._replace(shard=sample_index.shard + first) for sample_index, first in sample_indices]

    def source_at(self, position: int) -> tuple[int, int]:
        """The source at a position, and the position in that source.

        Source after source takes its share of what the earlier ones left: the n-th of a places among r is
        the first x with (x + 1) * a // r > n.
        """
        rest = sum(self.shares)
        for source, share in enumerate(self.shares[:-1]):
            taken = position * share // rest
            if (position + 1) * share // rest > taken:
                return source, taken
            position -= taken
            rest -= share
        return len(self.shares) - 1, position

    def source_positions(self, position: int) -> tuple[int, ...]:
        """How many visits of each source lie before a position."""
        left, rest, before = position, sum(self.shares), []
        for share in self.shares[:-1]:
            before.append(left * share // rest)
            left -= before[-1]
            rest -= share
        return (*before, left)

    def replacement(self, sample_index: SampleIndex, attempt: int) -> SampleIndex:
        """The visit `attempt` places further in the file order of the same source."""
        source = self.source_of(sample_index.shard)
        first = self._first_shards[source]
        found = self.orders[source].replacement(sample_index._replace(shard=sample_index.shard - first), attempt)
        return found._replace(shard=found.shard + first)

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of the current and the next window of every source."""
        places = zip(self.orders, self.source_positions(position), self._first_shards, strict=True)
        return [first + shard for order, place, first in places for shard in order.upcoming_shards(place)]

    def finished_epochs(self, position: int) -> tuple[int, ...]:
        """Whole epochs of each source that lie before a position."""
        places = zip(self.orders, self.source_positions(position), strict=True)
        return tuple(place // order.num_samples for order, place in places)

    def source_of(self, shard: int) -> int:
        """The source a shard belongs to."""
        return bisect_right(self._first_shards, shard) - 1

    @cached_property
    def _first_shards(self) -> tuple[int, ...]:
        return (0, *accumulate(len(order.counts) for order in self.orders[:-1]))


def integer_shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of the weights.

    >>> integer_shares([Fraction("0.5"), Fraction("1.25")])
    (2, 5)
    """
    scale = lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * scale) for weight in weights]
    return tuple(share // gcd(*shares) for share in shares)


_PREFETCH_SHARDS = 4


@dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """Endless batches of one process: batch n of a run begun at `position` (samples seen before it).

    The global batch n holds positions position + n*batch_size ... in order; each process takes its own
    even share of it, so any number of processes sees the same global batches.
    parts: even parts in which a share is handed over, one after the other; number n*parts + i is part i of batch n.
    """

    order: Sampler
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

    def __getitem__(self, number: int) -> BatchIndices:
        first = self.first_position(number)
        return BatchIndices(self.order.locate(range(first, first + self.largest)), position=first)

    def first_position(self, number: int) -> int:
        """Position of the first sample handed over under this number."""
        batch, part = divmod(number, self.parts)
        return self.position + batch * self.batch_size + self.process * self.share + part * self.largest

    def upcoming_shards(self, number: int) -> list[int]:
        """The shards that number and those soon after it need, of any process."""
        return self.order.upcoming_shards(self.position + number // self.parts * self.batch_size)

    def replacement(self, sample_index: SampleIndex, attempt: int) -> SampleIndex:
        """The sample `attempt` places further in file order, in place of one that cannot be read."""
        return self.order.replacement(sample_index, attempt)


@dataclass(frozen=True, kw_only=True, eq=False)
class SequentialBatches:
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

    def __getitem__(self, number: int) -> list[SampleIndex]:
        shard, first = self._batches[number]
        last = min(first + self.batch_size, self.kept[shard])
        places = range(first, last) if self.times is None else np.flatnonzero(self.times[shard])[first:last].tolist()
        return [SampleIndex(0, shard, place) for place in places]

    def upcoming_shards(self, number: int) -> list[int]:
        """The shard of batch `number` and the next few."""
        if number >= len(self._batches):
            return []
        shard = self._batches[number][0]
        return list(range(shard, min(shard + _PREFETCH_SHARDS, len(self.counts))))
