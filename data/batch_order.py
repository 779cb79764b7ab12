"""Samplers that decide which samples share a batch: no two equal ones (distinct), or mutually similar ones (hard).

`ArrangedOrder` permutes what a `SampleOrder` shows inside blocks of an epoch, so that every sample still comes as
often as before, and which one comes at a position is a pure function of seed, epoch, shard sizes and relations.
A batch over the end of a block belongs to two blocks: the samples that a block leaves for its last, unfinished batch
are chosen first and by that block alone; the next block fills the batch up with samples that fit to these. So no block
depends on more than the one before it.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from vlm.data.corpus import Corpus
from vlm.data.sample_relations import SampleRelations, ShardRelations
from vlm.data.sampler import LruCache, SampleOrder
from vlm.data.samples import SampleIndex
from vlm.data.shard_cache import ShardCache
from vlm.errors import UsageError
from vlm.files import compute_fingerprint

logger = logging.getLogger(__name__)

Mode = Literal["distinct", "hard"]

_CACHED_BLOCKS = 3
# how many blocks of the first epoch are looked at before training, to say whether distinct batches are possible
_CHECKED_BLOCKS = 4


class Visit(NamedTuple):
    """One visit of a block: its place in the block's own order, what it shows, and the groups it is in."""

    place: int
    sample_index: SampleIndex
    groups: tuple[int, ...]


class _Arrangement(NamedTuple):
    """A block in its new order. tail: how many visits at its end belong to the batch that the next block completes."""

    visits: list[Visit]
    tail: int


