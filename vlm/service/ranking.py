"""The order of the results of one query: nearest rows, rank fusion, deduplication, diversity, reranking, pages.

`Ranker.page` is the way through. Each step below may need more rows than one page shows, so each asks the step before
it for as many as it needs, and that one searches the index deeper until it has them:

    nearest rows → fused with full-text search → one of each group of duplicates → reranked or diverse → page
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError, VlmError
from vlm.index.catalog import Catalogue, Entry
from vlm.index.filter_language import parse_filter
from vlm.index.metadata import sanitize_text
from vlm.index.reader import IndexSnapshot
from vlm.index.segments import nearest
from vlm.service.images import read_image_bytes
from vlm.service.query import Cursor, Query
from vlm.tensor_types import Array, Float32, Int64, Tensor, UInt8

RANK_CONSTANT = 60
"""k of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009, §2)."""

NUM_CANDIDATES = 1000
"""How many of each ranking are fused, and how many are diversified; the others follow in their own order."""

# FAISS sums in single precision, so rows of equal score may come out this far apart
_TIE = 1e-6

# factor by which a search goes deeper when too few rows are left
_DEEPER = 4

_IMAGES_AT_ONCE = 64
# reading waits for disk or network, and decoding releases Python's lock, so threads suffice
_READERS = 8


def fuse_ranks(
    rankings: Sequence[Int64[Array, " _"]], *, constant: int = RANK_CONSTANT
) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): each row once, ascending, with its score.

    A row's score is the sum over the rankings that have it of 1 / (constant + rank), ranks from 1.

    >>> rows, scores = fuse_ranks([np.array([7, 3]), np.array([3])])
    >>> rows.tolist(), [round(score, 5) for score in scores.tolist()]
    ([3, 7], [0.03252, 0.01639])
    """
    # each starts with an empty array, so that concatenating no rankings gives no rows
    all_rows = np.concatenate([np.zeros(0, np.int64), *rankings])
    ranks = np.concatenate([np.zeros(0), *(np.arange(1.0, len(ranking) + 1) for ranking in rankings)])
    rows, positions = np.unique(all_rows, return_inverse=True)
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
        is_duplicate = vectors[without_leader] @ vectors[leader] >= threshold
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
class Captioner(Protocol):
    """A model that gives the likelihood of a text, given an image."""

    @property
    def view(self) -> EvalTransform:
        """From an encoded image to the pixels the model sees."""
        ...

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same likelihoods."""
        ...

    @property
    def can_caption(self) -> bool:
        """Whether it has a caption decoder."""
        ...

    def text_log_likelihoods(self, images: UInt8[Tensor, "B 3 H W"], texts: Sequence[str]) -> Float32[Tensor, "B T"]:
        """Mean log-likelihood of each text's tokens given each image, in nats."""
        ...


def require_captioner(model: object, spec: str) -> Captioner:
    """The model, if it can rerank.

    Raises:
        UsageError: it has no caption decoder.
    """
    if isinstance(model, Captioner) and model.can_caption:
        return model
    raise UsageError(f"{spec} has no caption decoder to rerank with; train one, e.g. vlm train tiny-coca.")


