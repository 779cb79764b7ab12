"""The order in which samples are seen: a pure function of seed, epoch and shard sizes, addressed by one number."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

DEFAULT_WINDOW = 1 << 16


class Address(NamedTuple):
    """A sample at one visit: in which epoch, from which shard, which number in it."""

    epoch: int
    shard: int
    number: int


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Two-level shuffle: the shards, then the samples inside windows over the shuffled shards.

    Every sample occurs exactly once in an epoch. Position p counts samples from the first epoch on, so that
    epoch = p // num_samples; a batch over the end of an epoch is filled from both sides.
    Memory: one permutation of at most `window` samples (4 bytes each) for each of the last few windows used.
    """

    counts: tuple[int, ...]
    seed: int = 0
    window: int = DEFAULT_WINDOW

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return sum(self.counts)

    def locate(self, positions: Sequence[int]) -> list[Address]:
        """The samples at the given positions."""
        total = self.num_samples
        return [self._address(position // total, position % total) for position in positions]

    def _address(self, epoch: int, offset: int) -> Address:
        shards, starts = _shuffled_shards(self.counts, self.seed, epoch)
        first = offset - offset % self.window
        length = min(self.window, int(starts[-1]) - first)
        within = _window_permutation(self.seed, epoch, first, length)[offset - first]
        place = first + int(within)
        slot = int(np.searchsorted(starts, place, side="right")) - 1
        return Address(epoch, int(shards[slot]), place - int(starts[slot]))


@lru_cache(maxsize=4)
def _shuffled_shards(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Shard numbers in this epoch's order, and where each begins in it, with the total at the end."""
    shards = np.random.default_rng([seed, epoch, 0]).permutation(len(counts))
    starts = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64)[shards])])
    return shards, starts


@lru_cache(maxsize=4)
def _window_permutation(seed: int, epoch: int, first: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, 1, first]).permutation(length).astype(np.uint32)
