"""What the autotuner measures on: sampled rows to index, queries that are not among them, and recall with its bound.

Every query set is split into two halves, one to tune with and one to evaluate on; all captions of a sample are in the
same half. What is left of the first set gives a graph links (`graph_links.link_answers`). A direction is named by the
modalities of query and row: text→image.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm.errors import UsageError
from vlm.index.embeddings_folder import Embeddings
from vlm.tensor_types import Array, Float, Float32, Int64

# two orders of summing 1,000 float32 products of unit vectors differ by less
TIE = 1e-6
_RESAMPLES = 1000
_CONFIDENCE = 0.95
_QUERIES_AT_ONCE = 256


def exact_scores(
    blocks: Iterable[Float32[Array, "N D"]], queries: Float32[Array, "Q D"], top: int
) -> Float32[Array, "Q K"]:
    """Cosines of the `top` rows nearest to each query over all blocks, best first; fewer if there are fewer rows."""
    best = np.empty((len(queries), 0), np.float32)
    for block in blocks:
        num_best = min(top, best.shape[1] + len(block))
        # a row of every block may be among the best, so the best so far compete with it again
        new_best = np.empty((len(queries), num_best), np.float32)
        # few queries at once, so that their scores stay in the cache
        for first in range(0, len(queries), _QUERIES_AT_ONCE):
            some = slice(first, first + _QUERIES_AT_ONCE)
            scores = np.concatenate([best[some], queries[some] @ block.T], axis=1)
            new_best[some] = np.partition(scores, scores.shape[1] - num_best, axis=1)[:, -num_best:]
        best = new_best
    return -np.sort(-best, axis=1)


def per_query_recall(scores: Float32[Array, "Q C"], truth: Float32[Array, "Q K"], at: int) -> Float[Array, " Q"]:
    """For each query the share of its `at` nearest rows that are among its first `at` results.

    scores, truth: exact cosines of distinct rows, best first, -inf where nothing was found. A result counts if it is
    as near as the last of the truth, so that ties may stand for each other. If there are fewer than `at` rows, all of
    them are the truth.
    """
    at = min(at, truth.shape[1])
    return (scores[:, :at] >= truth[:, at - 1 : at] - TIE).sum(axis=1) / at


def mean_recalls(recalls: Mapping[int, Float[Array, " Q"]]) -> dict[int, float]:
    """The mean over queries, by number of results."""
    return {count: float(recall.mean()) for count, recall in recalls.items()}


def lower_bound(recalls: Float[Array, " Q"], *, seed: int = 0) -> float:
    """A one-sided lower bound of the mean recall over all such queries: the percentile bootstrap (Efron 1979).

    It draws 1,000 resamples of the queries, and cannot know of misses that did not occur among them, so give it
    hundreds.
    """
    # whole queries are drawn again, since hits of one query are not independent
    sample = np.random.default_rng(seed).integers(0, len(recalls), (_RESAMPLES, len(recalls)))
    return float(np.quantile(recalls[sample].mean(axis=1), 1 - _CONFIDENCE))


# at most this share of the sampled rows is held out of the index as queries
_HELD_OUT_SHARE = 0.1

SHOWN = (1, 10, 100)
"""Numbers of results whose recall is reported."""

MIN_REVERSED_ROWS = 1000
"""With fewer rows in the reversed direction, 100 results would be more than a tenth of the index."""

# more rows would only take longer
_MAX_REVERSED_ROWS = 20_000

# a query for every fourth row links their answers in a third of the time that a small graph takes to build
_LINK_QUERIES_PER_ROW = 0.25
_MAX_LINK_QUERIES = 100_000


class SampledRows:
    """Rows in memory, as `TrainingRows`. stored: the same rows as float16, as an index folder keeps them."""

    def __init__(self, vectors: Float32[Array, "N D"]) -> None:
        self.vectors = vectors
        self.stored = vectors.astype(np.float16)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        """D."""
        return self.vectors.shape[1]

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """Distinct rows sampled uniformly."""
        return self.vectors[np.sort(np.random.default_rng(seed).permutation(len(self))[:count])]

    def part(self, share: float) -> "SampledRows":
        """The first rows, which are a random part because the rows are in random order."""
        return SampledRows(self.vectors[: max(1, round(len(self) * share))])


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """Queries with their ground truth. scores: exact cosines of the nearest rows, best first."""

    direction: str
    vectors: Float32[Array, "Q D"]
    scores: Float32[Array, "Q K"]

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def with_ground_truth(
        cls, direction: str, vectors: Float32[Array, "Q D"], rows: SampledRows, top: int
    ) -> "QuerySet":
        """The ground truth by comparing with every row."""
        # in blocks, so that the cosines of all queries and rows never exist at once
        blocks = (rows.vectors[first : first + 65_536] for first in range(0, len(rows), 65_536))
        return cls(direction=direction, vectors=vectors, scores=exact_scores(blocks, vectors, top))


@dataclass(frozen=True, kw_only=True)
class TuningSample:
    """Rows to index, queries to tune with, and queries of each direction to evaluate on.

    eval_queries: the first direction is the target's; none of its queries is tuned with. The last direction is that of
        held-out rows.
    link_queries: of the target's direction, in random order; none is of a sample that this direction is tuned with or
        evaluated on.
    turned: rows of the other modality, indexed for the reversed direction. unturned: why there are none, by direction.
    """

    rows: SampledRows
    tuning_queries: Float32[Array, "Q D"]
    eval_queries: dict[str, Float32[Array, "P D"]]
    link_queries: Float32[Array, "L D"]
    turned: dict[str, SampledRows] = field(default_factory=dict)
    unturned: dict[str, str] = field(default_factory=dict)

    @property
    def target_direction(self) -> str:
        """The direction of the target."""
        return next(iter(self.eval_queries))

    @property
    def held_out(self) -> Float32[Array, "P D"]:
        """The rows held out of the index."""
        return next(reversed(self.eval_queries.values()))


def sample_queries(
    source: Embeddings,
    others: Sequence[Embeddings],
    *,
    max_rows: int,
    max_queries: int,
    seed: int,
    min_reversed_rows: int = MIN_REVERSED_ROWS,
) -> TuningSample:
    """A random sample of the rows, some of them held out as queries, and the queries of each other folder in halves.

    The target is about the first of the other folders; without any, about the held-out rows. A folder of the other
    modality is measured in the reversed direction too, if it has at least `min_reversed_rows`.

    Raises:
        UsageError: queries of another model or dimension, or too few rows or queries to hold any out.
    """
    generator = np.random.default_rng(seed)
    # shuffled, so that any first part of the sample is a random one
    sample = generator.permutation(source.sample(max_rows, seed=seed))
    num_held_out = min(max_queries, int(len(sample) * _HELD_OUT_SHARE))
    if num_held_out < 2:
        raise UsageError(f"{len(sample)} rows are too few to autotune; use the index type flat, which is exact.")
    held_out = sample[:num_held_out]
    rows = SampledRows(sample[num_held_out:])
    own_direction = f"{source.space.modality}→{source.space.modality}"
    # without other queries the held-out rows serve for both, in halves that share none
    if not others:
        return TuningSample(
            rows=rows,
            tuning_queries=held_out[::2],
            eval_queries={own_direction: held_out[1::2]},
            link_queries=held_out[:0],
        )

    eval_queries: dict[str, Float32[Array, "P D"]] = {}
    splits: list[_QuerySplit] = []
    max_links = min(_MAX_LINK_QUERIES, int(_LINK_QUERIES_PER_ROW * len(source)))
    for other in others:
        _check_space(source, other)
        split = _split_queries(other, max_queries, generator, max_links=0 if splits else max_links)
        direction = f"{other.space.modality}→{source.space.modality}"
        eval_queries[f"other {own_direction}" if direction == own_direction else direction] = split.evaluation
        splits.append(split)
    turned, unturned = _reversed(source, others, min_rows=min_reversed_rows, seed=seed)
    return TuningSample(
        rows=rows,
        tuning_queries=splits[0].tuning,
        eval_queries=eval_queries | {own_direction: held_out},
        link_queries=splits[0].linking,
        turned=turned,
        unturned=unturned,
    )


def _reversed(
    source: Embeddings, others: Sequence[Embeddings], *, min_rows: int, seed: int
) -> tuple[dict[str, SampledRows], dict[str, str]]:
    """Rows to index for each reversed direction, and why a direction has none."""
    turned: dict[str, SampledRows] = {}
    unturned: dict[str, str] = {}
    for other in others:
        direction = f"{source.space.modality}→{other.space.modality}"
        # within one modality both directions are the same
        if other.space.modality == source.space.modality:
            continue
        if len(other) < min_rows:
            unturned[direction] = f"{len(other):,} {other.space.modality}s are too few, {min_rows:,} are needed"
        else:
            turned[direction] = SampledRows(other.sample(_MAX_REVERSED_ROWS, seed=seed))
    return turned, unturned


@dataclass(frozen=True, kw_only=True)
class _QuerySplit:
    """Queries in three sets that share no sample."""

    tuning: Float32[Array, "Q D"]
    evaluation: Float32[Array, "P D"]
    linking: Float32[Array, "L D"]


def _split_queries(queries: Embeddings, count: int, generator: np.random.Generator, *, max_links: int) -> _QuerySplit:
    """At most `count` queries to tune with and to evaluate on, and up to `max_links` of what is left."""
    sample_numbers: dict[tuple[str, int], int] = {}
    sample_of_row = np.empty(len(queries), np.int64)
    for row, origin in enumerate(queries.origins()):
        sample_of_row[row] = sample_numbers.setdefault((origin.shard, origin.number), len(sample_numbers))
    # captions of one image are near each other: in both halves they would leak from tuning into evaluation
    half_of_sample = generator.permutation(len(sample_numbers)) % 2
    halves: list[Int64[Array, " _"]] = []
    for half in (0, 1):
        rows = np.flatnonzero(half_of_sample[sample_of_row] == half)
        if not len(rows):
            raise UsageError(
                f"{queries.folder} has {queries.space.modality}s of {len(sample_numbers)} sample; the autotuner needs "
                "at least two."
            )
        halves.append(np.sort(generator.permutation(rows)[: max(1, count)]))
    is_used = np.zeros(len(sample_numbers), bool)
    is_used[sample_of_row[np.concatenate(halves)]] = True
    # by a generator of its own, so that other queries are drawn as without links
    (linking,) = generator.spawn(1)
    left = linking.permutation(np.flatnonzero(~is_used[sample_of_row]))[:max_links]
    tuning, evaluation = map(queries.take, halves)
    # read in the order of the file, then shuffled again
    return _QuerySplit(tuning=tuning, evaluation=evaluation, linking=linking.permutation(queries.take(np.sort(left))))


def _check_space(source: Embeddings, queries: Embeddings) -> None:
    if queries.space.fingerprint != source.space.fingerprint:
        raise UsageError(
            f"{queries.folder} was embedded by {queries.space.model} (fingerprint {queries.space.fingerprint}), "
            f"{source.folder} by {source.space.model} (fingerprint {source.space.fingerprint}); "
            "embed both with one model."
        )
    if queries.dimension != source.dimension:
        raise UsageError(f"{queries.folder} has {queries.dimension} dimensions, {source.folder} {source.dimension}.")
