import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.index.embeddings_folder import normalize_rows
from vlm.service.ranking import ScoredRanking, diversify, duplicate_leaders, fuse_ranks


def circle(*degrees: float) -> np.ndarray:
    angles = np.radians(np.array(degrees, np.float64))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def in_order(*rows: int) -> ScoredRanking:
    return ScoredRanking(rows=np.array(rows, np.int64), scores=-np.arange(len(rows), dtype=np.float64))


@given(rankings=st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), max_size=4))
def test_fusion_adds_the_reciprocal_ranks(rankings: list[list[int]]) -> None:
    rows, scores = fuse_ranks([in_order(*ranking) for ranking in rankings])
    expected: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, 1):
            expected[row] = expected.get(row, 0.0) + 1 / (60 + rank)
    assert rows.tolist() == sorted(expected)
    assert scores.tolist() == pytest.approx([expected[row] for row in sorted(expected)])


def test_what_two_rankings_agree_on_comes_before_what_one_puts_first() -> None:
    rows, scores = fuse_ranks([in_order(1, 2, 3), in_order(4, 2, 5)])
    assert rows[scores.argmax()] == 2


def test_rows_of_equal_scores_share_the_rank_of_the_first_of_them() -> None:
    ranking = ScoredRanking(rows=np.array([5, 3, 9, 1, 4]), scores=np.array([0.9, 0.7, 0.7, 0.7, 0.1]))
    assert ranking.ranks().tolist() == [1, 2, 2, 2, 5]
    assert in_order().ranks().tolist() == []
    rows, scores = fuse_ranks([ranking])
    assert rows.tolist() == [1, 3, 4, 5, 9]
    assert scores.tolist() == pytest.approx([1 / 62, 1 / 62, 1 / 65, 1 / 61, 1 / 62])


@pytest.mark.parametrize(
    ("degrees", "leaders"),
    [
        ((0, 5, 90, 91, 3), [0, 0, 2, 2, 0]),
        # 8 is like 4, but 4 stands behind 0, which 8 is not like
        ((0, 4, 8), [0, 0, 2]),
        ((0, 0, 0), [0, 0, 0]),
        ((0, 40, 80), [0, 1, 2]),
        ((), []),
    ],
)
def test_near_duplicates_stand_behind_the_first_of_them(degrees: tuple[float, ...], leaders: list[int]) -> None:
    vectors = circle(*degrees).reshape(-1, 2)
    assert duplicate_leaders(vectors, float(np.cos(np.radians(5.5))), max_leaders=9).tolist() == leaders


def test_no_more_leaders_are_looked_for_than_wanted() -> None:
    assert duplicate_leaders(circle(0, 40, 1, 80), 0.99, max_leaders=2).tolist() == [0, 1, 0, -1]


def test_a_vector_stands_for_itself_at_the_highest_threshold() -> None:
    vectors = normalize_rows(np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32))
    assert duplicate_leaders(vectors, 1.0, max_leaders=50).tolist() == list(range(50))


def marginal(relevance: np.ndarray, vectors: np.ndarray, diversity: float, top: int) -> list[int]:
    """As the paper has it, one candidate at a time, with relevance brought to 0 to 1."""
    scaled = (relevance - relevance.min()) / np.ptp(relevance) if np.ptp(relevance) else relevance * 0
    chosen: list[int] = []
    while len(chosen) < min(top, len(vectors)):
        gains = {
            number: (1 - diversity) * scaled[number]
            - diversity * max((float(vectors[number] @ vectors[other]) for other in chosen), default=0.0)
            for number in range(len(vectors))
            if number not in chosen
        }
        chosen.append(max(gains, key=lambda number: gains[number]))
    return chosen


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9])
def test_diverse_order_is_that_of_maximal_marginal_relevance(diversity: float) -> None:
    generator = np.random.default_rng(3)
    vectors = normalize_rows(generator.standard_normal((40, 6)).astype(np.float32))
    relevance = np.sort(generator.random(40).astype(np.float32))[::-1].copy()
    assert diversify(relevance, vectors, diversity, 15).tolist() == marginal(relevance, vectors, diversity, 15)


def test_diversity_goes_from_the_order_of_relevance_to_the_most_unlike() -> None:
    vectors, relevance = circle(0, 1, 2, 90, 120), np.array([0.9, 0.89, 0.88, 0.5, 0.1], np.float32)
    assert diversify(relevance, vectors, 0.0, 5).tolist() == [0, 1, 2, 3, 4]
    assert diversify(relevance, vectors, 1.0, 2).tolist() == [0, 4]
    assert diversify(relevance, vectors, 0.4, 3).tolist() == [0, 3, 1]


def test_a_longer_diverse_order_begins_like_a_shorter_one() -> None:
    generator = np.random.default_rng(4)
    vectors, relevance = normalize_rows(generator.standard_normal((30, 4)).astype(np.float32)), generator.random(30)
    relevance = relevance.astype(np.float32)
    assert diversify(relevance, vectors, 0.5, 30)[:7].tolist() == diversify(relevance, vectors, 0.5, 7).tolist()
    assert diversify(np.zeros(0, np.float32), np.zeros((0, 4), np.float32), 0.5, 3).tolist() == []
    assert sorted(diversify(np.ones(4, np.float32), vectors[:4], 0.5, 9).tolist()) == [0, 1, 2, 3]
