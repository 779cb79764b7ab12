"""Recall against exact truth, up to ties, with a bound."""

from collections.abc import Iterable

import numpy as np

from vlm.tensors import Array, Float, Float32

# two ways to sum 1,000 float32 products of unit vectors differ by less
TIE = 1e-6
_RESAMPLES = 1000
_QUERIES_AT_ONCE = 256


def exact_scores(
    blocks: Iterable[Float32[Array, "N D"]], queries: Float32[Array, "Q D"], top: int
) -> Float32[Array, "Q K"]:
    """Cosines of the `top` rows nearest to each query over all blocks, best first; fewer if there are fewer rows."""
    best = np.empty((len(queries), 0), np.float32)
    for block in blocks:
        kept = min(top, best.shape[1] + len(block))
        fresh = np.empty((len(queries), kept), np.float32)
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            some = slice(first, first + _QUERIES_AT_ONCE)
            both = np.concatenate([best[some], queries[some] @ block.T], axis=1)
            fresh[some] = np.partition(both, both.shape[1] - kept, axis=1)[:, -kept:]
        best = fresh
    return -np.sort(-best, axis=1)


def recall_of_each(found: Float32[Array, "Q C"], truth: Float32[Array, "Q K"], at: int) -> Float[Array, " Q"]:
    """For each query the share of its `at` nearest rows that were found among the first `at` answers.

    found, truth: exact cosines of distinct rows, best first, -inf where nothing was found. An answer counts if it is as
    near as the last of the truth, so that rows equally near may stand for each other. Where there are fewer than `at`
    rows, all of them are the truth.
    """
    at = min(at, truth.shape[1])
    return (found[:, :at] >= truth[:, at - 1 : at] - TIE).sum(axis=1) / at


def lower_bound(recalls: Float[Array, " Q"], *, seed: int = 0, confidence: float = 0.95) -> float:
    """What the mean recall over all such queries is at least, with this confidence: the bootstrap's percentile.

    Efron 1979, one-sided, 1,000 resamples of the queries. It cannot know of misses that did not occur among them, so
    give it hundreds.
    """
    drawn = np.random.default_rng(seed).integers(0, len(recalls), (_RESAMPLES, len(recalls)))
    return float(np.quantile(recalls[drawn].mean(axis=1), 1 - confidence))
