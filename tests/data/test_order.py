from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.order import SampleOrder
from vlm.data.plan import ShardPlan, TrainingPlan
from vlm.errors import UsageError

shard_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(counts=shard_sizes, window=st.integers(1, 200), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_epoch_holds_every_sample_exactly_once(counts, window, seed, epoch):
    order = SampleOrder(counts=tuple(counts), seed=seed, window=window)
    first = epoch * order.num_samples
    seen = Counter(order.locate(range(first, first + order.num_samples)))
    assert set(seen.values()) == {1}
    assert {(address.shard, address.number) for address in seen} == {
        (shard, number) for shard, count in enumerate(counts) for number in range(count)
    }
    assert {address.epoch for address in seen} == {epoch}


@settings(max_examples=40, deadline=None)
@given(counts=shard_sizes, share=st.integers(1, 5), processes=st.integers(1, 4), batch=st.integers(0, 30))
def test_any_number_of_processes_sees_the_same_global_batch(counts, share, processes, batch):
    order = SampleOrder(counts=tuple(counts), window=16)
    size = share * processes
    whole = TrainingPlan(order=order, batch_size=size)[batch]
    parts = [
        TrainingPlan(order=order, batch_size=size, process=process, num_processes=processes)[batch]
        for process in range(processes)
    ]
    assert [address for part in parts for address in part] == whole


@settings(max_examples=40, deadline=None)
@given(counts=shard_sizes, size=st.integers(1, 20), done=st.integers(0, 20))
def test_a_plan_from_a_position_goes_on_where_the_first_would_have(counts, size, done):
    order = SampleOrder(counts=tuple(counts), window=10)
    whole, rest = (
        TrainingPlan(order=order, batch_size=size),
        TrainingPlan(order=order, batch_size=size, position=done * size),
    )
    assert [rest[number] for number in range(4)] == [whole[done + number] for number in range(4)]


def test_epochs_and_seeds_give_different_orders_and_the_same_ones_again():
    def order_of(seed, epoch):
        return [a[1:] for a in SampleOrder(counts=(50, 50), seed=seed).locate(range(epoch * 100, epoch * 100 + 100))]

    assert order_of(0, 0) == order_of(0, 0)
    assert order_of(0, 0) != order_of(0, 1)
    assert order_of(0, 0) != order_of(1, 0)


def test_the_shuffle_mixes_shards_inside_a_window():
    first = SampleOrder(counts=(100,) * 10, window=500).locate(range(100))
    assert len({address.shard for address in first}) == 5


def test_a_batch_that_does_not_divide_by_the_processes_is_refused():
    with pytest.raises(UsageError, match="10 does not divide by 3"):
        TrainingPlan(order=SampleOrder(counts=(5,)), batch_size=10, num_processes=3)


def test_a_stand_in_walks_through_all_shards_before_it_returns():
    plan = TrainingPlan(order=SampleOrder(counts=(2, 1, 3)), batch_size=1)
    start = plan[0][0]
    walked = [plan.stand_in(start, attempt)[1:] for attempt in range(6)]
    assert len(set(walked)) == 6


def test_the_shard_plan_gives_all_in_file_order_and_never_mixes_shards():
    plan = ShardPlan(counts=[5, 1, 4], batch_size=2)
    batches = [plan[number] for number in range(len(plan))]
    assert [len(batch) for batch in batches] == [2, 2, 1, 1, 2, 2]
    assert [a[1:] for batch in batches for a in batch] == [(0, n) for n in range(5)] + [(1, 0)] + [
        (2, n) for n in range(4)
    ]