class Reranker:
    """Orders rows by how likely a captioner finds the texts of a query, given their images.

    unread: why an image could not be read, by uid. milliseconds: spent reading images and running the captioner.
    """

    def __init__(self, captioner: Captioner, query: Query, catalogue: Catalogue) -> None:
        self.captioner = captioner
        self.catalogue = catalogue
        self.unread: dict[str, str] = {}
        self.milliseconds = 0.0
        self._texts = [*query.texts, *query.minus]
        # signed_weights are those of texts, images, items, vectors, minus: the texts' are at both ends
        weights = query.signed_weights()
        first_minus = len(weights) - len(query.minus)
        text_weights = [*weights[: len(query.texts)], *weights[first_minus:]]
        # magnitudes sum to 1, so that a likelihood stays one in nats per token whatever the scale of the weights
        self._weights = torch.tensor(text_weights) / sum(map(abs, text_weights))

    def order(self, rows: Int64[Array, " N"]) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
        """Positions of the rows, the likeliest first, and the likelihood of each in this order.

        The likelihood of a row is the weighted mean over the texts of log p(text | image) / tokens, in nats; minus
        texts count against it. A row whose image cannot be read keeps its position, and its likelihood is NaN.
        """
        started = time.perf_counter()
        likelihoods = self._likelihoods(self.catalogue.entries(rows.tolist()))
        is_read = ~np.isnan(likelihoods)
        readable = np.flatnonzero(is_read)
        # readable rows are sorted among their own positions; stable, so that equal likelihoods keep their order
        positions = np.arange(len(rows))
        positions[is_read] = readable[np.argsort(-likelihoods[readable], kind="stable")]
        self.milliseconds += (time.perf_counter() - started) * 1000
        return positions, likelihoods[positions]

    def _likelihoods(self, entries: Sequence[Entry]) -> Float32[Array, " N"]:
        likelihoods = np.full(len(entries), np.nan, np.float32)
        with ThreadPoolExecutor(_READERS) as readers:
            for first in range(0, len(entries), _IMAGES_AT_ONCE):
                views = list(readers.map(self._read_view, entries[first : first + _IMAGES_AT_ONCE]))
                positions: list[int] = []
                pixels: list[UInt8[Array, "3 H W"]] = []
                for position, view in enumerate(views, first):
                    if view is not None:
                        positions.append(position)
                        pixels.append(view)
                if pixels:
                    images = torch.from_numpy(np.stack(pixels))
                    of_texts = self.captioner.text_log_likelihoods(images, self._texts)
                    likelihoods[positions] = (of_texts @ self._weights).numpy()
        return likelihoods

    def _read_view(self, entry: Entry) -> UInt8[Array, "3 H W"] | None:
        try:
            return self.captioner.view(read_image_bytes(entry))
        except (VlmError, BadSample) as error:
            self.unread[entry.uid] = str(error)
            return None


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

    query_vector: unit vector of the query. allowed_rows: the rows that may be results, ascending; None: all live ones.
    reranker: of the top results. num_candidates: as `NUM_CANDIDATES`.
    """

    snapshot: IndexSnapshot
    query_vector: Float32[Array, " D"]
    query: Query
    allowed_rows: Int64[Array, " N"] | None = None
    reranker: Reranker | None = None
    num_candidates: int = NUM_CANDIDATES

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
        return self.query.digest(reranker=self.reranker.captioner.fingerprint if self.reranker else "")

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
        _, row_table = nearest(self.snapshot.views, self.query_vector[None], depth, self.allowed_rows)
        rows = row_table[0]
        cosines = self._cosines(rows)
        order = np.lexsort((rows, -cosines))
        return self._above_min_cosine(Ranking(rows=rows[order], cosines=cosines[order]))

    def _fused(self) -> Ranking:
        """The top rows by cosine and by full-text search, in the order of reciprocal rank fusion."""
        by_cosine = self._nearest(self.num_candidates).rows
        by_words = self._full_text_rows(self.num_candidates)
        rows, fused = fuse_ranks([by_cosine, by_words])
        cosines = self._cosines(rows)
        order = np.lexsort((rows, -cosines, -fused))
        return self._above_min_cosine(Ranking(rows=rows[order], cosines=cosines[order], fused=fused[order]))

    def _full_text_rows(self, depth: int) -> Int64[Array, " N"]:
        """The allowed rows whose captions contain the words, best first."""
        words = sanitize_text(self.query.words)
        num_requested = depth
        while True:
            # full-text search knows no filter: it is applied to ever more of its results
            entries = self.snapshot.catalogue.search_text(words, num_requested)
            rows = np.array([entry.row for entry in entries], np.int64)
            if self.allowed_rows is not None:
                rows = rows[np.isin(rows, self.allowed_rows)]
            if len(rows) >= depth or len(entries) < num_requested:
                return rows[:depth]
            num_requested *= _DEEPER

    def _above_min_cosine(self, ranking: Ranking) -> Ranking:
        if self.query.at_least is None:
            return ranking
        return ranking.take(np.flatnonzero(ranking.cosines >= self.query.at_least))

    def _cosines(self, rows: Int64[Array, " N"]) -> Float32[Array, " N"]:
        # in double precision, so that a row has the same score however it was found and with whatever others
        exact = self.snapshot.vectors(rows).astype(np.float64) @ self.query_vector.astype(np.float64)
        return exact.astype(np.float32)


def _rerank(results: Ranking, reranker: Reranker, count: int) -> Ranking:
    """The first `count` in the order of likelihood, then the others in their own."""
    positions, likelihoods = reranker.order(results.rows[:count])
    others = np.arange(len(positions), len(results))
    reordered = results.take(np.concatenate([positions, others]))
    no_likelihoods = np.full(len(others), np.nan, np.float32)
    return replace(reordered, likelihoods=np.concatenate([likelihoods, no_likelihoods]))


def rows_matching(snapshot: IndexSnapshot, where: str) -> Int64[Array, " N"] | None:
    """The live rows that match a filter; None without a filter.

    Raises:
        UsageError: the filter is malformed or fits no field.
    """
    return snapshot.catalogue.where(parse_filter(where)) if where else None
