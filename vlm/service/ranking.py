"""The order of the results of one query: nearest rows, rank fusion, deduplication, diversity, reranking, pages.

`Ranker.page` is the way through. Each step below may need more rows than one page shows, so each asks the step before
it for as many as it needs, and that one searches the index deeper until it has them:

    nearest rows → fused with full-text search → one of each group of duplicates → reranked or diverse → page
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from vlm.errors import UsageError
from vlm.index.engine_base import EngineSnapshot, RowSelection, row_set
from vlm.index.filter_language import parse_filter
from vlm.index.metadata import sanitize_text
from vlm.service.query import Cursor, Query
from vlm.tensor_types import Array, Float, Float32, Int64

RANK_CONSTANT = 60
"""k of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009, §2)."""

NUM_CANDIDATES = 1000
"""How many of each ranking are fused, and how many are diversified; the others follow in their own order."""

# FAISS sums in single precision, so rows of equal score may come out this far apart
_TIE = 1e-6

# rows are stored in half precision, so that the cosine of a row with its own image may be this far below 1
_ROUNDING = 1e-6

# factor by which a search goes deeper when too few rows are left
_DEEPER = 4


@dataclass(frozen=True, kw_only=True)
class ScoredRanking:
    """Rows, best first, with the score that orders them; rows of equal scores share a rank."""

    rows: Int64[Array, " N"]
    scores: Float[Array, " N"]

    def ranks(self) -> Int64[Array, " N"]:
        """From 1; equals have the rank of the first of them, and as many are left out behind them."""
        # competition ranking: the running maximum carries the rank of the first of a run of equals over the others
        is_new = np.append(np.ones(1, bool), self.scores[1:] != self.scores[:-1])[: len(self.rows)]
        return np.maximum.accumulate(np.where(is_new, np.arange(1, len(self.rows) + 1), 0))


def fuse_ranks(
    rankings: Sequence[ScoredRanking], *, constant: int = RANK_CONSTANT
) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): each row once, ascending, with its score.

    A row's score is the sum over the rankings that have it of 1 / (constant + rank).

    >>> by_cosine = ScoredRanking(rows=np.array([7, 3, 4]), scores=np.array([0.9, 0.8, 0.8]))
    >>> rows, scores = fuse_ranks([by_cosine, ScoredRanking(rows=np.array([3]), scores=np.array([2.5]))])
    >>> rows.tolist(), [round(score, 5) for score in scores.tolist()]
    ([3, 4, 7], [0.03252, 0.01613, 0.01639])
    """
    # each starts with an empty array, so that concatenating no rankings gives no rows
    all_rows = np.concatenate([np.zeros(0, np.int64), *(ranking.rows for ranking in rankings)])
    ranks = np.concatenate([np.zeros(0), *(ranking.ranks() for ranking in rankings)])
    rows, positions = np.unique(all_rows, return_inverse=True)
    # a row that one ranking lacks gets nothing from it
    scores = np.bincount(positions, 1 / (constant + ranks), len(rows))
    return rows, scores.astype(np.float32)


def duplicate_leaders(vectors: Float32[Array, "N D"], threshold: float, *, max_leaders: int) -> Int64[Array, " N"]:
    """For each of the unit vectors, best first, the position of its leader: the one shown of its duplicates.

    A leader is its own; any other vector has the first leader whose cosine with it is at least `threshold`. At most
    `max_leaders` are found; -1 for vectors that none of these leads.
    """
    leaders = np.full(len(vectors), -1, np.int64)
    # greedy: one product of a leader with those left over for each result, never all pairs of vectors
    for _ in range(max_leaders):
        without_leader = np.flatnonzero(leaders < 0)
        if not len(without_leader):
            break
        leader = without_leader[0]
        is_duplicate = vectors[without_leader] @ vectors[leader] >= threshold - _ROUNDING
        # a vector is its own duplicate, whatever rounding says
        is_duplicate[0] = True
        leaders[without_leader[is_duplicate]] = leader
    return leaders


