"""How a search is done: by FAISS with a selector, or by an exact scan; never with fewer answers than there are.

Of each segment those positions may answer that are living and that a filter chose. A filter that leaves few rows is
answered by comparing them all; one that leaves many, by a FAISS search that passes the others over and visits more
lists or nodes for it, so that as many rows are compared as without a filter. More than a
hundred answers visit more lists or nodes, so that their recall is about that of a hundred, and a fiftieth of the rows
or more are found by comparing them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt

import numpy as np

from vlm.index.kinds import load_faiss
from vlm.index.kinds.gpu import MOST_ANSWERS
from vlm.index.kinds.searching import candidates_for, rerank, search_parameters
from vlm.index.segments import OpenSegment
from vlm.tensors import Array, Bool, Float32, Int64, UInt8

EXACT_ROWS = 10_000
EXACT_SHARE = 0.02
DEEP = 100
_ROWS_AT_ONCE = 16_384
_QUERIES_AT_ONCE = 1024
_NOBODY = -1

Answers = tuple[Float32[Array, "Q _"], Int64[Array, "Q _"]]
"""Cosines, best first, and rows; where there are fewer, the score is -inf and the row -1."""


@dataclass(frozen=True, eq=False)
class Selected:
    """A segment and the positions of it that may answer; `mask` None: all of them."""

    segment: OpenSegment
    mask: Bool[Array, " N"] | None = None

    @cached_property
    def count(self) -> int:
        """How many may answer."""
        return len(self.segment) if self.mask is None else int(np.count_nonzero(self.mask))

    @cached_property
    def positions(self) -> Int64[Array, " M"]:
        """Those that may answer, ascending."""
        return np.arange(len(self.segment)) if self.mask is None else np.flatnonzero(self.mask)

    @cached_property
    def bitmap(self) -> UInt8[Array, " _"]:
        """The mask, a bit a position, as FAISS reads it."""
        assert self.mask is not None
        return np.packbits(self.mask, bitorder="little")

    def rows(self) -> Int64[Array, " M"]:
        """The catalogue's rows of those that may answer, ascending."""
        return self.segment.rows[self.positions] if self.mask is not None else np.asarray(self.segment.rows)

    def without(self, rows: Int64[Array, " M"]) -> "Selected":
        """Less the given rows, which are sorted."""
        dead = self.segment.positions_of(rows)
        if not len(dead):
            return self
        mask = np.ones(len(self.segment), bool) if self.mask is None else self.mask.copy()
        mask[dead] = False
        return replace(self, mask=mask)

    def among(self, rows: Int64[Array, " M"]) -> "Selected":
        """Of these only the given rows, which are sorted."""
        chosen, mask = self.segment.positions_of(rows), np.zeros(len(self.segment), bool)
        mask[chosen] = True if self.mask is None else self.mask[chosen]
        return replace(self, mask=mask)

    def search(self, queries: Float32[Array, "Q D"], top: int) -> Answers:
        """The nearest by FAISS, re-ranked where its scores are not exact; by a scan where it finds too few, or where
        so many are asked for that nothing would be saved."""
        segment, top = self.segment, min(top, self.count)
        if self.is_scanned(top):
            return self.scan(queries, top)
        more, deeper = segment.described.rerank, sqrt(top / DEEP) if top > DEEP else 1.0
        candidates = min(candidates_for(top, more), self.count) if more else top
        scores, positions = self._ask_faiss(queries, candidates, deeper)
        if more:
            scores, positions = rerank(segment.vectors.stored, queries, positions, top)
        rows = segment.rows_at(positions)
        if _NOBODY in (last := positions[:, -1]).tolist():  # nobody stands last
            is_short = last == _NOBODY
            scores[is_short], rows[is_short] = self.scan(queries[is_short], top)
        # re-ranked ones are in order
        return _ordered(scores, rows, top) if not more and _have_ties(scores) else (scores, rows)

    def is_scanned(self, top: int) -> bool:
        """Whether so many are found by comparing all, whatever the segment's effort."""
        return top > DEEP and self.segment.is_approximate and top > EXACT_SHARE * self.count

    def scan(self, queries: Float32[Array, "Q D"], top: int) -> Answers:
        """The nearest by comparing all that may answer, with the stored rows."""
        found = [_none(queries)]
        for first in range(0, self.count, _ROWS_AT_ONCE):
            positions = self.positions[first : first + _ROWS_AT_ONCE]
            scores = queries @ self.segment.vectors.take(positions).T
            rows = np.broadcast_to(self.segment.rows[positions], scores.shape)
            found = [merge([*found, _best(scores, rows, top)], top)]
        return found[0]

    def _ask_faiss(self, queries: Float32[Array, "Q D"], top: int, deeper: float) -> Answers:
        """deeper: by this factor more lists or nodes than the segment's own effort; a GPU keeps to its own."""
        if self.mask is None:
            on_gpu = self.segment.on_gpu if top <= MOST_ANSWERS else None
            if on_gpu is not None:
                return on_gpu.search(queries, top)
            if deeper == 1 or not self.segment.is_approximate:
                return self.segment.ask(queries, top)
        selector = None if self.mask is None else load_faiss().IDSelectorBitmap(self.bitmap)
        effort = self.segment.effort(self.count / len(self.segment) / deeper)
        parameters = search_parameters(self.segment.index, selector=selector, effort=effort)
        return self.segment.index.search(queries, top, params=parameters)


