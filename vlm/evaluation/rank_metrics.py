"""Retrieval metrics with ties in expectation: the mean over all orderings of candidates that score the same.

Formulas for tied groups: McSherry and Najork 2008, "Computing information retrieval performance measures efficiently in
the presence of tied scores". A positive is a candidate that is right for a query; relevance is binary.
"""

from dataclasses import dataclass

import numpy as np

from vlm.evaluation.rank_counts import CANDIDATES_AT_ONCE, QUERIES_AT_ONCE, PositivePairs, RankCounts, count_ranks
from vlm.tensor_types import Array, Float, Float32, Int


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """For each query the rank of its best positive, with ties resolved in expectation over all orderings.

    above: negatives that score strictly higher than the best positive.
    tied_negatives, tied_positives: negatives and positives with exactly its score (tied_positives >= 1).
    """

    above: Int[Array, " Q"]
    tied_negatives: Int[Array, " Q"]
    tied_positives: Int[Array, " Q"]

    @classmethod
    def from_counts(cls, counts: RankCounts) -> "Ranks":
        """Those of the queries that have a positive, in their order."""
        best = counts.best_groups
        return cls(above=counts.above[best], tied_negatives=counts.tied[best], tied_positives=counts.positives[best])

    @classmethod
    def by_chance(cls, num_positives: Int[Array, " Q"], num_candidates: int) -> "Ranks":
        """Those of a model that scores all candidates the same, which is what orders them at random."""
        return cls(
            above=np.zeros_like(num_positives),
            tied_negatives=num_candidates - num_positives,
            tied_positives=num_positives,
        )

    def recall(self, k: int) -> float:
        """Fraction of queries with a positive in the top k, in expectation over all orderings of ties."""
        return float(self.hits(k).mean())

    def hits(self, k: int) -> Float[Array, " Q"]:
        """Probability per query of a positive in the top k.

        With j = k - above positions left for the tie, all j go to negatives with probability
        C(tied_negatives, j) / C(tied_negatives + tied_positives, j).
        """
        positions_left = np.maximum(k - self.above, 0)
        miss = np.ones(len(positions_left))
        # the quotient of binomials, one factor for each position
        for position in range(int(positions_left.max(initial=0))):
            negatives = np.maximum(self.tied_negatives - position, 0)
            tied = np.maximum(self.tied_negatives + self.tied_positives - position, 1)
            is_open = position < positions_left
            miss = np.where(is_open, miss * negatives / tied, miss)
            if not miss[is_open].any():
                break
        return 1.0 - miss

    def expected(self) -> Float[Array, " Q"]:
        """Expected rank of the first positive, from 1."""
        return self.above + 1 + self.tied_negatives / (self.tied_positives + 1)

    def median(self) -> float:
        """Median over the queries of the expected rank."""
        return float(np.median(self.expected()))

    def reciprocal(self) -> Float[Array, " Q"]:
        """Expected reciprocal of the first positive's rank per query; its mean is the MRR.

        Among n negatives and p positives the first j are negatives, and the next is not, with probability
        p / (n + p) · (n / (n + p - 1)) · … · ((n - j + 1) / (n + p - j)).
        """
        triples = np.stack([self.above, self.tied_negatives, self.tied_positives])
        different, query_of = np.unique(triples, axis=1, return_inverse=True)
        values = np.empty(different.shape[1])
        for number, (above, negatives, positives) in enumerate(different.T.tolist()):
            places = np.arange(negatives)
            factors = (negatives - places) / np.maximum(negatives + positives - 1 - places, 1)
            chances = np.append(1.0, np.cumprod(factors)) * (positives / (negatives + positives))
            values[number] = (chances / np.arange(above + 1, above + negatives + 2)).sum()
        return values[query_of]


