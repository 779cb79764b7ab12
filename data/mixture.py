"""Several sources as one sequence, in exact proportions, each with its own epochs."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import gcd, lcm

from vlm.data.order import Address, SampleOrder


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

    def locate(self, positions: Sequence[int]) -> list[Address]:
        """The visits at the given positions."""
        places = [self.place(position) for position in positions]
        found = [
            iter(order.locate([rank for source, rank in places if source == number]))
            for number, order in enumerate(self.orders)
        ]
        addresses = [(next(found[source]), self._first_shards[source]) for source, _ in places]
        return [address._replace(shard=address.shard + first) for address, first in addresses]

    def place(self, position: int) -> tuple[int, int]:
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

    def positions_at(self, position: int) -> tuple[int, ...]:
        """How many visits of each source lie before a position."""
        left, rest, before = position, sum(self.shares), []
        for share in self.shares[:-1]:
            before.append(left * share // rest)
            left -= before[-1]
            rest -= share
        return (*before, left)

    def stand_in(self, address: Address, attempt: int) -> Address:
        """The visit `attempt` places further in the file order of the same source."""
        source = self.source_of(address.shard)
        first = self._first_shards[source]
        found = self.orders[source].stand_in(address._replace(shard=address.shard - first), attempt)
        return found._replace(shard=found.shard + first)

    def shards_from(self, position: int) -> list[int]:
        """The shards of the current and the next window of every source."""
        places = zip(self.orders, self.positions_at(position), self._first_shards, strict=True)
        return [first + shard for order, place, first in places for shard in order.shards_from(place)]

    def finished_epochs(self, position: int) -> tuple[int, ...]:
        """Whole epochs of each source that lie before a position."""
        places = zip(self.orders, self.positions_at(position), strict=True)
        return tuple(place // order.num_samples for order, place in places)

    def source_of(self, shard: int) -> int:
        """The source a shard belongs to."""
        return bisect_right(self._first_shards, shard) - 1

    @cached_property
    def _first_shards(self) -> tuple[int, ...]:
        return (0, *accumulate(len(order.counts) for order in self.orders[:-1]))


def whole_shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportions of the weights.

    >>> whole_shares([Fraction("0.5"), Fraction("1.25")])
    (2, 5)
    """
    scale = lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * scale) for weight in weights]
    return tuple(share // gcd(*shares) for share in shares)
