"""Samplers: which sample is shown at which position of a run, and which positions make a batch.

A position is one number that counts visits of samples since the run began, so a run resumes from it and nothing else.
`SampleOrder` shuffles one source, as a pure function of seed, epoch and shard sizes; `Mixture` interleaves several in
exact proportions, each with its own epochs. `BatchSampler` cuts the positions into training batches, shared evenly by
the processes; `SequentialBatches` goes through the shards once, in file order, for evaluation and embedding.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, groupby
from math import gcd, lcm
from threading import Lock
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from vlm.data.samples import SampleIndex
from vlm.errors import UsageError

DEFAULT_WINDOW = 1 << 16
# a batch is in one window or two, but a window may span hundreds of shards
_CACHED_WINDOWS = 4
_CACHED_SHARDS = 256

Value = TypeVar("Value")


class BatchIndices(list[SampleIndex]):
    """The samples at consecutive positions of a run, from `position` on."""

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
        """The sample `attempt` further on in file order, in place of one that cannot be used."""
        ...

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of the window at a position and of the next, in the order in which windows need them."""
        ...

    def finished_epochs(self, position: int) -> tuple[int, ...]:
        """Whole epochs before a position, for each source."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleOrder:
    """Two-level shuffle: the shards, then the samples inside windows over the shuffled shards.

    Every sample occurs exactly once in an epoch, or as often as its selection says. Position p counts visits from the
    first epoch on, so that epoch = p // num_samples; a batch over the end of an epoch is filled from both sides.

    counts: visits of each shard in an epoch. times: how often each sample of each shard is visited (a selection's,
    memory-mapped); without it, once each.

    Memory: 20 bytes a shard, and for the windows and shards used last one permutation of at most `window` visits
    (4 bytes each) and the running sums of their times (4 bytes a sample). Nothing else grows with the samples but
    `times` itself: 2 bytes a sample, on disk.
    """

    counts: tuple[int, ...]
    seed: int = 0
    window: int = DEFAULT_WINDOW
    times: Sequence[np.ndarray] | None = None
    _caches: dict[str, "LruCache"] = field(default_factory=dict, repr=False)

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
        # a batch lies in one window nearly always: which one need not be asked for each of its positions
        if isinstance(positions, range) and positions.step == 1 and positions:
            window = self._window_of(positions[0])
            if window == self._window_of(positions[-1]):
                epoch, window_start = window
                first = positions[0] % self.num_samples - window_start
                return self._visits_in_window(epoch, window_start, range(first, first + len(positions)))
        sample_indices: list[SampleIndex] = []
        for (epoch, window_start), window_positions in groupby(positions, self._window_of):
            offsets = [position % self.num_samples - window_start for position in window_positions]
            sample_indices += self._visits_in_window(epoch, window_start, offsets)
        return sample_indices

    def replacement(self, sample_index: SampleIndex, attempt: int) -> SampleIndex:
        """The first visit of the sample `attempt` further on in file order, among those that are visited."""
        # in file order, not the shuffled one: the next sample is in a shard that is open already
        shard = sample_index.shard
        rank = self._rank(sample_index) + attempt
        while rank >= (num_visited := self._num_visited(shard)):
            rank -= num_visited
            shard = (shard + 1) % len(self.counts)
        number = rank if self.times is None else int(self._visited_numbers(shard)[rank])
        return SampleIndex(sample_index.epoch, shard, number)

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of the window at a position and of the next one, also across the end of an epoch."""
        upcoming: dict[int, None] = {}  # as an ordered set
        for _ in range(2):  # the window at the position, then the next one
            epoch, offset = divmod(position, self.num_samples)
            shards, starts = self._shuffled_shards(epoch)
            window_start = offset - offset % self.window
            window_end = min(window_start + self.window, self.num_samples)
            first = int(np.searchsorted(starts, window_start, "right")) - 1
            last = int(np.searchsorted(starts, window_end, "left"))
            for shard in shards[first:last].tolist():
                if self.counts[shard]:
                    upcoming[shard] = None
            position += window_end - offset
        return list(upcoming)

    def finished_epochs(self, position: int) -> tuple[int, ...]:
        """Whole epochs before a position."""
        return (position // self.num_samples,)

    def _window_of(self, position: int) -> tuple[int, int]:
        """The epoch of a position, and where its window begins in it."""
        epoch, offset = divmod(position, self.num_samples)
        return epoch, offset - offset % self.window

    def _visits_in_window(self, epoch: int, window_start: int, offsets: Sequence[int]) -> list[SampleIndex]:
        """The visits at these offsets from the beginning of a window."""
        # second level: where in the epoch, its shards one after the other, the shuffled window points
        places = self._window_permutation(epoch, window_start)[offsets] + np.int64(window_start)
        # first level: which of the shuffled shards is there, and which of its visits
        shards, starts = self._shuffled_shards(epoch)
        slots = starts.searchsorted(places, "right") - 1
        visits = places - starts[slots]
        pairs = zip(shards[slots].tolist(), visits.tolist(), strict=True)
        if self.times is None:
            return [SampleIndex(epoch, shard, visit) for shard, visit in pairs]
        return [self._sample_index(epoch, shard, visit) for shard, visit in pairs]

    def _sample_index(self, epoch: int, shard: int, visit: int) -> SampleIndex:
        """The sample that a visit of a shard shows; visits of a sample that is shown several times are consecutive."""
        if self.times is None:
            return SampleIndex(epoch, shard, visit)
        ends = self._visit_ends(shard)
        # searched for in the array's own type: numpy would else convert all of it at each look-up
        number = int(ends.searchsorted(ends.dtype.type(visit), "right"))
        return SampleIndex(epoch, shard, number, visit - int(ends[number - 1] if number else 0))

    def _rank(self, sample_index: SampleIndex) -> int:
        """Which of the visited samples of its shard this is."""
        if self.times is None:
            return sample_index.number
        return int(self._visited_numbers(sample_index.shard).searchsorted(sample_index.number))

    def _num_visited(self, shard: int) -> int:
        return self.counts[shard] if self.times is None else len(self._visited_numbers(shard))

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard numbers in this epoch's order, and where each begins in it, with the total at the end."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            # the lists that seed the generators must not change, here and below, or a seed gives another order
            shards = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.counts))
            counts = np.asarray(self.counts, dtype=np.int64)[shards]
            return shards, np.concatenate([[0], np.cumsum(counts)])

        return self._cache("epochs", _CACHED_WINDOWS).get(epoch, make)

    def _window_permutation(self, epoch: int, window_start: int) -> np.ndarray:
        def make() -> np.ndarray:
            length = min(self.window, self.num_samples - window_start)
            rng = np.random.default_rng([self.seed, epoch, 1, window_start])
            # half the memory of int64; no window comes near 2^32 visits
            return rng.permutation(length).astype(np.uint32)

        return self._cache("windows", _CACHED_WINDOWS).get((epoch, window_start), make)

    def _visit_ends(self, shard: int) -> np.ndarray:
        """Where the visits of each sample of a shard end, among the shard's visits."""
        assert self.times is not None
        times = self.times[shard]
        return self._cache("ends", _CACHED_SHARDS).get(shard, lambda: np.cumsum(times, dtype=np.uint32))

    def _visited_numbers(self, shard: int) -> np.ndarray:
        """The samples of a shard that are visited."""
        assert self.times is not None
        times = self.times[shard]
        return self._cache("numbers", _CACHED_WINDOWS).get(shard, lambda: np.flatnonzero(times).astype(np.uint32))

    def _cache(self, name: str, size: int) -> "LruCache":
        return self._caches.setdefault(name, LruCache(size))


