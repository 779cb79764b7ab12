"""Batches of samples that suit each other: none is lost, no two equal ones meet, and a position tells all."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.batch_order import ArrangedOrder
from vlm.data.sample_relations import ShardRelations
from vlm.data.sampler import BatchSampler, SampleOrder
from vlm.errors import UsageError


def related(sizes, groups, neighbours=None):
    """Relations of shards of these sizes; groups and neighbours by position."""
    shards, first = [], 0
    for number, size in enumerate(sizes):
        own = [groups.get(first + sample, ()) for sample in range(size)]
        near = [(neighbours or {}).get(first + sample, ()) for sample in range(size)]
        shards.append(
            ShardRelations(
                name=str(number),
                fingerprint=str(number),
                first=first,
                group_ends=np.cumsum(list(map(len, own))),
                groups=np.array([group for entry in own for group in entry], np.int64),
                neighbour_ends=np.cumsum(list(map(len, near))),
                neighbours=np.array([other for entry in near for other in entry], np.int64),
            )
        )
        first += size
    return tuple(shards)


@st.composite
def arranged_orders(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)))
    total = sum(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    times = None
    if draw(st.booleans()):
        times = [rng.choice([0, 1, 1, 2], size).astype(np.uint16) for size in sizes]
        times[0][0] = 1
    base = SampleOrder(counts=sizes, seed=draw(st.integers(0, 3)), window=draw(st.integers(1, 100)))
    if times is not None:
        base = SampleOrder.of_selection(times, seed=base.seed, window=base.window)
    groups = {
        position: tuple({int(rng.integers(0, total)), 1000 + int(rng.integers(0, total))}) for position in range(total)
    }
    neighbours = {position: tuple(rng.permutation(total)[:5].tolist()) for position in range(total)}
    return ArrangedOrder(
        base=base,
        batch_size=draw(st.integers(1, base.num_samples)),
        relations=related(sizes, groups, neighbours),
        cluster=draw(st.sampled_from([1, 3])),
    )


@settings(max_examples=80, deadline=None)
@given(order=arranged_orders(), epoch=st.integers(0, 2))
def test_every_epoch_shows_what_the_base_shows(order, epoch):
    positions = range(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    assert Counter(order.locate(positions)) == Counter(order.base.locate(positions))
    assert order.finished_epochs(positions[-1] + 1) == (epoch + 1,)


@settings(max_examples=60, deadline=None)
@given(order=arranged_orders(), positions=st.lists(st.integers(0, 2000), max_size=30))
def test_a_position_alone_decides_what_is_shown(order, positions):
    fresh = ArrangedOrder(
        base=order.base, batch_size=order.batch_size, relations=order.relations, cluster=order.cluster
    )
    assert order.locate(positions) == [fresh.locate([position])[0] for position in reversed(positions)][::-1]


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(20, 300),
    batch=st.integers(2, 20),
    window=st.integers(1, 400),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_no_batch_holds_two_of_a_group_that_has_no_more_members_than_a_block_has_whole_batches(
    total, batch, window, seed, data
):
    base = SampleOrder(counts=(total,), seed=seed, window=window)
    number_of_blocks = max(1, total // max(window, batch))
    # of any block, whole batches that are neither begun by the block before nor completed by the next
    whole = (total // number_of_blocks - 2 * (batch - 1)) // batch
    if whole < 1:
        return
    groups, group, position = {}, 0, 0
    while position < total:
        size = data.draw(st.integers(1, whole))
        for member in range(position, min(position + size, total)):
            groups[member] = (group,)
        position, group = position + size, group + 1
    order = ArrangedOrder(base=base, batch_size=batch, relations=related((total,), groups))
    assert order.shared_batches(range(3 * total // batch)) == 0


def test_what_cannot_be_kept_apart_is_counted_and_spread():
    groups = {position: (0,) for position in range(30)}
    order = ArrangedOrder(base=SampleOrder(counts=(100,)), batch_size=10, relations=related((100,), groups))
    # ten batches hold thirty equal samples: three in each, of which two share it
    assert order.shared_batches(range(10)) == 20
    for number in range(10):
        shown = order.locate(range(number * 10, number * 10 + 10))
        assert sum(sample_index.number < 30 for sample_index in shown) == 3


def test_a_group_in_every_whole_batch_finds_its_places():
    # twenty groups of ten in twenty batches of ten
    groups = {position: (position // 10,) for position in range(200)}
    order = ArrangedOrder(base=SampleOrder(counts=(200,)), batch_size=10, relations=related((200,), groups))
    assert order.shared_batches(range(60)) == 0
    plain = [order.base.locate(range(first, first + 10)) for first in range(0, 200, 10)]
    assert any(len({visit.number // 10 for visit in batch}) < 10 for batch in plain)


def test_samples_in_two_groups_are_kept_apart_where_others_make_room():
    rng = np.random.default_rng(0)
    groups = {position: (position // 3, 1000 + int(rng.integers(0, 60))) for position in range(240)}
    order = ArrangedOrder(base=SampleOrder(counts=(600,)), batch_size=20, relations=related((600,), groups))
    assert order.shared_batches(range(90)) == 0


def test_hard_batches_hold_neighbours_that_are_not_equal():
    # classes of eight; of each, samples 0 and 1 are equal
    neighbours = {
        position: tuple(other for other in range(position // 8 * 8, position // 8 * 8 + 8) if other != position)
        for position in range(800)
    }
    groups = {position: (position // 8,) for position in range(800) if position % 8 < 2}
    relations = related((300, 500), groups, neighbours)
    order = ArrangedOrder(base=SampleOrder(counts=(300, 500)), batch_size=40, relations=relations, cluster=4)

    def similar_pairs(sampler):
        number = 0
        for batch in range(20):
            visits = sampler.locate(range(batch * 40, batch * 40 + 40))
            classes = Counter((visit.shard * 300 + visit.number) // 8 for visit in visits)
            number += sum(count * (count - 1) // 2 for count in classes.values())
        return number

    assert similar_pairs(order) > 8 * similar_pairs(order.base)
    assert order.shared_batches(range(60)) == 0


@pytest.mark.parametrize("cluster", [1, 4])
def test_processes_and_resumed_runs_see_the_same_global_batches(cluster):
    rng = np.random.default_rng(1)
    groups = {position: (int(rng.integers(0, 60)),) for position in range(90)}
    neighbours = {position: tuple(rng.permutation(90)[:6].tolist()) for position in range(90)}
    relations = related((50, 40), groups, neighbours)

    def order():
        base = SampleOrder(counts=(50, 40), window=30)
        return ArrangedOrder(base=base, batch_size=12, relations=relations, cluster=cluster)

    whole = BatchSampler(order=order(), batch_size=12)
    for batch in (0, 7, 8, 30):
        shares = [BatchSampler(order=order(), batch_size=12, process=rank, num_processes=3)[batch] for rank in range(3)]
        assert [visit for share in shares for visit in share] == whole[batch]
    resumed = BatchSampler(order=order(), batch_size=12, position=9 * 12)
    assert [resumed[number] for number in range(5)] == [whole[number] for number in range(9, 14)]


@settings(max_examples=40, deadline=None)
@given(order=arranged_orders(), position=st.integers(0, 1000))
def test_the_shards_named_ahead_are_those_the_next_samples_come_from(order, position):
    named = order.upcoming_shards(position)
    assert len(named) == len(set(named))
    assert {visit.shard for visit in order.locate(range(position, position + 3))} <= set(named)


def test_a_batch_larger_than_the_epoch_is_refused():
    with pytest.raises(UsageError, match="holds samples twice, since there are 8"):
        ArrangedOrder(base=SampleOrder(counts=(8,)), batch_size=9, relations=related((8,), {}))