def nearest(
    selected: Sequence[Selected], queries: Float32[Array, "Q D"], top: int, among: Int64[Array, " N"] | None = None
) -> Answers:
    """The `top` nearest of all that are selected, or of the rows `among` them (sorted).

    There are fewer columns only if there are fewer rows.
    """
    if len(queries) > _QUERIES_AT_ONCE:
        starts = range(0, len(queries), _QUERIES_AT_ONCE)
        answers = [nearest(selected, queries[first : first + _QUERIES_AT_ONCE], top, among) for first in starts]
        return np.concatenate([scores for scores, _ in answers]), np.concatenate([rows for _, rows in answers])
    if among is None:
        if len(selected) == 1 and selected[0].count:
            return selected[0].search(queries, top)
        return merge([one.search(queries, top) for one in selected if one.count] or [_none(queries)], top)
    chosen = [one.among(among) for one in selected]
    total = sum(one.count for one in chosen)
    is_small = total <= max(EXACT_ROWS, EXACT_SHARE * sum(one.count for one in selected))
    found = [one.scan(queries, top) if is_small else one.search(queries, top) for one in chosen if one.count]
    return merge(found or [_none(queries)], top)


def merge(answers: Sequence[Answers], top: int) -> Answers:
    """The best `top` of several lists of answers to the same queries, each in order; ties by row."""
    if len(answers) == 1:
        return answers[0]
    scores = np.concatenate([scores for scores, _ in answers], axis=1)
    return _ordered(scores, np.concatenate([rows for _, rows in answers], axis=1), top)


def _have_ties(scores: Float32[Array, "Q K"]) -> bool:
    """Whether a line, falling, has equal scores; of one line, which is the rule, Python is quicker than numpy."""
    if len(scores) == 1:
        line = scores[0].tolist()
        return len(set(line)) < len(line)
    return bool((scores[:, 1:] == scores[:, :-1]).any())


def _ordered(scores: Float32[Array, "Q K"], rows: Int64[Array, "Q K"], top: int) -> Answers:
    order, line = np.lexsort((rows, -scores), axis=1)[:, :top], np.arange(len(scores))[:, None]
    return scores[line, order], rows[line, order]


def _none(queries: Float32[Array, "Q D"]) -> Answers:
    return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)


def _best(scores: Float32[Array, "Q N"], rows: Int64[Array, "Q N"], top: int) -> Answers:
    """The `top` highest of each line, in no order."""
    if scores.shape[1] <= top:
        return scores, rows
    chosen = np.argpartition(-scores, top - 1, axis=1)[:, :top]
    return np.take_along_axis(scores, chosen, axis=1), np.take_along_axis(rows, chosen, axis=1)