class LruCache:
    """The values used last, by key; threads may share it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not held."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            else:
                self._values[key] = make()
                if len(self._values) > self._size:
                    self._values.popitem(last=False)
            return self._values[key]

    def __reduce__(self) -> "tuple[type[LruCache], tuple[int]]":
        # each process fills its own: a lock cannot be sent, and the values may be large
        return LruCache, (self._size,)


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
        sources: list[int] = []
        positions_in: list[list[int]] = [[] for _ in self.orders]
        for position in positions:
            source, source_position = self.source_at(position)
            sources.append(source)
            positions_in[source].append(source_position)

        # all positions of a source at once: its order looks up a whole batch faster than one by one
        visits: list[Iterator[SampleIndex]] = []
        for order, own_positions in zip(self.orders, positions_in, strict=True):
            visits.append(iter(order.locate(own_positions)))
        sample_indices: list[SampleIndex] = []
        for source in sources:
            visit = next(visits[source])
            sample_indices.append(visit._replace(shard=visit.shard + self._first_shards[source]))
        return sample_indices

    def source_at(self, position: int) -> tuple[int, int]:
        """The source at a position, and the position in that source.

        Source after source takes its share of what the earlier ones left: the n-th of a places among r is
        the first x with (x + 1) * a // r > n.
        """
        remaining_shares = sum(self.shares)
        for source, share in enumerate(self.shares[:-1]):
            taken = position * share // remaining_shares
            if (position + 1) * share // remaining_shares > taken:
                return source, taken
            position -= taken
            remaining_shares -= share
        return len(self.shares) - 1, position

    def source_positions(self, position: int) -> tuple[int, ...]:
        """How many visits of each source come before a position."""
        # by the divisions of source_at: the two must agree at every position
        before: list[int] = []
        remaining_shares = sum(self.shares)
        for share in self.shares[:-1]:
            taken = position * share // remaining_shares
            before.append(taken)
            position -= taken
            remaining_shares -= share
        return (*before, position)

    def replacement(self, sample_index: SampleIndex, attempt: int) -> SampleIndex:
        """The visit `attempt` further on in the file order of the same source."""
        source = self.source_of(sample_index.shard)
        first = self._first_shards[source]
        # from the same source, or damage in one would shift the proportions of the mixture
        replacement = self.orders[source].replacement(sample_index._replace(shard=sample_index.shard - first), attempt)
        return replacement._replace(shard=replacement.shard + first)

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of the current and the next window of every source."""
        upcoming: list[int] = []
        for order, own_position, first in zip(
            self.orders, self.source_positions(position), self._first_shards, strict=True
        ):
            for shard in order.upcoming_shards(own_position):
                upcoming.append(first + shard)
        return upcoming

    def finished_epochs(self, position: int) -> tuple[int, ...]:
        """Whole epochs of each source before a position."""
        own_positions = zip(self.orders, self.source_positions(position), strict=True)
        return tuple(own // order.num_samples for order, own in own_positions)

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
    # times the common denominator they are whole; the shares are then as small as the proportions allow
    scale = lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * scale) for weight in weights]
    divisor = gcd(*shares)
    return tuple(share // divisor for share in shares)


_PREFETCH_SHARDS = 4
"""Of a sequential pass: the shard that is read and the next three."""


@dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """Endless batches of one process: batch n of a run begun at `position` (samples seen before it).

    The global batch n holds positions position + n*batch_size ... in order; each process takes its own
    even share of it, so any number of processes sees the same global batches.
    parts: micro-batches a process's share is handed over in; number n*parts + i is part i of batch n.
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
    def largest_batch(self) -> int:
        """Samples handed over at once."""
        return self.share // self.parts

    def __getitem__(self, number: int) -> BatchIndices:
        first = self.first_position(number)
        return BatchIndices(self.order.locate(range(first, first + self.largest_batch)), position=first)

    def first_position(self, number: int) -> int:
        """Position of the first sample handed over under this number."""
        batch, part = divmod(number, self.parts)
        # processes take consecutive stretches of the batch, and parts consecutive stretches of those: gathered in
        # order they are the global batch again
        return self.position + batch * self.batch_size + self.process * self.share + part * self.largest_batch

    def upcoming_shards(self, number: int) -> list[int]:
        """The shards that this batch and those soon after it need, in any process."""
        return self.order.upcoming_shards(self.position + number // self.parts * self.batch_size)

    def replacement(self, sample_index: SampleIndex, attempt: int) -> SampleIndex:
        """The sample `attempt` further on in file order, in place of one that cannot be used."""
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
    def largest_batch(self) -> int:
        """Most samples a batch may hold."""
        return self.batch_size

    @cached_property
    def samples_per_shard(self) -> list[int]:
        """Samples of each shard that are in some batch."""
        if self.times is None:
            return list(self.counts)
        return [int(np.count_nonzero(times)) for times in self.times]

    @cached_property
    def _batches(self) -> list[tuple[int, int]]:
        """The shard of each batch, and which of its samples is the first."""
        # no batch crosses shards, so that embeddings can be written and resumed shard by shard
        batches: list[tuple[int, int]] = []
        for shard, count in enumerate(self.samples_per_shard):
            for first in range(0, count, self.batch_size):
                batches.append((shard, first))
        return batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> list[SampleIndex]:
        shard, first = self._batches[number]
        last = min(first + self.batch_size, self.samples_per_shard[shard])
        numbers = range(first, last) if self.times is None else np.flatnonzero(self.times[shard])[first:last].tolist()
        return [SampleIndex(0, shard, sample_number) for sample_number in numbers]

    def upcoming_shards(self, number: int) -> list[int]:
        """The shard of batch `number` and the next few."""
        if number >= len(self._batches):
            return []
        shard = self._batches[number][0]
        return list(range(shard, min(shard + _PREFETCH_SHARDS, len(self.counts))))
