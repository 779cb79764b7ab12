from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import UsageError
from vlm.index.autotune.autotuner import explain_choice, select_trial, unmet_targets
from vlm.index.autotune.query_sampling import exact_scores, lower_bound, per_query_recall
from vlm.index.autotune.search_params import (
    SearchParams,
    candidate_params,
    extrapolate_power_law,
    min_effort,
    minimize_params,
)
from vlm.index.autotune.trial import CandidateConfig, Latency, Trial, TuningTarget, parse_bytes


def trial(kind: str = "ivf", *, p50: float = 1.0, memory: int = 100, recall: float = 0.99) -> Trial:
    """A trial as it might have been."""
    latency = Latency(p50_ms=p50, p95_ms=2 * p50, p99_ms=3 * p50, per_second=1000 / p50)
    return Trial(
        kind=kind,
        wishes={},
        parameters={},
        recall={"text→image": {1: recall, 10: recall, 100: recall}},
        bound=recall - 0.01,
        measured=latency,
        latency=latency,
        resident_bytes=memory,
        mapped_bytes=0,
        build_seconds=1.0,
    )


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("12", 12), ("7kb", 7000), ("2 Tb", 2 * 10**12)]
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4 PB", "four", "4GB or so"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; write it like 4GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"recall": 0.0}, "recall = 0.0"),
        ({"recall": 1.01}, "recall = 1.01"),
        ({"at": 0}, "at = 0"),
        ({"latency_ms": 0.0}, "latency-ms = 0.0"),
        ({"memory_bytes": -1}, "memory = -1"),
    ],
)
def test_targets_out_of_range_are_refused(wish: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TuningTarget(**wish)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("top", [1, 7, 500])
def test_exact_scores_over_blocks_are_those_of_a_full_sort(top: int) -> None:
    generator = np.random.default_rng(0)
    rows, queries = (generator.standard_normal((n, 8)).astype(np.float32) for n in (300, 17))
    found = exact_scores((rows[first : first + 90] for first in range(0, 300, 90)), queries, top)
    np.testing.assert_allclose(found, -np.sort(-(queries @ rows.T), axis=1)[:, :top], atol=1e-5)


def test_recall_counts_rows_as_near_as_the_last_of_the_truth() -> None:
    truth = np.array([[0.9, 0.8, 0.8, 0.1]], np.float32)
    found = np.array([[0.9, 0.8, 0.1, -np.inf]], np.float32)
    assert per_query_recall(found, truth, 2).tolist() == [1.0]
    assert per_query_recall(found, truth, 3).tolist() == [pytest.approx(2 / 3)]
    assert per_query_recall(found, truth, 10).tolist() == [0.75]


def test_the_bound_is_the_quantile_of_all_resamples() -> None:
    # of the resamples of two found and one missed, 1/27 are misses alone and 6/27 have two of them
    assert lower_bound(np.array([0.0, 1.0, 1.0])) == pytest.approx(1 / 3)
    assert lower_bound(np.full(50, 0.7)) == pytest.approx(0.7)


def test_the_bound_covers_the_true_mean_nineteen_times_of_twenty() -> None:
    generator = np.random.default_rng(0)
    bounds = [lower_bound(generator.binomial(10, 0.9, 200) / 10, seed=number) for number in range(200)]
    assert 0.9 <= np.mean(np.array(bounds) <= 0.9) <= 0.99


@given(st.integers(1, 3000), st.data())
@settings(max_examples=60, deadline=None)
def test_least_effort_is_the_least_and_tries_few(max_effort: int, data: st.DataObject) -> None:
    needed, tried = data.draw(st.integers(1, max_effort)), []

    def reaches_target(effort: int) -> bool:
        tried.append(effort)
        return effort >= needed

    assert min_effort(reaches_target, max_effort) == needed
    assert len(tried) <= 2 * max_effort.bit_length() + 1
    assert max(tried) <= min(2 * needed, max_effort)


def test_no_effort_is_named_when_none_reaches() -> None:
    assert min_effort(lambda effort: False, 100) is None
    assert list(candidate_params(lambda search_params: False, max_effort=100, is_reranked=True)) == []


def test_reranking_is_tried_at_the_least_factor_that_suffices_and_at_twice_it() -> None:
    found = candidate_params(
        lambda search_params: search_params.rerank >= 4 and (search_params.effort or 0) * search_params.rerank >= 200,
        max_effort=64,
        is_reranked=True,
    )
    assert list(found) == [SearchParams(effort=50, rerank=4), SearchParams(effort=25, rerank=8)]


@pytest.mark.parametrize(
    ("small", "large", "rows", "expected"),
    [
        ((100, 8), (400, 16), 1600, 32),
        ((100, 8), (400, 8), 10**6, 8),
        ((100, 8), (400, 4), 1600, 4),
        ((100, 1), (400, 64), 1600, 256),
        ((400, 7), (400, 8), 1600, 8),
    ],
)
def test_effort_is_carried_on_by_the_power_it_shows(
    small: tuple[int, int], large: tuple[int, int], rows: int, expected: int
) -> None:
    assert extrapolate_power_law(small, large, rows) == expected


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_minimized_effort_is_within_a_fiftieth_of_the_least(start: int, least: int) -> None:
    found = minimize_params(
        SearchParams(effort=start, rerank=0),
        lambda search_params: (search_params.effort or 0) >= least,
        max_effort=2000,
    )
    assert found is not None
    assert least <= (found.effort or 0) <= least + max(1, least // 49)


def test_what_has_no_effort_is_settled_by_re_ranking() -> None:
    assert minimize_params(
        SearchParams(effort=None, rerank=2), lambda one: one.rerank >= 8, max_effort=None
    ) == SearchParams(effort=None, rerank=8)
    assert minimize_params(SearchParams(effort=5, rerank=0), lambda _: False, max_effort=9) is None


def test_more_re_ranking_needs_no_more_effort_than_before() -> None:
    """With 1 nothing is enough; the way there must not leave the effort at its most."""
    found = minimize_params(
        SearchParams(effort=14, rerank=1), lambda one: one.rerank >= 2 and (one.effort or 0) >= 20, max_effort=435
    )
    assert found == SearchParams(effort=20, rerank=2)


def test_a_candidate_configuration_gets_its_share_of_lists_and_never_probes_more() -> None:
    candidate = CandidateConfig(kind="ivf", nlist_per_sqrt_rows=2)
    assert candidate.tuning_params(10_000, seed=0).nlist == 200
    assert candidate.tuning_params(400, seed=0).nlist == 10
    assert (
        candidate.tuning_params(
            10_000, seed=0, effort="nprobe", search_params=SearchParams(effort=999, rerank=0)
        ).nprobe
        == 200
    )


def test_the_fastest_is_taken_and_among_as_fast_the_smallest() -> None:
    slow, quick, small = trial(p50=2), trial("hnsw", p50=1, memory=300), trial("ivfpq", p50=1.05, memory=50)
    assert select_trial([slow, quick, small], TuningTarget(), left_out={}) is small
    assert select_trial([slow, quick], TuningTarget(), left_out={}) is quick
    assert "needs the least memory of those as fast as hnsw" in explain_choice(
        small, [slow, quick, small], TuningTarget()
    )
    speed, memory = TuningTarget(prefer="speed"), TuningTarget(prefer="memory")
    assert select_trial([slow, quick, small], speed, left_out={}) is quick
    slow_but_small = trial("rabitq", p50=9, memory=20)
    assert select_trial([slow, quick, small, slow_but_small], memory, left_out={}) is slow_but_small
    assert "rabitq is the smallest of 3 that meet recall" in explain_choice(
        slow_but_small, [quick, small, slow_but_small], memory
    )
    assert "is the smallest and the fastest of 2 that meet" in explain_choice(small, [slow, small], memory)
    assert "is the fastest of 2" in explain_choice(quick, [slow, quick], TuningTarget())
    assert "the only one of 1 tried" in explain_choice(slow, [slow], TuningTarget())


def test_what_a_trial_misses_is_named() -> None:
    target = TuningTarget(recall=0.995, latency_ms=1.5, memory_bytes=99)
    assert unmet_targets(trial(), target) == ("recall 0.995", "1.5 ms", "99 B")
    assert unmet_targets(trial(), TuningTarget(recall=0.99, latency_ms=2, memory_bytes=100)) == ()


def test_a_target_that_no_trial_meets_names_the_closest() -> None:
    target = TuningTarget(recall=0.95, latency_ms=1)
    trials = [trial(p50=5), trial("hnsw", p50=0.6)]
    trials = [replace(one, misses=unmet_targets(one, target)) for one in trials]
    with pytest.raises(UsageError, match=r"closest is hnsw, with recall@10 99.0%, 1.2 ms .* Not tried: flat: needs 2"):
        select_trial(trials, target, left_out={"flat": "needs 2 GB"})
    with pytest.raises(UsageError, match=r"No index type can be tried .* flat: needs 2 GB"):
        select_trial([], target, left_out={"flat": "needs 2 GB"})