class _Bin:
    """A batch that is being filled, with the groups in it."""

    __slots__ = ("groups", "room", "visits")

    def __init__(self, room: int, groups: Iterable[int] = ()) -> None:
        self.room = room
        self.groups = set(groups)
        self.visits: list[Visit] = []

    def takes(self, groups: Iterable[int]) -> bool:
        """Whether there is room, and nothing equal."""
        return self.room > 0 and self.groups.isdisjoint(groups)

    def add(self, visit: Visit) -> None:
        """Put a visit in."""
        self.visits.append(visit)
        self.groups.update(visit.groups)
        self.room -= 1

    def swap(self, old: Visit, new: Visit) -> None:
        """Replace a visit by one without groups, or the other way round."""
        self.visits[self.visits.index(old)] = new
        # anew, since another visit may hold a group of the old one too
        self.groups = set()
        for visit in self.visits:
            self.groups.update(visit.groups)


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrangedOrder:
    """The samples of an epoch in batches of samples that suit each other.

    base: the order that is rearranged. batch_size: of the global batches, which begin at its multiples. relations: of
    each shard. cluster: in hard batches, how many mutually similar samples stand together; 1 in distinct ones.

    Distinct batches hold no two samples of one group, as long as no group has more visits in a block than the block
    has whole batches and no sample is in several groups; `shared_batches` counts what is left. Hard batches are
    distinct, too, and made of clusters: a sample, and of its stored neighbours in the block the nearest not yet taken.

    Memory: the visits of three blocks, each of at most two windows of `base`. Time: below a second a block of 65,536
    for each loader worker, in addition to what the base takes.
    """

    base: SampleOrder
    batch_size: int
    relations: tuple[ShardRelations, ...]
    cluster: int = 1
    _caches: dict[str, LruCache] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size > self.base.num_samples:
            raise UsageError(
                f"A batch of {self.batch_size:,} holds samples twice, since there are {self.base.num_samples:,}; give "
                "a smaller --batch-size, or --batches random."
            )

    @property
    def num_samples(self) -> int:
        """Visits in one epoch."""
        return self.base.num_samples

    def locate(self, positions: Sequence[int]) -> list[SampleIndex]:
        """The visits at the given positions."""
        sample_indices: list[SampleIndex] = []
        for position in positions:
            epoch, offset = divmod(position, self.num_samples)
            block = self._block_at(offset)
            visits = self._arranged(epoch, block).visits
            sample_indices.append(visits[offset - self._starts[block]].sample_index)
        return sample_indices

    def replacement(self, sample_index: SampleIndex, attempt: int) -> SampleIndex:
        """The sample `attempt` further on in file order; it may be equal to another of its batch."""
        return self.base.replacement(sample_index, attempt)

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of the block at a position and of the next one."""
        offset = position % self.num_samples
        start = position - offset + self._starts[self._block_at(offset)]
        upcoming: dict[int, None] = {}
        # what the base needs for each of its windows in the two blocks
        for first in range(start, start + 2 * self._longest_block, self.base.window):
            upcoming |= dict.fromkeys(self.base.upcoming_shards(first))
        return list(upcoming)

    def finished_epochs(self, position: int) -> tuple[int, ...]:
        """Whole epochs before a position."""
        return self.base.finished_epochs(position)

    def shared_batches(self, batches: Iterable[int]) -> int:
        """How many visits of these batches share a batch with an equal sample before them."""
        shared = 0
        for number in batches:
            groups: set[int] = set()
            for sample_index in self.locate(range(number * self.batch_size, (number + 1) * self.batch_size)):
                own = self.identities(sample_index)
                shared += not groups.isdisjoint(own)
                groups.update(own)
        return shared

    @cached_property
    def _starts(self) -> list[int]:
        """Where the blocks of an epoch begin, with its end; each is at least a window and a batch long."""
        total = self.num_samples
        number = max(1, total // max(self.base.window, self.batch_size))
        return [total * block // number for block in range(number + 1)]

    @property
    def _longest_block(self) -> int:
        return max(after - before for before, after in pairwise(self._starts))

    def _block_at(self, offset: int) -> int:
        return int(np.searchsorted(self._starts, offset, "right")) - 1

    def _arranged(self, epoch: int, block: int) -> _Arrangement:
        return self._cache("blocks").get((epoch, block), lambda: self._arrange(epoch, block))

    def _arrange(self, epoch: int, block: int) -> _Arrangement:
        visits = self._cache("visits").get((epoch, block), lambda: self._visits(epoch, block))
        begin = epoch * self.num_samples + self._starts[block]
        # positions count on over blocks and epochs, so that a batch may begin in one block and end in the next
        head = min(-begin % self.batch_size, len(visits))
        tail = self._tail(epoch, block)
        taken = {visit.place for visit in tail}
        pending = [visit for visit in visits if visit.place not in taken]

        # the batch that the block before has begun is completed with what fits to it
        before: list[Visit] = []
        if head and begin:
            before = self._tail(*((epoch, block - 1) if block else (epoch - 1, len(self._starts) - 2)))
        first = _fill_one(_Bin(head, _all_identities(self, before)), pending, self)
        taken = {visit.place for visit in first}
        pending = [visit for visit in pending if visit.place not in taken]

        bins = [_Bin(self.batch_size) for _ in range(len(pending) // self.batch_size)]
        rng = np.random.default_rng([self.base.seed, epoch, 2, block])
        if self.cluster > 1:
            pending = _place_clusters(self._clusters(pending), bins, rng)
        _place(pending, bins, rng)
        _repair(bins)
        ordered = list(first)
        for filled in bins:
            # in the base's order again: which samples share a batch is all that is arranged
            ordered += sorted(filled.visits)
        return _Arrangement(ordered + tail, len(tail))

    def _tail(self, epoch: int, block: int) -> list[Visit]:
        """The visits that a block leaves for the batch over its end, found from the end of its own order."""

        def choose() -> list[Visit]:
            # without the block's arrangement: it needs the tail before, which would need that before, to the start
            visits = self._cache("visits").get((epoch, block), lambda: self._visits(epoch, block))
            end = epoch * self.num_samples + self._starts[block + 1]
            return sorted(_fill_one(_Bin(end % self.batch_size), visits[::-1], self))

        return self._cache("tails").get((epoch, block), choose)

    def _visits(self, epoch: int, block: int) -> list[Visit]:
        """The visits of a block in the base's order."""
        first = epoch * self.num_samples
        located = self.base.locate(range(first + self._starts[block], first + self._starts[block + 1]))
        is_repeated = self.base.times is not None
        visits: list[Visit] = []
        for place, sample_index in enumerate(located):
            # a sample that a selection repeats must not meet itself either
            groups = self.identities(sample_index) if is_repeated else self._groups(sample_index)
            visits.append(Visit(place, sample_index, groups))
        return visits

    def _groups(self, sample_index: SampleIndex) -> tuple[int, ...]:
        return self.relations[sample_index.shard].groups_of(sample_index.number)

    def identities(self, sample_index: SampleIndex) -> tuple[int, ...]:
        """The groups, and a negative number for the sample itself, which may come twice where two epochs meet."""
        own = -1 - self.relations[sample_index.shard].first - sample_index.number
        return (own, *self._groups(sample_index))

    def _clusters(self, visits: Sequence[Visit]) -> list[list[Visit]]:
        """Visits in clusters of `cluster`: one, and its nearest neighbours that are left and equal to none of them."""
        by_position: dict[int, list[Visit]] = {}
        for visit in visits:
            shard, number = visit.sample_index.shard, visit.sample_index.number
            by_position.setdefault(self.relations[shard].first + number, []).append(visit)
        is_taken: set[int] = set()
        clusters: list[list[Visit]] = []
        for seed in visits:
            if seed.place in is_taken:
                continue
            cluster = [seed]
            is_taken.add(seed.place)
            groups = set(seed.groups)
            for position in self.relations[seed.sample_index.shard].neighbours_of(seed.sample_index.number):
                if len(cluster) == self.cluster:
                    break
                for visit in by_position.get(position, ()):
                    if visit.place not in is_taken and groups.isdisjoint(visit.groups):
                        cluster.append(visit)
                        is_taken.add(visit.place)
                        groups.update(visit.groups)
                        break
            clusters.append(cluster)
        return clusters

    def _cache(self, name: str) -> LruCache:
        return self._caches.setdefault(name, LruCache(_CACHED_BLOCKS))


