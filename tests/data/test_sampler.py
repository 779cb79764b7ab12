import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.sampler import BatchSampler, Mixture, SampleOrder, SequentialBatches, integer_shares
from vlm.errors import UsageError

shard_sizes = st.lists(st.integers(1, 500), min_size=1, max_size=40)


@st.composite
def selections(draw):
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    times = [rng.choice([0, 0, 1, 1, 2, 5], size).astype(np.uint16) for size in sizes]
    times[-1][-1] = 1
    return times


@st.composite
def orders(draw):
    seed, window = draw(st.integers(0, 5)), draw(st.integers(1, 3000))
    if draw(st.booleans()):
        return SampleOrder.of_selection(draw(selections()), seed=seed, window=window)
    return SampleOrder(counts=tuple(draw(shard_sizes)), seed=seed, window=window)


@st.composite
def mixtures(draw):
    parts = draw(st.lists(orders(), min_size=1, max_size=4))
    shares = draw(st.lists(st.integers(1, 50), min_size=len(parts), max_size=len(parts)))
    whole = integer_shares([Fraction(share) for share in shares])
    return Mixture(orders=tuple(parts), shares=whole, num_samples=sum(part.num_samples for part in parts))


@settings(max_examples=60, deadline=None)
@given(order=orders(), epoch=st.integers(0, 3))
def test_every_epoch_holds_every_sample_as_often_as_its_selection_says(order, epoch):
    first = epoch * order.num_samples
    visits = order.locate(range(first, first + order.num_samples))
    assert max(Counter(visits).values()) == 1
    assert {visit.epoch for visit in visits} == {epoch}
    times = order.times or [np.ones(count, int) for count in order.counts]
    asked = {(s, n): int(part[n]) for s, part in enumerate(times) for n in np.flatnonzero(part).tolist()}
    assert Counter(visit[1:3] for visit in visits) == asked


@settings(max_examples=60, deadline=None)
@given(order=st.one_of(orders(), mixtures()), positions=st.lists(st.integers(0, 20_000), max_size=40))
def test_positions_are_located_together_as_one_by_one(order, positions):
    assert order.locate(positions) == [order.locate([position])[0] for position in positions]


@settings(max_examples=40, deadline=None)
@given(
    order=st.one_of(orders(), mixtures()),
    share=st.integers(1, 5),
    processes=st.integers(1, 4),
    batch=st.integers(0, 300),
)
def test_any_number_of_processes_sees_the_same_global_batch(order, share, processes, batch):
    size = share * processes
    whole = BatchSampler(order=order, batch_size=size)[batch]
    parts = [
        BatchSampler(order=order, batch_size=size, process=process, num_processes=processes)[batch]
        for process in range(processes)
    ]
    assert [sample_index for part in parts for sample_index in part] == whole


