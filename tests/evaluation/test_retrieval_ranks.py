import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import VlmError
from vlm.evaluation.retrieval_metrics import rank_candidates


def slow_hits(scores, positives, k):
    """Share of all orders of tied answers that put a right answer among the first k."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([bool(set(order[:k]) & set(positives)) for order in orders])


@settings(max_examples=80, deadline=None)
@given(
    scores=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    positives=st.sets(st.integers(0, 5), min_size=1, max_size=3),
    k=st.integers(1, 6),
)
def test_hits_are_the_average_over_all_orders_of_ties(scores, positives, k):
    positives = sorted({number % len(scores) for number in positives})
    ranks = rank_candidates(np.ones((1, 1), np.float32), np.array(scores, np.float32)[:, None], [positives])
    assert ranks.hits(k)[0] == pytest.approx(slow_hits(scores, positives, k))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), chunk=st.integers(1, 9))
def test_chunks_change_nothing(seed, chunk):
    rng = np.random.default_rng(seed)
    queries, candidates = rng.standard_normal((9, 4)).astype(np.float32), rng.standard_normal((7, 4)).astype(np.float32)
    positives = [sorted(rng.choice(7, size=rng.integers(1, 3), replace=False).tolist()) for _ in range(9)]
    whole = rank_candidates(queries, candidates, positives)
    parts = rank_candidates(queries, candidates, positives, queries_at_once=chunk)
    assert np.allclose(whole.expected(), parts.expected())


def test_without_ties_the_rank_is_the_place_of_the_best_right_answer():
    candidates = np.eye(4, dtype=np.float32)
    query = np.array([[0.4, 0.9, 0.1, 0.7]], np.float32)
    ranks = rank_candidates(query, candidates, [[0, 2]])
    assert ranks.expected().tolist() == [3.0]
    assert (ranks.recall(2), ranks.recall(3)) == (0.0, 1.0)


def test_a_model_that_says_the_same_of_everything_gets_chance_level():
    same = np.ones((10, 3), np.float32)
    ranks = rank_candidates(same, same, [[number] for number in range(10)])
    assert ranks.recall(1) == pytest.approx(0.1)
    assert ranks.recall(5) == pytest.approx(0.5)
    assert ranks.median() == pytest.approx(5.5)


def test_embeddings_that_are_not_finite_have_no_ranks():
    queries = np.array([[1.0, 0.0], [np.nan, 1.0]], np.float32)
    with pytest.raises(VlmError, match="diverged"):
        rank_candidates(queries, np.eye(2, dtype=np.float32), [[0], [1]])