def _all_identities(order: ArrangedOrder, visits: Iterable[Visit]) -> Iterator[int]:
    for visit in visits:
        yield from order.identities(visit.sample_index)


def _fill_one(batch: _Bin, visits: Iterable[Visit], order: ArrangedOrder) -> list[Visit]:
    """The visits that fill a bin, the first ones that fit; if too few fit, then the first others."""
    if not batch.room:
        return []
    others: list[Visit] = []
    for visit in visits:
        identities = order.identities(visit.sample_index)
        if batch.takes(identities):
            batch.add(visit)
            batch.groups.update(identities)
        elif batch.room:
            others.append(visit)
        else:
            break
    for visit in others[: batch.room]:
        batch.add(visit)
    return batch.visits


def _place_clusters(clusters: Sequence[list[Visit]], bins: list[_Bin], rng: np.random.Generator) -> list[Visit]:
    """Put whole clusters into the emptiest bins that take them; returns the visits that no bin took so."""
    left: list[Visit] = []
    order = rng.permutation(len(bins)).tolist()
    for turn, cluster in enumerate(clusters):
        groups: set[int] = set()
        for visit in cluster:
            groups.update(visit.groups)
        is_placed = False
        # a few bins in turn: looking at all would take as long as the batches squared
        for step in range(min(8, len(bins)) if len(cluster) > 1 else 0):
            target = bins[order[(turn + step) % len(bins)]]
            if target.room >= len(cluster) and target.groups.isdisjoint(groups):
                for visit in cluster:
                    target.add(visit)
                is_placed = True
                break
        if not is_placed:
            left += cluster
    return sorted(left)


