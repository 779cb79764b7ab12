"""Where the right answers stand among all, with ties broken by no one's favour; in chunks, never all at once."""

from dataclasses import dataclass

import numpy as np

from vlm.errors import VlmError
from vlm.tensors import Array, Float, Float32, Int

QUERIES_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """For each query the standing of its best right answer under an exchangeable breaking of ties.

    above: wrong answers that score strictly higher than the best right one.
    tied_wrong, tied_right: wrong and right answers that score exactly the same as it (tied_right >= 1).
    """

    above: Int[Array, " Q"]
    tied_wrong: Int[Array, " Q"]
    tied_right: Int[Array, " Q"]

    def recall(self, k: int) -> float:
        """Share of queries with a right answer among the first k, expected over all orders of tied answers."""
        return float(self.hits(k).mean())

    def hits(self, k: int) -> Float[Array, " Q"]:
        """Probability per query of a right answer among the first k.

        With j = k - above places left for the tie, all j go to wrong answers with probability
        C(tied_wrong, j) / C(tied_wrong + tied_right, j).
        """
        left = np.maximum(k - self.above, 0)
        miss = np.ones(len(left))
        for place in range(int(left.max(initial=0))):
            wrong = np.maximum(self.tied_wrong - place, 0)
            everyone = np.maximum(self.tied_wrong + self.tied_right - place, 1)
            miss = np.where(place < left, miss * wrong / everyone, miss)
            if not miss[left > place].any():
                break
        return 1.0 - miss

    def expected(self) -> Float[Array, " Q"]:
        """Expected rank of the first right answer, counted from 1."""
        return self.above + 1 + self.tied_wrong / (self.tied_right + 1)

    def median(self) -> float:
        """Median over the queries of the expected rank."""
        return float(np.median(self.expected()))


def rank_answers(
    queries: Float32[Array, "Q D"],
    answers: Float32[Array, "N D"],
    right: list[list[int]],
    *,
    queries_at_once: int = QUERIES_AT_ONCE,
) -> Ranks:
    """Rank the right answers of each query by inner product.

    right: for each query the numbers of its right answers, at least one.
    Memory: queries_at_once × N scores.

    Raises:
        VlmError: a score is not finite: the model has diverged, and ranks would mean nothing.
    """
    above, tied_wrong, tied_right = [np.empty(len(queries), np.int64) for _ in range(3)]
    for first in range(0, len(queries), queries_at_once):
        chunk = slice(first, min(first + queries_at_once, len(queries)))
        scores = queries[chunk] @ answers.T
        if not np.isfinite(scores).all():
            raise VlmError(
                "The model gives embeddings that are not finite: its weights have diverged. Measure an earlier "
                "checkpoint, or train it anew with a lower learning rate."
            )
        rows = np.repeat(np.arange(len(scores)), [len(found) for found in right[chunk]])
        columns = np.concatenate([np.asarray(found, dtype=np.int64) for found in right[chunk]])
        best = np.full(len(scores), -np.inf, dtype=scores.dtype)
        np.maximum.at(best, rows, scores[rows, columns])
        above[chunk] = (scores > best[:, None]).sum(axis=1)
        tied_right[chunk] = np.bincount(rows, scores[rows, columns] == best[rows], minlength=len(scores))
        tied_wrong[chunk] = (scores == best[:, None]).sum(axis=1) - tied_right[chunk]
    return Ranks(above=above, tied_wrong=tied_wrong, tied_right=tied_right)