def diversify(
    relevance: Float32[Array, " N"], vectors: Float32[Array, "N D"], diversity: float, top: int
) -> Int64[Array, " K"]:
    """The `top` candidates by maximal marginal relevance (Carbonell and Goldstein 1998), in the order of selection.

    Each next one has the highest (1 - diversity) relevance - diversity * redundancy, where redundancy is its highest
    cosine with those selected before. Unlike in the paper, relevance is first scaled to 0 for the least and 1 for the
    most relevant candidate: cosines of a text with images lie so close together that redundancy would decide alone.

    Args:
        relevance: of each candidate, in any unit.
        vectors: unit vectors of the candidates.
        diversity: 0 keeps the order of relevance, 1 uses redundancy alone.
    """
    scaled = np.zeros(len(relevance), np.float32)
    spread = float(np.ptp(relevance)) if len(relevance) else 0.0
    # equally relevant candidates all stay at 0: nothing but redundancy can decide between them
    if spread:
        scaled = (relevance - relevance.min()) / spread
    redundancy = np.zeros(len(relevance), np.float32)
    is_left = np.ones(len(relevance), bool)
    selected: list[int] = []
    while len(selected) < min(top, len(relevance)):
        gain = np.where(is_left, (1 - diversity) * scaled - diversity * redundancy, -np.inf)
        best = int(gain.argmax())
        cosines = vectors @ vectors[best]
        # the zeros of the first round are no cosine with anything
        redundancy = np.maximum(redundancy, cosines) if selected else cosines
        is_left[best] = False
        selected.append(best)
    return np.array(selected, np.int64)


@runtime_checkable
class Reranker(Protocol):
    """Puts rows into an order of its own, the best first."""

    @property
    def fingerprint(self) -> str:
        """Rerankers with the same fingerprint give the same order."""
        ...

    def order(self, rows: Int64[Array, " N"]) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
        """Positions of the rows, the best first, and the likelihood of each in this order; NaN where it has none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Rows with the cosine of each to the query, best first.

    fused: the score of rank fusion that orders them, NaN for rows ordered by cosine; None where all are.
    similar: how many worse results each stands for. likelihoods: from reranking, NaN where it gave none.
    """

    rows: Int64[Array, " N"]
    cosines: Float32[Array, " N"]
    fused: Float32[Array, " N"] | None = None
    similar: Int64[Array, " N"] | None = None
    likelihoods: Float32[Array, " N"] | None = None

    @classmethod
    def empty(cls) -> "Ranking":
        """A ranking without rows."""
        return cls(rows=np.zeros(0, np.int64), cosines=np.zeros(0, np.float32))

    def __len__(self) -> int:
        return len(self.rows)

    def behind(self, after: Cursor) -> "Ranking":
        """Those that rank after the cursor."""
        # equality is exact, since `Ranker._cosines` gives a row the same float32 in every search
        last = np.float32(after.score)
        is_behind = (self.cosines < last) | ((self.cosines == last) & (self.rows > after.row))
        return self.take(np.flatnonzero(is_behind))

    def extended_by(self, others: "Ranking") -> "Ranking":
        """These, then those of the others that are not among them; neither has been deduplicated."""
        new = others.take(np.flatnonzero(~np.isin(others.rows, self.rows)))
        fused = None
        if self.fused is not None:
            fused = np.append(self.fused, np.full(len(new), np.nan, np.float32))
        return Ranking(rows=np.append(self.rows, new.rows), cosines=np.append(self.cosines, new.cosines), fused=fused)

    def take(self, positions: Int64[Array, " M"]) -> "Ranking":
        """Those at the positions, in that order."""
        return Ranking(
            rows=self.rows[positions],
            cosines=self.cosines[positions],
            fused=None if self.fused is None else self.fused[positions],
            similar=None if self.similar is None else self.similar[positions],
            likelihoods=None if self.likelihoods is None else self.likelihoods[positions],
        )