@settings(max_examples=40, deadline=None)
@given(order=st.one_of(orders(), mixtures()), size=st.integers(1, 40), done=st.integers(0, 400))
def test_a_plan_from_a_position_goes_on_where_the_first_would_have(order, size, done):
    whole, rest = BatchSampler(order=order, batch_size=size), BatchSampler(order=order, batch_size=1, position=done)
    alone = [sample_index for number in range(4 * size) for sample_index in rest[number]]
    every = [sample_index for number in range(done // size + 6) for sample_index in whole[number]]
    assert alone == every[done : done + 4 * size]


@settings(max_examples=60, deadline=None)
@given(mixture=mixtures(), cycle=st.integers(0, 3), data=st.data())
def test_a_mixture_keeps_its_proportions_in_every_stretch(mixture, cycle, data):
    length = sum(mixture.shares)
    exact = Counter(mixture.source_at(place)[0] for place in range(cycle * length, (cycle + 1) * length))
    assert [exact[source] for source in range(len(mixture.shares))] == list(mixture.shares)
    first, stretch = data.draw(st.integers(0, 4 * length)), data.draw(st.integers(1, 2 * length))
    found = Counter(mixture.source_at(place)[0] for place in range(first, first + stretch))
    for source, share in enumerate(mixture.shares):
        assert abs(found[source] - stretch * share / length) <= len(mixture.shares)


@settings(max_examples=40, deadline=None)
@given(mixture=mixtures())
def test_each_source_of_a_mixture_shows_its_own_order_without_gap(mixture):
    visits = mixture.locate(range(300))
    first = 0
    for source, order in enumerate(mixture.orders):
        own = [v._replace(shard=v.shard - first) for v in visits if mixture.source_of(v.shard) == source]
        assert own == order.locate(range(len(own)))
        assert mixture.source_positions(300)[source] == len(own)
        assert mixture.finished_epochs(300)[source] == len(own) // order.num_samples
        first += len(order.counts)


@settings(max_examples=40, deadline=None)
@given(order=st.one_of(orders(), mixtures()), position=st.integers(0, 5000))
def test_the_shards_named_ahead_are_those_the_next_samples_come_from(order, position):
    named = order.upcoming_shards(position)
    assert len(named) == len(set(named))
    assert {visit.shard for visit in order.locate(range(position, position + 2))} <= set(named)


def test_the_windows_ahead_are_the_current_and_the_next():
    order = SampleOrder(counts=(10,) * 10, window=20)
    for position in (0, 25, 95, 130):
        start = position - position % 20
        ahead = {v.shard for v in order.locate(range(start, start + 40))}
        assert set(order.upcoming_shards(position)) == ahead


def test_epochs_and_seeds_give_different_orders_and_the_same_ones_again():
    def order_of(seed, epoch):
        return [a[1:] for a in SampleOrder(counts=(50, 50), seed=seed).locate(range(epoch * 100, epoch * 100 + 100))]

    assert order_of(0, 0) == order_of(0, 0)
    assert order_of(0, 0) != order_of(0, 1)
    assert order_of(0, 0) != order_of(1, 0)


def test_the_shuffle_mixes_shards_inside_a_window():
    first = SampleOrder(counts=(100,) * 10, window=500).locate(range(100))
    assert len({sample_index.shard for sample_index in first}) == 5


def test_a_batch_that_does_not_divide_by_the_processes_is_refused():
    with pytest.raises(UsageError, match="10 does not divide by 3"):
        BatchSampler(order=SampleOrder(counts=(5,)), batch_size=10, num_processes=3)


@settings(max_examples=40, deadline=None)
@given(order=st.one_of(orders(), mixtures()), position=st.integers(0, 2000))
def test_a_stand_in_walks_through_all_samples_of_its_source_before_it_returns(order, position):
    start = order.locate([position])[0]
    source = order.orders[order.source_of(start.shard)] if isinstance(order, Mixture) else order
    kept = sum(source.counts) if source.times is None else sum(int(np.count_nonzero(part)) for part in source.times)
    walked = [order.replacement(start, attempt)[1:] for attempt in range(min(kept, 400))]
    assert walked[0] == (*start[1:3], 0)
    assert len(set(walked)) == len(walked)
    assert order.replacement(start, kept)[1:] == walked[0]


def test_the_repeats_of_a_bad_sample_do_not_stand_in_for_it():
    order = SampleOrder.of_selection([np.array([1, 200, 0, 1], np.uint16)])
    start = next(visit for visit in order.locate(range(202)) if visit.number == 1)
    assert [order.replacement(start, attempt).number for attempt in (1, 2, 3)] == [3, 0, 1]


@settings(max_examples=30, deadline=None)
@given(times=selections(), size=st.integers(1, 20))
def test_the_shard_plan_gives_all_selected_in_file_order_and_never_mixes_shards(times, size):
    plan = SequentialBatches(counts=[len(part) for part in times], batch_size=size, times=times)
    batches = [plan[number] for number in range(len(plan))]
    assert all(len({sample_index.shard for sample_index in batch}) == 1 for batch in batches)
    asked = [(shard, number) for shard, part in enumerate(times) for number in np.flatnonzero(part).tolist()]
    assert [sample_index[1:3] for batch in batches for sample_index in batch] == asked


def test_without_a_selection_the_shard_plan_gives_all():
    plan = SequentialBatches(counts=[5, 1, 4], batch_size=2)
    assert [len(plan[number]) for number in range(len(plan))] == [2, 2, 1, 1, 2, 2]
    assert plan.upcoming_shards(3) == [1, 2]


def test_a_mixture_costs_no_memory_however_large_its_shares_are():
    big = SampleOrder(counts=(10**9,) * 7, window=64)
    mixture = Mixture(orders=(big, big), shares=(3 * 10**11 + 1, 7 * 10**11), num_samples=10**12)
    assert {visit.epoch for visit in mixture.locate([10**15])} == {mixture.source_positions(10**15)[0] // (7 * 10**9)}


def test_an_order_is_sent_to_another_process_without_the_permutations_that_it_holds():
    order = SampleOrder(counts=(50_000,), seed=3)
    visits = order.locate(range(20))
    sent = pickle.dumps(order)
    assert len(sent) < 2_000
    assert pickle.loads(sent).locate(range(20)) == visits