def average_precision(counts: RankCounts) -> Float[Array, " Q"]:
    """Expected average precision of each query that has a positive, over all candidates; its mean is the mAP.

    counts: of every positive. With R positives and n candidates before a group of r positives and t negatives, the i-th
    place of the group holds a positive with probability r / (r + t), and then R + 1 + (i - 1)(r - 1) / (r + t - 1)
    positives are expected up to it.
    """
    groups = _TiedGroups.from_counts(counts)
    others = np.maximum(groups.size - 1, 1)
    slope = (groups.positives - 1) / others
    harmonic = np.append(0.0, np.cumsum(1.0 / np.arange(1, counts.num_candidates + 1)))
    # the sum of (a + (i-1)·slope) / (n + i) over i, with the part that does not depend on i taken out
    constant = groups.positives_before + 1 - slope * (groups.before + 1)
    steps = harmonic[groups.before + groups.size] - harmonic[groups.before]
    precision = np.where(
        groups.size == 1,
        (groups.positives_before + 1) / (groups.before + 1),
        groups.positives / groups.size * (groups.size * slope + constant * steps),
    )
    return groups.sum_by_query(precision) / groups.positives_by_query()


def normalised_gain(counts: RankCounts, k: int) -> Float[Array, " Q"]:
    """Expected nDCG@k of each query that has a positive: gain 1 for a positive, discount log2(rank + 1).

    counts: of every positive. Source: Järvelin and Kekäläinen 2002, with the discount of Burges et al. 2005.
    """
    groups = _TiedGroups.from_counts(counts)
    discounts = np.append(0.0, np.cumsum(1.0 / np.log2(np.arange(2, k + 2))))
    places = discounts[np.minimum(groups.before + groups.size, k)] - discounts[np.minimum(groups.before, k)]
    gain = groups.sum_by_query(groups.positives / groups.size * places)
    return gain / discounts[np.minimum(groups.positives_by_query(), k)]


@dataclass(frozen=True)
class _TiedGroups:
    """Candidates with the same score, as groups with at least a positive. before: candidates that score higher."""

    positives: Int[Array, " G"]
    size: Int[Array, " G"]
    before: Int[Array, " G"]
    positives_before: Int[Array, " G"]
    first_of_query: Int[Array, " Q"]

    @classmethod
    def from_counts(cls, counts: RankCounts) -> "_TiedGroups":
        first = counts.best_groups
        cumulated = np.cumsum(counts.positives)
        so_far = cumulated - counts.positives
        groups_each = np.diff(first, append=len(counts.query))
        positives_before = so_far - np.repeat(so_far[first], groups_each)
        return cls(
            positives=counts.positives,
            size=counts.positives + counts.tied,
            before=counts.above + positives_before,
            positives_before=positives_before,
            first_of_query=first,
        )

    def sum_by_query(self, values: Float[Array, " G"]) -> Float[Array, " Q"]:
        # from first to last, so that the differences of a cumulated sum add up to it exactly
        query = np.zeros(len(values), np.int64)
        query[self.first_of_query] = 1
        return np.bincount(np.cumsum(query) - 1, values, minlength=len(self.first_of_query))

    def positives_by_query(self) -> Int[Array, " Q"]:
        if not len(self.first_of_query):
            return self.positives
        return np.add.reduceat(self.positives, self.first_of_query)


def chance_counts(num_positives: Int[Array, " Q"], num_candidates: int) -> RankCounts:
    """The counts of a model that scores all candidates the same."""
    query = np.flatnonzero(num_positives)
    return RankCounts(
        query=query,
        score=np.zeros(len(query)),
        positives=num_positives[query],
        above=np.zeros_like(query),
        tied=num_candidates - num_positives[query],
        num_positives=num_positives,
        num_candidates=num_candidates,
        best_wrong=np.full(len(num_positives), -1),
        wrong_score=np.zeros(len(num_positives), np.float32),
    )


def rank_candidates(
    queries: Float32[Array, "Q D"],
    candidates: Float32[Array, "N D"],
    positives: list[list[int]],
    *,
    queries_at_once: int = QUERIES_AT_ONCE,
) -> Ranks:
    """Rank the best positive of each query among all candidates by inner product, as `count_ranks` does.

    positives: for each query the positions of its positives, at least one. queries_at_once: a block of scores holds;
    it changes no rank.

    Raises:
        VlmError: an embedding is not finite: the model has diverged, and ranks would mean nothing.
    """
    rows = np.repeat(np.arange(len(queries)), list(map(len, positives)))
    columns = np.fromiter((number for of_query in positives for number in of_query), np.int64)
    pairs = PositivePairs(rows=rows, columns=columns)
    counts, _ = count_ranks(queries, candidates, pairs, both=False, block=(queries_at_once, CANDIDATES_AT_ONCE))
    return Ranks.from_counts(counts)