def _place(visits: Sequence[Visit], bins: list[_Bin], rng: np.random.Generator) -> None:
    """Fill the bins with as many visits as they have room for: those with groups first, the largest group first.

    The members of a group are dealt to the bins with the most room. Where groups are disjoint, that finds a place for
    each without two of a group in one bin whenever there is one (Gale 1957, Ryser 1957). What has no group fills the
    bins in the order it came.
    """
    members: dict[int, list[Visit]] = {}
    for visit in visits:
        for group in visit.groups:
            members.setdefault(group, []).append(visit)
    is_placed: set[int] = set()
    ties = rng.permutation(len(bins)).tolist()
    # sorted by size, then by the number of the group, so that nothing depends on the order of a dictionary
    for group in sorted(members, key=lambda group: (-len(members[group]), group)):
        own = [visit for visit in members[group] if visit.place not in is_placed]
        if len(members[group]) == 1 or not own:
            continue
        by_room: list[int] = []
        for visit in own:
            is_placed.add(visit.place)
            if not by_room:
                # for the first, and again when every bin has one: there are more than bins, so some must share
                by_room = [number for number in range(len(bins)) if bins[number].room]
                by_room.sort(key=lambda number: (-bins[number].room, ties[number]))
            # where every bin with room holds an equal one, the first takes it, and `_repair` looks for a swap
            target = by_room[0]
            for number in by_room:
                if bins[number].takes(visit.groups):
                    target = number
                    break
            bins[target].add(visit)
            by_room.remove(target)

    others: list[Visit] = []
    for visit in visits:
        if visit.place not in is_placed:
            others.append(visit)
    first = 0
    for target in bins:
        room = target.room
        for visit in others[first : first + room]:
            target.add(visit)
        first += room


def _repair(bins: list[_Bin]) -> None:
    """Swap a visit that has an equal one in its bin with one that has no groups, in a bin without its like."""
    for target in bins:
        seen: set[int] = set()
        for visit in list(target.visits):
            if seen.isdisjoint(visit.groups):
                seen.update(visit.groups)
                continue
            for other in bins:
                if other is target or not other.groups.isdisjoint(visit.groups):
                    continue
                # without groups it is equal to nothing, wherever it goes
                partner = next((own for own in other.visits if not own.groups), None)
                if partner is not None:
                    other.swap(partner, visit)
                    target.swap(visit, partner)
                    break


def arrange_batches(
    corpus: Corpus,
    relations: SampleRelations,
    mode: Mode,
    *,
    batch_size: int,
    cluster: int,
    cache: ShardCache | None = None,
) -> Corpus:
    """The corpus with its samples in distinct or hard batches; logs what stays equal.

    Raises:
        UsageError: the corpus is a mixture, a shard is not related, or hard batches lack neighbours.
    """
    if not isinstance(corpus.order, SampleOrder):
        raise UsageError(
            f"--batches {mode} arranges the samples of one source, and a mixture has several; join their shards by "
            "::, or give --batches random."
        )
    if mode == "hard" and not relations.num_neighbours:
        raise UsageError(
            "--batches hard needs neighbours, and the relations have none; make them by vlm relate SHARDS OUT "
            "--embeddings FOLDER."
        )
    cluster = cluster if mode == "hard" else 1
    order = ArrangedOrder(
        base=corpus.order,
        batch_size=batch_size,
        relations=tuple(relations.of_shards(corpus.shards, cache)),
        cluster=cluster,
    )
    _report_shared_batches(order)
    identity = compute_fingerprint(corpus.fingerprint, relations.fingerprint, str(batch_size), str(cluster))
    return replace(corpus, order=order, fingerprint=identity)


def _report_shared_batches(order: ArrangedOrder) -> None:
    longest = max(order.base.window, order.batch_size)
    num_batches = min(order.num_samples, _CHECKED_BLOCKS * longest) // order.batch_size
    shared = order.shared_batches(range(num_batches))
    if shared:
        logger.warning(
            f"{shared:,} of the first {num_batches * order.batch_size:,} samples share a batch of {order.batch_size:,} "
            "with an equal caption or image all the same: there are more of these than batches to keep them apart. "
            "Give a smaller --batch-size, or --same-pairs ignore."
        )
