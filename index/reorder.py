"""Answers put in another order: several rankings fused, near-duplicates behind one, diverse ones first."""

from collections.abc import Sequence

import numpy as np

from vlm.tensors import Array, Float32, Int64

RANK_CONSTANT = 60


def fuse_ranks(
    rankings: Sequence[Int64[Array, " _"]], *, constant: int = RANK_CONSTANT
) -> tuple[Int64[Array, " N"], Float32[Array, " N"]]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): each row once, rising, with its score.

    A row's score is the sum over the rankings that have it of 1 / (constant + rank), ranks from 1.

    >>> rows, scores = fuse_ranks([np.array([7, 3]), np.array([3])])
    >>> rows.tolist(), [round(score, 5) for score in scores.tolist()]
    ([3, 7], [0.03252, 0.01639])
    """
    rows, places = np.unique(np.concatenate([np.zeros(0, np.int64), *rankings]), return_inverse=True)
    ranks = np.concatenate([np.zeros(0), *(np.arange(1.0, len(ranking) + 1) for ranking in rankings)])
    return rows, np.bincount(places, 1 / (constant + ranks), len(rows)).astype(np.float32)


def lead_duplicates(vectors: Float32[Array, "N D"], threshold: float, *, most: int) -> Int64[Array, " N"]:
    """For each of the unit vectors, best first, the number of the one that stands for it.

    That is itself, or the first of those that stand for themselves whose cosine with it is at least `threshold`.
    Only `most` are looked for that stand for themselves; -1 if none of these stands for a vector.
    """
    leaders = np.full(len(vectors), -1, np.int64)
    for _ in range(most):
        open_ones = np.flatnonzero(leaders < 0)
        if not len(open_ones):
            break
        first = open_ones[0]
        is_like = vectors[open_ones] @ vectors[first] >= threshold
        # a vector is its own duplicate, whatever rounding says
        is_like[0] = True
        leaders[open_ones[is_like]] = first
    return leaders


def diversify(
    relevance: Float32[Array, " N"], vectors: Float32[Array, "N D"], diversity: float, top: int
) -> Int64[Array, " K"]:
    """The `top` candidates by maximal marginal relevance (Carbonell and Goldstein 1998), in the order they are chosen.

    Each next one has the highest (1 - diversity) relevance - diversity * likeness, where likeness is its highest cosine
    with those chosen before. Unlike in the paper, relevance is first brought to 0 for the least and 1 for the most of
    the candidates: cosines of a text with pictures lie so close together that likeness would decide alone.

    Args:
        relevance: of each candidate, in any unit.
        vectors: unit vectors of the candidates.
        diversity: 0 keeps the order of relevance, 1 looks at likeness alone.
    """
    spread = float(np.ptp(relevance)) if len(relevance) else 0.0
    scaled = (relevance - relevance.min()) / spread if spread else np.zeros(len(relevance), np.float32)
    likeness = np.zeros(len(relevance), np.float32)
    is_left, chosen = np.ones(len(relevance), bool), []
    while len(chosen) < min(top, len(relevance)):
        gain = np.where(is_left, (1 - diversity) * scaled - diversity * likeness, -np.inf)
        best = int(gain.argmax())
        is_left[best] = False
        cosines = vectors @ vectors[best]
        likeness = np.maximum(likeness, cosines) if chosen else cosines
        chosen.append(best)
    return np.array(chosen, np.int64)
