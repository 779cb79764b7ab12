"""For every positive, how many negatives score higher, and how many the same: both directions of retrieval in one pass.

The score of a pair is the inner product of its float32 vectors, summed in float64 in one order. It depends on the two
vectors alone, so that equal vectors tie and neither block sizes nor threads nor processes change a rank. A product of
matrices has no such property: BLAS rounds an element by its place in a block. Its float32 product is therefore only a
filter: it is off by at most γ = d·u / (1 − d·u) times the lengths of the vectors, in whatever order it sums (Higham
2002, §3.1), and the few pairs closer to the score of a positive than that are compared by their own scores.

Memory beyond the embeddings: a block of scores, and some numbers for each query and positive.

Where there is much to count and numba is installed, blocks are counted by `vlm.evaluation.compiled_ranks`; the counts
are the same.
"""

import importlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np

from vlm.errors import VlmError
from vlm.tensor_types import Array, Bool, Float32, Float64, Int64

logger = logging.getLogger(__name__)

# 8 bytes of a word count in parallel up to 255, so a row of 2,040 flags is summed as 255 words; 4 MB of scores
_WORDS = 255
QUERIES_AT_ONCE = 2 * _WORDS
CANDIDATES_AT_ONCE = 8 * _WORDS
# bytes of float64 products summed at once, which stay in the cache
_PRODUCT_BYTES = 1 << 20
_ROWS_AT_ONCE = 8192
# more pairs of a block than this share of it are first narrowed down by a product in float64
_DENSE_SHARE = 1 / 64
# multiplications of the whole product, some twenty seconds' work of a core, from which on three to compile pay
_WORTH_COMPILING = 1e12


@dataclass(frozen=True, kw_only=True)
class PositivePairs:
    """Which columns are right for which rows: each pair once, in any order."""

    rows: Int64[Array, " P"]
    columns: Int64[Array, " P"]


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """One direction of retrieval. Positives of a query with the same score are one group; groups are sorted by query,
    then from the best score down.

    query, score, positives: of each group, with the number of its positives. above, tied: negatives that score higher
    and that score the same. num_positives: of each query. num_candidates: those each query is ranked against.
    best_wrong, wrong_score: the best negative of each query (-1 without any) by its float32 score; of negatives that
    score nearly the same it is any.
    """

    query: Int64[Array, " G"]
    score: Float64[Array, " G"]
    positives: Int64[Array, " G"]
    above: Int64[Array, " G"]
    tied: Int64[Array, " G"]
    num_positives: Int64[Array, " Q"]
    num_candidates: int
    best_wrong: Int64[Array, " Q"]
    wrong_score: Float32[Array, " Q"]

    @cached_property
    def best_groups(self) -> Int64[Array, " A"]:
        """The first group of each query that has a positive: that of its best positives."""
        return np.flatnonzero(np.diff(self.query, prepend=-1))

    @property
    def queries(self) -> Int64[Array, " A"]:
        """The queries that have a positive."""
        return self.query[self.best_groups]

    @property
    def best_score(self) -> Float64[Array, " A"]:
        """The score of the best positive of each of these queries."""
        return self.score[self.best_groups]


def count_ranks(
    rows: Float32[Array, "Q D"],
    columns: Float32[Array, "N D"],
    pairs: PositivePairs,
    *,
    every_positive: bool = False,
    both: bool = True,
    block: tuple[int, int] = (QUERIES_AT_ONCE, CANDIDATES_AT_ONCE),
    compiled: bool | None = None,
) -> tuple[RankCounts, RankCounts | None]:
    """The counts with rows as queries and columns as candidates, and the other way round.

    every_positive: count for all positives of a query, not for its best alone. both: False leaves the second out.
    block: rows and columns of the scores that are in memory at once.
    compiled: count by machine code of numba; None where it is installed and pays. It changes no count.

    Raises:
        VlmError: an embedding is not finite: the model has diverged, and ranks would mean nothing.
    """
    # an array itself rather than a memmap, whose every slice would be one
    scores = _PairScores(np.asarray(rows), np.asarray(columns))
    positive_scores = scores.of_pairs(pairs.rows, pairs.columns)
    kernels = _kernels(len(rows) * len(columns) * rows.shape[1], compiled)
    by_row = _Direction(scores, pairs.rows, positive_scores, 1, every_positive=every_positive, kernels=kernels)
    directions = [by_row]
    if both:
        by_column = _Direction(
            scores, pairs.columns, positive_scores, 0, every_positive=every_positive, kernels=kernels
        )
        directions.append(by_column)
    # the product uses all cores unless told not to; so do the directions, each of which has counts of its own
    num_threads = 1 if os.environ.get("OMP_NUM_THREADS") == "1" else len(directions)
    with ThreadPoolExecutor(len(directions)) as threads:
        for block_scores in _iter_blocks(scores, pairs, block):
            if num_threads == 1:
                for direction in directions:
                    direction.add(block_scores)
            else:
                for counted in [threads.submit(direction.add, block_scores) for direction in directions]:
                    counted.result()
    return by_row.counts(), directions[1].counts() if both else None


