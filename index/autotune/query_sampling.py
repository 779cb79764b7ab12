"""Recall against exact truth, up to ties, with a bound.

The sample a plan is made on: rows to index, and questions that are not among them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm.errors import UsageError
from vlm.index.embeddings import Embeddings, normalize_rows, open_vectors
from vlm.tensors import Array, Float, Float32, Int64

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


def per_query_recall(found: Float32[Array, "Q C"], truth: Float32[Array, "Q K"], at: int) -> Float[Array, " Q"]:
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
    sample = np.random.default_rng(seed).integers(0, len(recalls), (_RESAMPLES, len(recalls)))
    return float(np.quantile(recalls[sample].mean(axis=1), 1 - confidence))


# of the sample's rows, at most so large a part is kept out of the index to ask with
_HELD_OUT_SHARE = 0.1
# answers whose recall is shown
SHOWN = (1, 10, 100)
# rows of an index turned round: with fewer, 100 answers are more than a tenth of it; more would only take longer
MIN_REVERSED_ROWS, MAX_REVERSED_ROWS = 1000, 20_000


class SampledRows:
    """Rows in memory, in the form a kind asks for them. stored: the same as float16, as an index folder keeps them."""

    def __init__(self, vectors: Float32[Array, "N D"]) -> None:
        self.vectors, self.stored = vectors, vectors.astype(np.float16)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dimension(self) -> int:
        """D."""
        return self.vectors.shape[1]

    def sample(self, count: int, *, seed: int) -> Float32[Array, "N D"]:
        """Distinct rows drawn evenly."""
        return self.vectors[np.sort(np.random.default_rng(seed).permutation(len(self))[:count])]

    def part(self, share: float) -> "SampledRows":
        """The first rows; as the rows are in random order, any of them are as good."""
        return SampledRows(self.vectors[: max(1, round(len(self) * share))])


@dataclass(frozen=True, kw_only=True)
class QuerySet:
    """Questions with the truth about the rows. scores: exact cosines of the nearest rows, best first."""

    direction: str
    vectors: Float32[Array, "Q D"]
    scores: Float32[Array, "Q K"]

    @classmethod
    def with_ground_truth(
        cls, direction: str, vectors: Float32[Array, "Q D"], rows: SampledRows, top: int
    ) -> "QuerySet":
        """The truth by comparing with every row."""
        blocks = (rows.vectors[first : first + 65_536] for first in range(0, len(rows), 65_536))
        return cls(direction=direction, vectors=vectors, scores=exact_scores(blocks, vectors, top))


@dataclass(frozen=True, kw_only=True)
class TuningSample:
    """Rows to index, questions to tune with, and questions of each direction to judge by.

    judge: the first direction is the one the promise is about, whose questions are none of those tuned with; the last
        is that of rows held out.
    turned: rows of the other modality for these rows to ask, by direction. unturned: why there are none, by direction.
    """

    rows: SampledRows
    tuning_queries: Float32[Array, "Q D"]
    eval_queries: dict[str, Float32[Array, "P D"]]
    turned: dict[str, SampledRows] = field(default_factory=dict)
    unturned: dict[str, str] = field(default_factory=dict)

    @property
    def target_direction(self) -> str:
        """The direction the promise is about."""
        return next(iter(self.eval_queries))

    @property
    def held_out(self) -> Float32[Array, "P D"]:
        """Rows that are not in the index."""
        return next(reversed(self.eval_queries.values()))


def sample_queries(
    source: Embeddings, others: Sequence[Embeddings], *, max_rows: int, max_queries: int, seed: int
) -> TuningSample:
    """A random sample of the rows, some of them held out to ask with, and questions of each other folder in two halves.

    All questions of one sample come into the same half. The first folder is tuned with and promised about; without any
    the held-out rows are. A folder of the other modality gives an index turned round too.

    Raises:
        UsageError: questions of another model or dimension, or too few rows or questions to hold any out.
    """
    generator = np.random.default_rng(seed)
    sample = generator.permutation(source.sample(max_rows, seed=seed))
    held = min(max_queries, int(len(sample) * _HELD_OUT_SHARE))
    if held < 2:
        raise UsageError(f"{len(sample)} rows are too few to plan with; name the kind flat, which is exact.")
    own = f"{source.space.modality}→{source.space.modality}"
    asked, rows = sample[:held], SampledRows(sample[held:])
    if not others:
        return TuningSample(rows=rows, tuning_queries=asked[::2], eval_queries={own: asked[1::2]})
    eval_queries: dict[str, Float32[Array, "P D"]] = {}
    tunes: list[Float32[Array, "Q D"]] = []
    for other in others:
        _check_space(source, other)
        tuning_queries, judged = _split_tuning_and_eval(other, max_queries, generator)
        across = f"{other.space.modality}→{source.space.modality}"
        eval_queries[f"other {own}" if across == own else across] = judged
        tunes.append(tuning_queries)
    turned, unturned = _reversed(source, others, seed=seed)
    return TuningSample(
        rows=rows, tuning_queries=tunes[0], eval_queries=eval_queries | {own: asked}, turned=turned, unturned=unturned
    )


def _reversed(
    source: Embeddings, others: Sequence[Embeddings], *, seed: int
) -> tuple[dict[str, SampledRows], dict[str, str]]:
    turned, unturned = {}, {}
    for other in others:
        direction = f"{source.space.modality}→{other.space.modality}"
        if other.space.modality == source.space.modality:
            continue
        if len(other) < MIN_REVERSED_ROWS:
            unturned[direction] = (
                f"{len(other):,} {other.space.modality}s are too few, {MIN_REVERSED_ROWS:,} are needed"
            )
        else:
            turned[direction] = SampledRows(other.sample(MAX_REVERSED_ROWS, seed=seed))
    return turned, unturned


def take_rows(embeddings: Embeddings, numbers: Int64[Array, " N"]) -> Float32[Array, "N D"]:
    """The rows of these numbers, which must ascend."""
    starts = np.cumsum([0, *(part.rows for part in embeddings.parts)])
    cuts = np.searchsorted(numbers, starts)
    taken: list[Float[Array, "N D"]] = [
        open_vectors(embeddings.folder, part)[numbers[low:high] - start]
        for part, start, low, high in zip(embeddings.parts, starts[:-1], cuts[:-1], cuts[1:], strict=True)
    ]
    return normalize_rows(np.concatenate(taken))


def _split_tuning_and_eval(
    asked: Embeddings, count: int, generator: np.random.Generator
) -> tuple[Float32[Array, "Q D"], Float32[Array, "P D"]]:
    places: dict[tuple[str, int], int] = {}
    samples = np.fromiter(
        (places.setdefault((origin.shard, origin.number), len(places)) for origin in asked.origins()),
        np.int64,
        len(asked),
    )
    half_of = generator.permutation(len(places)) % 2
    halves = []
    for half in (0, 1):
        numbers = np.flatnonzero(half_of[samples] == half)
        if not len(numbers):
            raise UsageError(
                f"{asked.folder} has {asked.space.modality}s of {len(places)} sample; "
                "two at least are needed to plan with."
            )
        halves.append(take_rows(asked, np.sort(generator.permutation(numbers)[: max(1, count)])))
    return halves[0], halves[1]


def _check_space(source: Embeddings, asked: Embeddings) -> None:
    if asked.space.fingerprint != source.space.fingerprint:
        raise UsageError(
            f"{asked.folder} was embedded by {asked.space.model} (fingerprint {asked.space.fingerprint}), "
            f"{source.folder} by {source.space.model} (fingerprint {source.space.fingerprint}); "
            "embed both with one model."
        )
    if asked.dimension != source.dimension:
        raise UsageError(f"{asked.folder} has {asked.dimension} dimensions, {source.folder} {source.dimension}.")
