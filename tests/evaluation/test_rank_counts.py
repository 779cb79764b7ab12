"""Counts and metrics of retrieval against slow, obvious versions, in which every ordering of ties is written out."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.errors import VlmError
from vlm.evaluation import rank_counts
from vlm.evaluation.rank_counts import PositivePairs, count_ranks
from vlm.evaluation.retrieval_metrics import Ranks, average_precision, chance_counts, normalised_gain


def pairs_of(positives):
    """Pairs of lists of right columns."""
    rows = [row for row, columns in enumerate(positives) for _ in columns]
    return PositivePairs(rows=np.array(rows, np.int64), columns=np.array([c for cs in positives for c in cs], np.int64))


def orderings(scores):
    """All orders of the candidates that fall with the scores."""
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            yield order


def first_rank(order, positives):
    return next(rank for rank, candidate in enumerate(order, 1) if candidate in positives)


def precision(order, positives):
    ranks = [rank for rank, candidate in enumerate(order, 1) if candidate in positives]
    return np.mean([number / rank for number, rank in enumerate(ranks, 1)])


def gain(order, positives, k):
    ideal = sum(1 / np.log2(rank + 1) for rank in range(1, min(k, len(positives)) + 1))
    return sum(1 / np.log2(rank + 1) for rank, c in enumerate(order[:k], 1) if c in positives) / ideal


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    positives=st.sets(st.integers(0, 5), min_size=1, max_size=4),
    k=st.integers(1, 7),
)
def test_metrics_are_the_mean_over_all_orderings_of_ties(scores, positives, k):
    positives = {number % len(scores) for number in positives}
    counts, _ = count_ranks(
        np.ones((1, 1), np.float32),
        np.array(scores, np.float32)[:, None],
        pairs_of([sorted(positives)]),
        every_positive=True,
    )
    ranks = Ranks.from_counts(counts)
    orders = list(orderings(scores))
    assert ranks.hits(k)[0] == pytest.approx(np.mean([first_rank(order, positives) <= k for order in orders]))
    assert ranks.expected()[0] == pytest.approx(np.mean([first_rank(order, positives) for order in orders]))
    assert ranks.reciprocal()[0] == pytest.approx(np.mean([1 / first_rank(order, positives) for order in orders]))
    assert average_precision(counts)[0] == pytest.approx(np.mean([precision(order, positives) for order in orders]))
    assert normalised_gain(counts, k)[0] == pytest.approx(np.mean([gain(order, positives, k) for order in orders]))


def slow_counts(rows, columns, positives):
    """For each positive of a row the negatives above and equal, from scores that are written out one by one."""
    counted = {}
    for row, right in enumerate(positives):
        scores = [np.add.reduce(rows[row].astype(float) * column.astype(float)) for column in columns]
        for score in {scores[column] for column in right}:
            wrong = [scores[column] for column in range(len(columns)) if column not in right]
            here = sum(scores[column] == score for column in right)
            counted[row, score] = (here, sum(s > score for s in wrong), sum(s == score for s in wrong))
    return counted


def as_dictionary(counts):
    values = zip(counts.query, counts.score, counts.positives, counts.above, counts.tied, strict=True)
    return {(q, s): (p, a, t) for q, s, p, a, t in values}


def vectors(rng, number, size, kind):
    """Vectors with ties of several kinds: none, repeated ones, and such that differ by one rounding error."""
    drawn = rng.standard_normal((number, size)).astype(np.float32)
    if kind == "repeated":
        drawn = drawn[rng.integers(0, max(1, number // 3), number)]
    elif kind == "nearly equal":
        drawn = np.repeat(drawn[:1], number, axis=0)
        drawn = np.nextafter(drawn, np.float32(9) * rng.integers(-1, 2, drawn.shape).astype(np.float32))
    return drawn


@pytest.mark.parametrize("kind", ["other", "repeated", "nearly equal"])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("block", [(1, 1), (3, 20), (7, 4), (20, 5), (13, 17)])
@pytest.mark.parametrize("compiled", [False, True])
def test_both_directions_count_as_the_slow_version_in_blocks_of_any_size(kind, every, block, compiled):
    rng = np.random.default_rng(sum(block))
    rows, columns = vectors(rng, 13, 5, kind), vectors(rng, 17, 5, kind)
    is_right = rng.random((13, 17)) < 0.15
    pairs = PositivePairs(rows=np.nonzero(is_right)[0], columns=np.nonzero(is_right)[1])
    by_row, by_column = count_ranks(rows, columns, pairs, every_positive=every, block=block, compiled=compiled)
    for counts, queries, candidates, right in (
        (by_row, rows, columns, is_right),
        (by_column, columns, rows, is_right.T),
    ):
        expected = slow_counts(queries, candidates, [set(np.flatnonzero(line).tolist()) for line in right])
        if not every:
            best = {query: max(s for q, s in expected if q == query) for query, _ in expected}
            expected = {(q, s): value for (q, s), value in expected.items() if s == best[q]}
        assert as_dictionary(counts) == expected
        wrong = np.where(right, -np.inf, queries.astype(float) @ candidates.T.astype(float))
        best_wrong = np.take_along_axis(wrong, counts.best_wrong[:, None], 1)[:, 0]
        assert best_wrong == pytest.approx(wrong.max(axis=1), abs=1e-5)
        assert counts.wrong_score == pytest.approx(best_wrong, abs=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_scores_do_not_depend_on_where_a_vector_stands(compiled):
    """A product of matrices rounds an element by its place; equal vectors are equal candidates all the same."""
    rng = np.random.default_rng(3)
    query = rng.standard_normal((1, 515)).astype(np.float32)
    columns = np.repeat(rng.standard_normal((1, 515)).astype(np.float32), 3001, axis=0)
    for position in (0, 1, 1999, 2039, 2040, 3000):
        counts, _ = count_ranks(query, columns, pairs_of([[position]]), compiled=compiled)
        assert (counts.above[0], counts.tied[0]) == (0, 3000)


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-4, 1.0])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_large_blocks_count_as_a_sort_does_however_close_the_scores_are(monkeypatch, spread, every, compiled):
    """Whole blocks, a collapsed model among them, whose pairs are all nearer than float32 can tell."""
    monkeypatch.setattr(rank_counts, "_ROWS_AT_ONCE", 500)
    rng = np.random.default_rng(1)
    rows = (np.ones((520, 8)) + spread * rng.standard_normal((520, 8))).astype(np.float32)
    columns = (np.ones((4100, 8)) + spread * rng.standard_normal((4100, 8))).astype(np.float32)
    positives = [[row * 7, row * 7 + 1] if row % 2 else [row * 7] for row in range(520)]
    by_row, by_column = count_ranks(rows, columns, pairs_of(positives), every_positive=every, compiled=compiled)
    scores = np.array([np.add.reduce(rows.astype(float)[row] * columns.astype(float), axis=1) for row in range(520)])
    is_right = np.zeros(scores.shape, bool)
    is_right[pairs_of(positives).rows, pairs_of(positives).columns] = True
    for counts, table, right in ((by_row, scores, is_right), (by_column, scores.T, is_right.T)):
        wrong = np.where(right, -np.inf, table)[counts.query]
        assert np.array_equal(counts.above, (wrong > counts.score[:, None]).sum(axis=1))
        assert np.array_equal(counts.tied, (wrong == counts.score[:, None]).sum(axis=1))


def test_a_perfect_model_scores_exactly_one_with_several_positives_each():
    rng = np.random.default_rng(0)
    rows = np.eye(40, dtype=np.float32)
    columns = np.repeat(rows, 5, axis=0) * rng.uniform(0.5, 1, (200, 1)).astype(np.float32)
    counts, other = count_ranks(
        rows, columns, pairs_of([list(range(5 * n, 5 * n + 5)) for n in range(40)]), every_positive=True
    )
    for direction in (counts, other):
        ranks = Ranks.from_counts(direction)
        assert ranks.recall(1) == ranks.median() == ranks.reciprocal().mean() == 1.0
        assert average_precision(direction).mean() == 1.0
        assert all(normalised_gain(direction, k).mean() == 1.0 for k in (1, 3, 5, 10, 1000))


def test_a_model_that_says_the_same_of_everything_scores_exactly_chance():
    ones = np.ones((60, 3), np.float32)
    positives = [sorted({n, (n * 7) % 60}) for n in range(60)]
    counts, _ = count_ranks(ones, ones, pairs_of(positives), every_positive=True)
    chance = chance_counts(counts.num_positives, 60)
    same, by_chance = Ranks.from_counts(counts), Ranks.from_counts(chance)
    for k in (1, 5, 10):
        assert same.recall(k) == by_chance.recall(k)
        assert np.array_equal(normalised_gain(counts, k), normalised_gain(chance, k))
    assert same.median() == by_chance.median()
    assert np.array_equal(same.reciprocal(), by_chance.reciprocal())
    assert np.array_equal(average_precision(counts), average_precision(chance))
    # written out: the first of one or two positives among 60
    expected = [5 / 60 if len(right) == 1 else 1 - (55 / 60) * (54 / 59) for right in positives]
    assert same.recall(5) == pytest.approx(np.mean(expected))


def test_queries_without_a_positive_have_no_ranks_and_nothing_has_none():
    rows = np.eye(3, dtype=np.float32)
    counts, other = count_ranks(rows, rows, pairs_of([[], [1], []]))
    assert counts.query.tolist() == other.query.tolist() == [1]
    assert counts.num_positives.tolist() == [0, 1, 0]
    nothing, _ = count_ranks(rows[:0], rows, pairs_of([]))
    assert not len(nothing.query)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_embeddings_that_are_not_finite_have_no_ranks(value):
    rows = np.eye(2, dtype=np.float32)
    broken = rows.copy()
    broken[1, 0] = value
    with pytest.raises(VlmError, match="diverged"):
        count_ranks(broken, broken, pairs_of([[0], [1]]))


def random_retrieval():
    """Counts without ties, the scores and the right answers."""
    rng = np.random.default_rng(5)
    rows, columns = rng.standard_normal((30, 6)).astype(np.float32), rng.standard_normal((50, 6)).astype(np.float32)
    is_right = rng.random((30, 50)) < 0.08
    is_right[:, 0] = True
    pairs = PositivePairs(rows=np.nonzero(is_right)[0], columns=np.nonzero(is_right)[1])
    return count_ranks(rows, columns, pairs, every_positive=True)[0], rows @ columns.T, is_right


def test_average_precision_and_gain_are_those_of_scikit_learn_without_ties():
    from sklearn.metrics import average_precision_score, ndcg_score

    counts, scores, is_right = random_retrieval()
    precisions = [average_precision_score(*row) for row in zip(is_right, scores, strict=True)]
    assert average_precision(counts) == pytest.approx(np.array(precisions))
    assert normalised_gain(counts, 10).mean() == pytest.approx(ndcg_score(is_right, scores, k=10))


@pytest.mark.slow  # importing torchmetrics takes ten seconds
def test_metrics_are_those_of_torchmetrics_without_ties():
    import torch
    from torchmetrics.functional import retrieval

    counts, scores, is_right = random_retrieval()
    ranks = Ranks.from_counts(counts)
    for row in range(30):
        # above 0: torchmetrics 1.9 takes a positive that scores less for a negative
        predicted, truth = torch.from_numpy(scores[row] - scores.min() + 1), torch.from_numpy(is_right[row])
        assert ranks.hits(5)[row] == retrieval.retrieval_hit_rate(predicted, truth, top_k=5)
        assert ranks.reciprocal()[row] == pytest.approx(float(retrieval.retrieval_reciprocal_rank(predicted, truth)))
        precision = retrieval.retrieval_average_precision(predicted, truth)
        assert average_precision(counts)[row] == pytest.approx(float(precision))
        gain = retrieval.retrieval_normalized_dcg(predicted, truth, top_k=10)
        assert normalised_gain(counts, 10)[row] == pytest.approx(float(gain))