@dataclass(frozen=True, kw_only=True)
class Ranker:
    """Ranks the rows of one index snapshot for one query.

    query_vector: unit vector of the query. allowed_rows: the rows that may be results; None: all live ones.
    reranker: of the top results. num_candidates: as `NUM_CANDIDATES`.
    min_cosine: of results, as well as the query's `at_least`.
    """

    snapshot: EngineSnapshot
    query_vector: Float32[Array, " D"]
    query: Query
    allowed_rows: RowSelection | None = None
    reranker: Reranker | None = None
    num_candidates: int = NUM_CANDIDATES
    min_cosine: float | None = None

    def page(self) -> tuple[Ranking, str]:
        """The results after the query's cursor, and the cursor of the next page; empty at the end.

        Raises:
            UsageError: the cursor is malformed, of another query, or of another snapshot where the order may have
                changed with it.
        """
        after = self._cursor()
        num_seen = after.seen if after else 0
        first_top = after.first if after else self.query.top
        if after and after.generation != self.snapshot.number:
            # rows may have come and gone: what was seen is skipped by score, not by number
            results = self._nearest_behind(after)
        else:
            results = self._ordered(num_seen, first_top)
        page = results.take(np.arange(min(len(results), self.query.top)))
        # by cosine, then row: the cursor names the last row of the page, and `Ranking.behind` continues behind it
        if self.query.is_plain:
            page = page.take(np.lexsort((page.rows, -page.cosines)))
        # each step gives one more than a page where it can, so a page that takes all is the last
        if len(page) == len(results):
            return page, ""
        cursor = Cursor(
            generation=after.generation if after else self.snapshot.number,
            query_digest=self._query_digest,
            first=first_top,
            seen=num_seen + len(page),
            score=float(page.cosines[-1]),
            row=int(page.rows[-1]),
        )
        return page, cursor.to_token()

    @property
    def _query_digest(self) -> int:
        return self.query.digest(reranker=self.reranker.fingerprint if self.reranker else "")

    def _cursor(self) -> Cursor | None:
        if not self.query.after:
            return None
        after = Cursor.from_token(self.query.after)
        if after.query_digest != self._query_digest:
            raise UsageError("The cursor belongs to another query; start this one from its first page.")
        if after.generation != self.snapshot.number and not self.query.is_plain:
            raise UsageError(
                f"The index has changed from version {after.generation} to {self.snapshot.number} since the last page, "
                "and the order of these results with it; start again from the first page."
            )
        return after

    def _nearest_behind(self, after: Cursor) -> Ranking:
        """The nearest rows that rank after a cursor of another snapshot, one more than a page if there are."""
        depth = after.seen + self.query.top + 2
        while True:
            found, is_all = self._nearest_without_ties(depth)
            behind = found.behind(after)
            # rows inserted since may rank before the cursor, so that more have to be skipped
            if is_all or len(behind) > self.query.top:
                return behind
            depth *= 2

    def _ordered(self, num_seen: int, first_top: int) -> Ranking:
        """The results behind those already seen, fused, deduplicated, reranked or diversified.

        One more than a page if there are, so that the page knows whether it is the last.

        first_top: results on the first page, on which the order depends.
        """
        query = self.query
        depth = num_seen + query.top + 1
        # reranking and diversity reorder a fixed head of the results, which must be whole even for a short page
        needed = max(depth, query.rerank_top, self.num_candidates if query.diversity else 0)
        results = self._deduplicated(needed, first_top)
        if self.reranker and num_seen < query.rerank_top:
            results = _rerank(results, self.reranker, query.rerank_top)
        if query.diversity:
            results = self._diversified(results, depth)
        return results.take(np.arange(num_seen, len(results)))

    def _diversified(self, results: Ranking, depth: int) -> Ranking:
        """The first `depth` of the candidates in a diverse order; past the candidates, the others in their own."""
        candidates = results.take(np.arange(min(len(results), self.num_candidates)))
        relevance = candidates.cosines if candidates.fused is None else candidates.fused
        vectors = self.snapshot.vectors(candidates.rows)
        positions = diversify(relevance, vectors, self.query.diversity, depth)
        if depth > len(candidates):
            positions = np.concatenate([positions, np.arange(len(candidates), len(results))])
        return results.take(positions)

    def _deduplicated(self, depth: int, first_top: int) -> Ranking:
        """At least `depth` results without duplicates of better ones, if there are as many."""
        threshold = self.query.duplicates
        if threshold is None:
            return self._ranked(depth, first_top)[0]
        # leaders depend only on better rows, so those found before stay the same when the search goes deeper
        num_ranked = max(depth, self.num_candidates)
        while True:
            ranked, is_all = self._ranked(num_ranked, first_top)
            leaders = duplicate_leaders(self.snapshot.vectors(ranked.rows), threshold, max_leaders=depth)
            positions, group_sizes = np.unique(leaders[leaders >= 0], return_counts=True)
            if is_all or len(positions) >= depth:
                return replace(ranked.take(positions), similar=group_sizes - 1)
            num_ranked *= _DEEPER

    def _ranked(self, depth: int, first_top: int) -> tuple[Ranking, bool]:
        """At least the first `depth` rows, and whether these are all.

        Those fused with full-text search come first, then the nearest of the others. An approximate index may find,
        searched deeper, rows that it missed before; they are appended, so that the order does not depend on how far it
        is read, and pages show every row once.
        """
        ranked = self._fused() if self.query.words else Ranking.empty()
        is_all = False
        # from the first page's size on any page, so that each page goes through the same depths as those before it;
        # a few more, since rows that tie with the last one are cut off
        search_depth = max(first_top, self.query.rerank_top) + 3
        while len(ranked) < depth and not is_all:
            found, is_all = self._nearest_without_ties(search_depth)
            ranked = ranked.extended_by(found)
            search_depth *= _DEEPER
        return ranked, is_all

    def _nearest_without_ties(self, depth: int) -> tuple[Ranking, bool]:
        """The nearest rows, without those whose equals may have been cut off, and whether these are all rows."""
        found = self._nearest(depth)
        if len(found) < depth:
            return found, True
        return found.take(np.flatnonzero(found.cosines > found.cosines[-1] + _TIE)), False

    def _nearest(self, depth: int) -> Ranking:
        # the index's own scores are dropped: single precision, and summed in an order that depends on how rows were
        # found
        _, row_table = self.snapshot.nearest(self.query_vector[None], depth, self.allowed_rows)
        rows = row_table[0]
        cosines = self._cosines(rows)
        order = np.lexsort((rows, -cosines))
        return self._above_min_cosine(Ranking(rows=rows[order], cosines=cosines[order]))

    def _fused(self) -> Ranking:
        """The top rows by cosine and by full-text search, in the order of reciprocal rank fusion."""
        nearest_rows = self._nearest(self.num_candidates)
        by_cosine = ScoredRanking(rows=nearest_rows.rows, scores=nearest_rows.cosines)
        rows, fused = fuse_ranks([by_cosine, self._rank_words(self.num_candidates)])
        cosines = self._cosines(rows)
        # fused scores are few sums of 1 / rank, so many rows share one: the cosine, then the row decides
        order = np.lexsort((rows, -cosines, -fused))
        return self._above_min_cosine(Ranking(rows=rows[order], cosines=cosines[order], fused=fused[order]))

    def _rank_words(self, depth: int) -> ScoredRanking:
        """The allowed rows whose captions contain the words, best first; of equals at the end the nearest."""
        words = sanitize_text(self.query.words)
        num_requested = depth + 1
        while True:
            # full-text search knows no filter: it is applied to ever more of its results
            ranked = self.snapshot.catalogue.rank_text(words, num_requested)
            rows = np.array([row for row, _ in ranked], np.int64)
            scores = np.array([score for _, score in ranked], np.float64)
            if self.allowed_rows is not None:
                allowed = row_set(self.allowed_rows)
                is_allowed = np.array([row in allowed for row, _ in ranked], bool)
                rows = rows[is_allowed]
                scores = scores[is_allowed]
            # one more than needed, to see whether equals are cut off
            is_enough = len(rows) > depth and scores[-1] != scores[depth - 1]
            if is_enough or len(ranked) < num_requested:
                return self._without_far_equals(ScoredRanking(rows=rows, scores=scores), depth)
            num_requested *= _DEEPER

    def _without_far_equals(self, ranking: ScoredRanking, depth: int) -> ScoredRanking:
        """The first `depth` of the ranking; of those that are equal to the last of them the nearest to the query."""
        rows = ranking.rows
        scores = ranking.scores
        if len(rows) <= depth or scores[depth] != scores[depth - 1]:
            return ScoredRanking(rows=rows[:depth], scores=scores[:depth])
        equals = np.flatnonzero(scores == scores[depth - 1])
        # many captions may be equal, as those of a class; the search by cosine bounds what is read of their rows
        needed = depth - int(equals[0])
        _, row_table = self.snapshot.nearest(self.query_vector[None], needed, np.sort(rows[equals]))
        selected = np.append(rows[: equals[0]], row_table[0])
        return ScoredRanking(rows=selected, scores=scores[: len(selected)])

    def _above_min_cosine(self, ranking: Ranking) -> Ranking:
        limits = [limit for limit in (self.query.at_least, self.min_cosine) if limit is not None]
        if not limits:
            return ranking
        return ranking.take(np.flatnonzero(ranking.cosines >= max(limits) - _ROUNDING))

    def _cosines(self, rows: Int64[Array, " N"]) -> Float32[Array, " N"]:
        # in double precision, so that a row has the same score however it was found and with whatever others
        exact = self.snapshot.vectors(rows).astype(np.float64) @ self.query_vector.astype(np.float64)
        return exact.clip(-1, 1).astype(np.float32)


def _rerank(results: Ranking, reranker: Reranker, count: int) -> Ranking:
    """The first `count` in the order of likelihood, then the others in their own."""
    positions, likelihoods = reranker.order(results.rows[:count])
    others = np.arange(len(positions), len(results))
    reordered = results.take(np.concatenate([positions, others]))
    no_likelihoods = np.full(len(others), np.nan, np.float32)
    return replace(reordered, likelihoods=np.concatenate([likelihoods, no_likelihoods]))


def rows_matching(
    snapshot: EngineSnapshot, where: str, *, optional_fields: Collection[str] = ()
) -> RowSelection | None:
    """The live rows that match a filter; None without a filter.

    optional_fields: as of `Catalogue.where`.

    Raises:
        UsageError: the filter is malformed or fits no field.
    """
    return snapshot.catalogue.where(parse_filter(where), optional_fields=optional_fields) if where else None