def _kernels(num_products: int, compiled: bool | None) -> Any:
    """The module of compiled loops; None where numpy counts."""
    if compiled is None:
        compiled = num_products >= _WORTH_COMPILING
        if compiled and find_spec("numba") is None:
            logger.info("Ranks are counted by numpy; pip install 'vlm-pipeline[evaluation]' has what counts faster.")
            compiled = False
    return importlib.import_module("vlm.evaluation.compiled_ranks") if compiled else None


@dataclass(frozen=True)
class _Block:
    """Scores in float32 of some rows and columns; those of positives are -inf, so that negatives are counted alone."""

    scores: Float32[Array, "B N"]
    first: tuple[int, int]

    def queries(self, axis: int) -> tuple[int, int]:
        """The first and the one after the last of the queries, whose candidates lie along `axis`."""
        first = self.first[1 - axis]
        return first, first + self.scores.shape[1 - axis]


class _PairScores:
    """Scores of pairs of rows and columns."""

    def __init__(self, rows: Float32[Array, "Q D"], columns: Float32[Array, "N D"]) -> None:
        self.rows = rows
        self.columns = columns
        self.row_lengths = _lengths(rows)
        self.column_lengths = _lengths(columns)
        self.longest_product = float(self.row_lengths.max(initial=0.0) * self.column_lengths.max(initial=0.0))
        # a comparison that NaN fails, too
        if not self.longest_product < float(np.finfo(np.float32).max):
            raise VlmError(
                "The model's embeddings are not finite: its weights have diverged. Evaluate an earlier checkpoint, or "
                "retrain with a lower learning rate."
            )

    def lengths(self, axis: int) -> tuple[Float64[Array, " Q"], Float64[Array, " N"]]:
        """Those of the queries, whose candidates lie along `axis`, and of the candidates."""
        return (self.row_lengths, self.column_lengths) if axis else (self.column_lengths, self.row_lengths)

    def vectors(self, block: _Block) -> tuple[Float32[Array, "B D"], Float32[Array, "N D"]]:
        """The rows and columns of a block."""
        first_row, first_column = block.first
        num_rows, num_columns = block.scores.shape
        rows = self.rows[first_row : first_row + num_rows]
        return rows, self.columns[first_column : first_column + num_columns]

    def rounding(self, unit: float) -> float:
        """What a product of vectors of length 1 is off by at most, for a unit roundoff."""
        terms = self.rows.shape[1] * unit
        return terms / (1.0 - terms) if terms < 1.0 else np.inf

    def of_pairs(self, rows: Int64[Array, " P"], columns: Int64[Array, " P"]) -> Float64[Array, " P"]:
        """The score of each pair."""
        if len(rows) < _ROWS_AT_ONCE:
            return self._products(rows, columns)
        # a model that embeds much alike has many pairs of few vectors
        row_vectors, row_of = np.unique(self._row_vectors[rows], return_inverse=True)
        column_vectors, column_of = np.unique(self._column_vectors[columns], return_inverse=True)
        if 2 * len(row_vectors) * len(column_vectors) > len(rows):
            return self._products(rows, columns)
        table = self._products(
            np.repeat(row_vectors, len(column_vectors)), np.tile(column_vectors, len(row_vectors))
        ).reshape(len(row_vectors), len(column_vectors))
        return table[row_of, column_of]

    @cached_property
    def _row_vectors(self) -> Int64[Array, " Q"]:
        return _first_equal(self.rows)

    @cached_property
    def _column_vectors(self) -> Int64[Array, " N"]:
        return _first_equal(self.columns)

    def _products(self, rows: Int64[Array, " P"], columns: Int64[Array, " P"]) -> Float64[Array, " P"]:
        products = np.empty(len(rows))
        at_once = max(1, _PRODUCT_BYTES // (8 * max(1, self.rows.shape[1])))
        for first in range(0, len(rows), at_once):
            part = slice(first, first + at_once)
            left = self.rows[rows[part]].astype(np.float64)
            left *= self.columns[columns[part]]
            # each row by itself and in one order, whatever other rows there are; einsum and @ promise no such thing
            products[part] = np.add.reduce(left, axis=1)
        return products


class _Direction:
    """The counts of one direction while the blocks pass.

    axis: of a block, along which the candidates lie: 1 where rows are the queries.
    """

    def __init__(
        self,
        scores: _PairScores,
        queries: Int64[Array, " P"],
        positive_scores: Float64[Array, " P"],
        axis: int,
        *,
        every_positive: bool,
        kernels: Any = None,
    ) -> None:
        self.scores = scores
        self.kernels = kernels
        self.axis = axis
        self.query_lengths, candidate_lengths = scores.lengths(axis)
        self.longest_candidate = float(candidate_lengths.max(initial=0.0))
        self.num_candidates = len(candidate_lengths)
        self.num_positives = np.bincount(queries, minlength=len(self.query_lengths))
        self._group_positives(queries, positive_scores, every_positive=every_positive)
        self.above = np.zeros(len(self.query), np.int64)
        self.tied = np.zeros(len(self.query), np.int64)
        self.best_wrong = np.full(len(self.query_lengths), -1)
        self.wrong_score = np.full(len(self.query_lengths), -np.inf, np.float32)
        margin = self._margin(2.0**-24) + self._margin(2.0**-53)
        # outwards, so that rounding the limits to float32 decides nothing
        self.low = np.nextafter((self.score - margin).astype(np.float32), np.float32(-np.inf))
        self.high = np.nextafter((self.score + margin).astype(np.float32), np.float32(np.inf))
        self._flags = np.empty((2, 0), bool)
        # the first group of each query, and the one after the last of all
        self.first_group = np.searchsorted(self.query, np.arange(len(self.query_lengths) + 1))
        # scores of two pairs, each rounded once
        self.score_margin = 2.0 * self._margin(2.0**-53)
        self._near = np.empty((0, 3), np.int64)

    def _group_positives(
        self, queries: Int64[Array, " P"], positive_scores: Float64[Array, " P"], *, every_positive: bool
    ) -> None:
        order = np.lexsort((-positive_scores, queries))
        query = queries[order]
        score = positive_scores[order]
        is_other_query = np.append(True, query[1:] != query[:-1])[: len(query)]
        is_other_score = np.append(True, score[1:] != score[:-1])[: len(query)]
        first = np.flatnonzero(is_other_query | is_other_score)
        sizes = np.diff(first, append=len(query))
        if not every_positive:
            is_best = is_other_query[first]
            first = first[is_best]
            sizes = sizes[is_best]
        self.query = query[first]
        self.score = score[first]
        self.positives = sizes

    def _margin(self, unit: float) -> Float64[Array, " G"]:
        """How far a product of the groups' queries may be off, products below the smallest normal number included."""
        underflow = self.scores.rows.shape[1] * float(np.finfo(np.float32).tiny)
        longest = self.query_lengths[self.query] * self.longest_candidate
        return self.scores.rounding(unit) * longest * (1.0 + 1e-6) + underflow

    def add(self, block: _Block) -> None:
        """Count the negatives of a block."""
        best = block.scores.max(axis=self.axis)
        if self.kernels is None or not self._count_compiled(block, best):
            self._count_near(block, best)
        self._note_best_wrong(block, best)

    def _count_compiled(self, block: _Block, best: Float32[Array, " Q"]) -> bool:
        """Count by compiled loops; False, with nothing counted, where more pairs are near than are looked at alone."""
        first_query, last_query = block.queries(self.axis)
        bounds = self.first_group[first_query : last_query + 1]
        part = slice(bounds[0], bounds[-1])
        if len(self._near) < block.scores.size * _DENSE_SHARE:
            self._near = np.empty((int(block.scores.size * _DENSE_SHARE) + 1, 3), np.int64)
        groups = np.stack([bounds[:-1], bounds[1:]], axis=1) - bounds[0]
        count = self.kernels.count_rows if self.axis else self.kernels.count_columns
        above, num_near = count(block.scores, groups, self.high[part], self.low[part], best, self._near)
        if num_near > len(self._near):
            return False
        near = self._near[:num_near]
        rows, columns = self.scores.vectors(block)
        num_open = self.kernels.decide(rows, columns, near, self.score[part], self.score_margin[part], above)
        self.above[part] += above
        near = near[:num_open]
        self._compare(block, near[:, 0] + bounds[0], near[:, 1 + self.axis] + block.first[self.axis])
        return True

    def _count_near(self, block: _Block, best: Float32[Array, " Q"]) -> None:
        """Count by numpy those queries that have a candidate near a positive."""
        first_query, last_query = block.queries(self.axis)
        groups = np.arange(*self.first_group[[first_query, last_query]])
        # most blocks have nothing near the positives of a good model
        is_near = best[self.query[groups] - first_query] >= self.low[groups]
        # copying half of the queries costs more than comparing all
        near = groups if 2 * np.count_nonzero(is_near) > len(groups) else groups[is_near]
        at_once = last_query - first_query
        for first in range(0, len(near), at_once):
            self._count(block, near[first : first + at_once])

    def _count(self, block: _Block, groups: Int64[Array, " G"]) -> None:
        first_query, last_query = block.queries(self.axis)
        queries = self.query[groups] - first_query
        scores = block.scores
        if not np.array_equal(queries, np.arange(last_query - first_query)):
            scores = np.take(scores, queries, axis=1 - self.axis)
        is_above, is_near = self._flags_like(scores)
        np.greater(scores, np.expand_dims(self.high[groups], self.axis), out=is_above)
        np.greater_equal(scores, np.expand_dims(self.low[groups], self.axis), out=is_near)
        num_above = _count_flags(is_above, self.axis)
        self.above[groups] += num_above
        if (_count_flags(is_near, self.axis) > num_above).any():
            is_near ^= is_above
            places = np.divmod(_places(is_near), scores.shape[1])
            candidates = places[self.axis] + block.first[self.axis]
            self._compare(block, groups[places[1 - self.axis]], candidates)

    def _flags_like(self, scores: Float32[Array, "B N"]) -> tuple[Bool[Array, "B N"], Bool[Array, "B N"]]:
        """Two arrays of flags, in memory that is used again for the next block."""
        if self._flags.shape[1] < scores.size:
            self._flags = np.empty((2, -(-scores.size // 8) * 8), bool)
        first, second = self._flags[:, : scores.size].reshape(2, *scores.shape)
        return first, second

    def _compare(self, block: _Block, groups: Int64[Array, " P"], candidates: Int64[Array, " P"]) -> None:
        """Compare the score of each candidate with that of its group."""
        queries = self.query[groups]
        rows, columns = (queries, candidates) if self.axis else (candidates, queries)
        if len(groups) > max(_ROWS_AT_ONCE, block.scores.size * _DENSE_SHARE):
            near = self._narrow(block, groups, rows, columns)
            groups = groups[near]
            rows = rows[near]
            columns = columns[near]
        difference = self.scores.of_pairs(rows, columns) - self.score[groups]
        self._add_counts(self.above, groups[difference > 0])
        self._add_counts(self.tied, groups[difference == 0])

    def _narrow(
        self, block: _Block, groups: Int64[Array, " P"], rows: Int64[Array, " P"], columns: Int64[Array, " P"]
    ) -> Int64[Array, " N"]:
        """Count by a product in float64 the pairs that it can tell apart; the positions of the others are returned."""
        first_row, first_column = block.first
        left, right = self.scores.vectors(block)
        products = left.astype(np.float64) @ right.astype(np.float64).T
        difference = products[rows - first_row, columns - first_column] - self.score[groups]
        margin = self.score_margin[groups]
        self._add_counts(self.above, groups[difference > margin])
        return np.flatnonzero(np.abs(difference) <= margin)

    def _add_counts(self, counts: Int64[Array, " G"], groups: Int64[Array, " P"]) -> None:
        if len(groups):
            first = int(groups.min())
            added = np.bincount(groups - first)
            counts[first : first + len(added)] += added

    def _note_best_wrong(self, block: _Block, best: Float32[Array, " Q"]) -> None:
        first_query, last_query = block.queries(self.axis)
        better = np.flatnonzero(best > self.wrong_score[first_query:last_query])
        if len(better):
            places = np.take(block.scores, better, axis=1 - self.axis).argmax(axis=self.axis)
            self.best_wrong[first_query + better] = block.first[self.axis] + places
            self.wrong_score[first_query + better] = best[better]

    def counts(self) -> RankCounts:
        """What was counted."""
        return RankCounts(
            query=self.query,
            score=self.score,
            positives=self.positives,
            above=self.above,
            tied=self.tied,
            num_positives=self.num_positives,
            num_candidates=self.num_candidates,
            best_wrong=self.best_wrong,
            wrong_score=self.wrong_score,
        )


def _iter_blocks(scores: _PairScores, pairs: PositivePairs, block: tuple[int, int]) -> Iterator[_Block]:
    """The float32 scores, block by block; the memory of a block is used again for the next."""
    block_rows, block_columns = block
    num_rows = len(scores.rows)
    num_columns = len(scores.columns)
    blocks_across = -(-num_columns // block_columns)
    # the positives in the order of their blocks
    block_of_pair = pairs.rows // block_rows * blocks_across + pairs.columns // block_columns
    order = np.argsort(block_of_pair, kind="stable")
    num_blocks = -(-num_rows // block_rows) * blocks_across
    bounds = np.searchsorted(block_of_pair[order], np.arange(num_blocks + 1))
    memory = np.empty(min(block_rows, num_rows) * min(block_columns, num_columns), np.float32)
    for number in range(num_blocks):
        first_row = number // blocks_across * block_rows
        first_column = number % blocks_across * block_columns
        rows = scores.rows[first_row : first_row + block_rows]
        columns = scores.columns[first_column : first_column + block_columns]
        products = memory[: len(rows) * len(columns)].reshape(len(rows), len(columns))
        np.matmul(rows, columns.T, out=products)
        positives = order[bounds[number] : bounds[number + 1]]
        products[pairs.rows[positives] - first_row, pairs.columns[positives] - first_column] = -np.inf
        yield _Block(products, (first_row, first_column))


def _count_flags(flags: Bool[Array, "B N"], axis: int) -> Int64[Array, " Q"]:
    """How many are true along an axis; as numpy's count_nonzero, which is six times slower on blocks."""
    num_rows, num_columns = flags.shape
    if axis == 0:
        # a byte holds the count of 255 rows
        total = np.zeros(num_columns, np.int64)
        for first in range(0, num_rows, _WORDS):
            total += np.add.reduce(flags[first : first + _WORDS].view(np.uint8), axis=0, dtype=np.uint8)
        return total
    if num_columns % (8 * _WORDS):
        return np.count_nonzero(flags, axis=1)
    words = flags.view(np.uint64).reshape(num_rows, -1, _WORDS)
    # the bytes of the sum of 255 words are eight counts, none of which overflows
    sums = np.add.reduce(words, axis=2)
    return sums.view(np.uint8).reshape(num_rows, -1).sum(axis=1, dtype=np.int64)


def _places(flags: Bool[Array, "B N"]) -> Int64[Array, " P"]:
    """Where in the flattened flags the few true ones are; eight at a time, which is as many times faster."""
    flat = flags.reshape(-1)
    num_words = len(flat) // 8
    words = flat[: num_words * 8].view(np.uint64)
    held = np.flatnonzero(words)
    word, byte = np.nonzero(words[held].view(bool).reshape(-1, 8))
    rest = num_words * 8 + np.flatnonzero(flat[num_words * 8 :])
    return np.concatenate([held[word] * 8 + byte, rest])


def _lengths(vectors: Float32[Array, "N D"]) -> Float64[Array, " N"]:
    lengths = np.empty(len(vectors))
    for first in range(0, len(vectors), _ROWS_AT_ONCE):
        part = vectors[first : first + _ROWS_AT_ONCE].astype(np.float64)
        lengths[first : first + len(part)] = np.sqrt(np.einsum("nd,nd->n", part, part))
    return lengths


def _first_equal(vectors: Float32[Array, "N D"]) -> Int64[Array, " N"]:
    """For each vector the number of the first that has the same bits."""
    rng = np.random.default_rng(0)
    # a random sum of the words tells vectors apart but for one pair in 2⁶⁴; equal sums are looked at
    factors = rng.integers(0, 2**64, vectors.shape[1], dtype=np.uint64) | np.uint64(1)
    sums = np.empty(len(vectors), np.uint64)
    for first in range(0, len(vectors), _ROWS_AT_ONCE):
        words = np.ascontiguousarray(vectors[first : first + _ROWS_AT_ONCE]).view(np.uint32).astype(np.uint64)
        words *= factors
        sums[first : first + len(words)] = words.sum(axis=1, dtype=np.uint64)
    _, first_of_sum, sum_of = np.unique(sums, return_index=True, return_inverse=True)
    firsts = first_of_sum[sum_of]
    repeats = np.flatnonzero(firsts != np.arange(len(vectors)))
    for first in range(0, len(repeats), _ROWS_AT_ONCE):
        part = repeats[first : first + _ROWS_AT_ONCE]
        is_other = (vectors[part] != vectors[firsts[part]]).any(axis=1)
        firsts[part[is_other]] = part[is_other]
    return firsts
