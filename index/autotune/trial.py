"""A trial of the autotuner: one candidate configuration built on the sample, tuned, evaluated and timed.

A trial has a target to meet (`TuningTarget`) and a configuration to build (`CandidateConfig`: index type and number of
lists). `TrialIndex.tune` finds the search parameters (`SearchParams`: nprobe or efSearch, and the reranking factor)
with the least latency that reach the target's recall on one half of the queries; the other half evaluates them. The
fastest trials are timed again head to head, because a machine changes its pace between trials.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from operator import attrgetter
from statistics import median
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from vlm.errors import UsageError
from vlm.index.ann.faiss_search import (
    effort_limit,
    load_faiss,
    make_search_function,
    num_candidates,
    rerank,
    search_parameters,
)
from vlm.index.ann.graph_links import link_answers
from vlm.index.ann.index_types import INDEX_TYPES, MAX_EF, MIN_LISTS, MIN_ROWS_PER_LIST, TuningParams, fill_index
from vlm.index.autotune.query_sampling import SHOWN, QuerySet, SampledRows, lower_bound, mean_recalls, per_query_recall
from vlm.index.autotune.search_params import SearchParams, candidate_params, minimize_params
from vlm.tensor_types import Array, Float, Float32

Preference = Literal["balanced", "speed", "memory"]


@dataclass(frozen=True, kw_only=True)
class TuningTarget:
    """The recall an index must reach, and its limits; None is no limit.

    recall: share of the `at` nearest rows that a search finds, on average over queries.
    latency_ms: of a single query on one thread, met by 95 of 100 queries (p95).
    memory_bytes: of the FAISS index of all rows; the float16 rows mapped from disk are not counted.
    prefer: which of the trials that meet it is taken: speed, the fastest; memory, the smallest; balanced, the smallest
        of those about as fast as the fastest.

    Raises:
        UsageError: a number is out of range.
    """

    recall: float = 0.95
    at: int = 10
    latency_ms: float | None = None
    memory_bytes: int | None = None
    prefer: Preference = "balanced"

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise UsageError(f"recall = {self.recall} is out of range: it must be above 0 and at most 1.")
        if self.at < 1:
            raise UsageError(f"at = {self.at} is out of range: recall needs at least one result.")
        for name, value in (("latency-ms", self.latency_ms), ("memory", self.memory_bytes)):
            if value is not None and value <= 0:
                raise UsageError(f"{name} = {value} is out of range: it must be above 0.")

    def describe(self) -> str:
        """The target in words.

        >>> TuningTarget(recall=0.9, latency_ms=5, memory_bytes=2_000_000_000).describe()
        'recall@10 of 90% within 5 ms and 2 GB'
        """
        limits = []
        if self.latency_ms is not None:
            limits.append(f"{self.latency_ms:g} ms")
        if self.memory_bytes is not None:
            limits.append(format_bytes(self.memory_bytes))
        return f"recall@{self.at} of {100 * self.recall:g}%" + (f" within {' and '.join(limits)}" if limits else "")


_BYTE_UNITS = {"": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _BYTE_UNITS[f"{_letter}B"] = 1000**_power
    _BYTE_UNITS[f"{_letter}IB"] = 1024**_power


def parse_bytes(text: str) -> int:
    """A size with its unit: GB is 10^9 bytes, GiB is 2^30.

    >>> parse_bytes("1.5 GB"), parse_bytes("2GiB"), parse_bytes("4096")
    (1500000000, 2147483648, 4096)

    Raises:
        UsageError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _BYTE_UNITS:
        raise UsageError(f"{text!r} is not a size; write it like 4GB, 512MiB or 1000000.")
    return round(float(match[1]) * _BYTE_UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    """A size for people, in powers of ten.

    >>> format_bytes(1_234_567_890)
    '1.23 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """An index type and its number of lists as a multiple of √N; None: the type's own rule, or it has no lists."""

    kind: str
    nlist_per_sqrt_rows: int | None = None

    def tuning_params(
        self, rows: int, *, seed: int, effort: str | None = None, search_params: SearchParams | None = None
    ) -> TuningParams:
        """Parameters of an index of so many rows. effort: name of the parameter that `search_params.effort` sets."""
        numbers: dict[str, int] = {}
        if self.nlist_per_sqrt_rows and rows >= MIN_LISTS * MIN_ROWS_PER_LIST:
            nlist = min(round(self.nlist_per_sqrt_rows * sqrt(rows)), rows // MIN_ROWS_PER_LIST)
            numbers["nlist"] = max(MIN_LISTS, nlist)
        if search_params and effort and search_params.effort is not None:
            # no search reads more lists than there are
            max_effort = numbers.get("nlist", search_params.effort)
            numbers[effort] = min(search_params.effort, max_effort)
        if search_params and search_params.rerank:
            numbers["rerank"] = search_params.rerank
        return TuningParams(seed=seed, **numbers)


# the cheapest to build first; k-means takes time with the square of nlist, so only one type is tried with many lists
CANDIDATE_CONFIGS = (
    CandidateConfig(kind="flat"),
    CandidateConfig(kind="sq8"),
    CandidateConfig(kind="ivf", nlist_per_sqrt_rows=1),
    CandidateConfig(kind="ivfsq", nlist_per_sqrt_rows=1),
    CandidateConfig(kind="rabitq", nlist_per_sqrt_rows=2),
    CandidateConfig(kind="ivfpq", nlist_per_sqrt_rows=2),
    CandidateConfig(kind="ivf", nlist_per_sqrt_rows=4),
    CandidateConfig(kind="hnsw"),
)


def tuning_values(candidate: CandidateConfig, rows: int, search_params: SearchParams, *, seed: int) -> dict[str, int]:
    """The parameters of an index of so many rows that are set, not left to the type's own rule."""
    effort = INDEX_TYPES[candidate.kind].effort
    return candidate.tuning_params(rows, seed=seed, effort=effort, search_params=search_params).set_values()


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Latency of single queries on one thread, in milliseconds; per_second: queries a second at that."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_second: float

    def scaled(self, ratio: float) -> "Latency":
        """Of an index in which a query takes `ratio` times as long."""
        return Latency(
            p50_ms=self.p50_ms * ratio,
            p95_ms=self.p95_ms * ratio,
            p99_ms=self.p99_ms * ratio,
            per_second=self.per_second / ratio,
        )


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One point of a recall-latency curve."""

    effort: int
    recall: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class ReversedResult:
    """A configuration measured in the reversed direction, with the search parameters of the index to be built.

    rows: indexed. recall: by number of results. latency: as measured on these rows.
    """

    rows: int
    recall: dict[int, float]
    latency: Latency


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured of one candidate configuration; kept in the manifest of the index.

    wishes: the parameters to build the index of all rows with. parameters: all that it will then have.
    recall: by direction and number of results. bound: lower bound of the target's recall, with 95% confidence.
    measured: latency on the sample. latency: expected for all rows (`latency_growth`).
    resident_bytes: of all rows, by the index type's formula. mapped_bytes: of the float16 rows it reranks from.
    build_seconds: of the sample. curve: recall and median latency around the search parameters.
    misses: what of the target is not met. turned: the reversed direction, by direction.
    """

    kind: str
    wishes: dict[str, int]
    parameters: dict[str, int]
    recall: dict[str, dict[int, float]]
    bound: float
    measured: Latency
    latency: Latency
    resident_bytes: int
    mapped_bytes: int
    build_seconds: float
    curve: tuple[CurvePoint, ...] = ()
    misses: tuple[str, ...] = ()
    turned: dict[str, ReversedResult] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The index type, with its number of lists where it has any: a type may be tried with few and with many."""
        return f"{self.kind} {self.parameters['nlist']}" if "nlist" in self.parameters else self.kind


_WARM_UP_QUERIES = 10
# p99 needs hundreds of queries; a slow configuration must not take minutes for them
_MAX_TIMED_QUERIES = 1000
_MAX_TIMED_SECONDS = 3.0
# search parameters are looked for, and the curve measured, with few queries
_FEW_QUERIES = 100
_CURVE_FACTORS = (0.125, 0.25, 0.5, 1, 2, 4)


class TrialIndex:
    """A candidate configuration filled with the sampled rows in memory, searched with any parameters.

    link_queries: whose answers a graph links (`graph_links.link_answers`).
    """

    def __init__(
        self,
        candidate: CandidateConfig,
        rows: SampledRows,
        *,
        seed: int,
        link_queries: Float32[Array, "L D"] | None = None,
    ) -> None:
        started = time.perf_counter()
        self.kind = INDEX_TYPES[candidate.kind]
        self.candidate = candidate
        self.rows = rows
        self.seed = seed
        # search parameters are not set yet: every search brings its own
        prepared = self.kind(rows, candidate.tuning_params(len(rows), seed=seed))
        self.index: Any = prepared.index
        # on the CPU even where there is a GPU: latencies are to be those of searches, which run there
        for _ in fill_index(self.index, lambda: [rows.vectors], len(rows), None):
            pass
        if link_queries is not None and self.kind.is_graph:
            link_answers(self.index, link_queries)
        self.search = make_search_function(self.index)
        self.build_seconds = time.perf_counter() - started
        self.parameters = prepared.parameters
        self.is_reranked = prepared.rerank > 0

    @property
    def max_effort(self) -> int | None:
        """The highest effort worth trying."""
        # a graph with more candidates than this is slower than an exact search
        limit = effort_limit(self.index)
        return min(limit, MAX_EF) if limit and self.kind.effort == "ef_search" else limit

    def searcher(self, search_params: SearchParams, top: int) -> "Searcher":
        """Searches with these parameters."""
        return Searcher(self, search_params, top)

    def tune(self, queries: QuerySet, target: TuningTarget) -> SearchParams | None:
        """The fastest parameters whose recall, by its lower bound, meets the target; None if none do.

        They are looked for by the mean recall of few queries, then adjusted until the bound over all of them holds.
        """
        at = target.at

        def reaches_target(search_params: SearchParams) -> bool:
            return float(self._per_query_recall(search_params, queries, at, few=True).mean()) >= target.recall

        def meets_target(search_params: SearchParams) -> bool:
            return lower_bound(self._per_query_recall(search_params, queries, at), seed=self.seed) >= target.recall

        # first by few queries, whose mean is near enough to tell where to look
        options = list(candidate_params(reaches_target, max_effort=self.max_effort, is_reranked=self.is_reranked))
        if self.max_effort or self.is_reranked:
            adjusted = []
            for params in options:
                minimized = minimize_params(params, meets_target, max_effort=self.max_effort)
                if minimized is not None:
                    adjusted.append(minimized)
            options = adjusted
        if len(options) < 2:
            return options[0] if options else None
        # less effort with more reranking or the reverse: only the clock can tell
        few_vectors = queries.vectors[:_FEW_QUERIES]
        return min(options, key=lambda search_params: self.time(search_params, few_vectors, at).p50_ms)

    def time(self, search_params: SearchParams, vectors: Float32[Array, "Q D"], top: int) -> Latency:
        """Latency of one query after the other on one thread, for three seconds at most."""
        searcher = self.searcher(search_params, top)
        seconds = []
        # on one thread: the latency of a single query, not the throughput of a batch
        with one_thread():
            for vector in vectors[:_WARM_UP_QUERIES]:
                searcher.scores(vector[None])
            started = time.perf_counter()
            for vector in vectors[:_MAX_TIMED_QUERIES]:
                before = time.perf_counter()
                searcher.scores(vector[None])
                seconds.append(time.perf_counter() - before)
                if time.perf_counter() - started > _MAX_TIMED_SECONDS:
                    break
        p50, p95, p99 = (np.percentile(seconds, (50, 95, 99)) * 1000).tolist()
        return Latency(p50_ms=p50, p95_ms=p95, p99_ms=p99, per_second=len(seconds) / sum(seconds))

    def curve(self, search_params: SearchParams, queries: QuerySet, at: int) -> tuple[CurvePoint, ...]:
        """Recall and median latency with less effort and with more; empty for a type without effort."""
        max_effort = self.max_effort
        if search_params.effort is None or max_effort is None:
            return ()
        # a set, because at either limit several factors give the same effort
        efforts: set[int] = set()
        for factor in _CURVE_FACTORS:
            effort = max(1, round(search_params.effort * factor))
            efforts.add(min(effort, max_effort))
        # the parameters themselves are one of the points
        points = []
        for effort in sorted(efforts):
            params = SearchParams(effort=effort, rerank=search_params.rerank)
            recall = float(self._per_query_recall(params, queries, at, few=True).mean())
            latency = self.time(params, queries.vectors[:_FEW_QUERIES], at)
            points.append(CurvePoint(effort=effort, recall=recall, ms=latency.p50_ms))
        return tuple(points)

    def evaluate(
        self, search_params: SearchParams, query_sets: list[QuerySet], at: int
    ) -> dict[str, dict[int, Float[Array, " Q"]]]:
        """Recall of each query, by direction and number of results."""
        counts = sorted({*SHOWN, at})
        # a search for more results reads more of a graph and reranks more, so each count needs its own search there;
        # elsewhere the first results of the longest search are those of the shorter ones
        needs_own_search = search_params.rerank or self.kind.effort == "ef_search"
        recalls: dict[str, dict[int, Float[Array, " Q"]]] = {}
        for queries in query_sets:
            scores = self.searcher(search_params, counts[-1]).scores(queries.vectors)
            by_count = {}
            for count in counts:
                if needs_own_search and count != counts[-1]:
                    own_scores = self.searcher(search_params, count).scores(queries.vectors)
                else:
                    own_scores = scores
                by_count[count] = per_query_recall(own_scores, queries.scores, count)
            recalls[queries.direction] = by_count
        return recalls

    def _per_query_recall(
        self, search_params: SearchParams, queries: QuerySet, at: int, *, few: bool = False
    ) -> Float[Array, " Q"]:
        used = slice(_FEW_QUERIES if few else None)
        scores = self.searcher(search_params, at).scores(queries.vectors[used])
        return per_query_recall(scores, queries.scores[used], at)


class Searcher:
    """Searches a trial's index with fixed parameters, so that FAISS's parameter object is made once."""

    def __init__(self, built: TrialIndex, search_params: SearchParams, top: int) -> None:
        self._search = built.search
        self._stored = built.rows.stored
        self._search_params = search_params
        self._top = min(top, len(built.rows))
        self._parameters = search_parameters(built.index, effort=search_params.effort)

    def scores(self, queries: Float32[Array, "Q D"]) -> Float32[Array, "Q K"]:
        """Exact cosines of the rows found, best first, -inf where too few were found."""
        factor = self._search_params.rerank
        candidates = min(num_candidates(self._top, factor), len(self._stored))
        scores, positions = self._search(queries, candidates, self._parameters)
        if factor:
            return rerank(self._stored, queries, positions, self._top)[0]
        return np.where(positions < 0, np.float32(-np.inf), scores)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """FAISS computes on one thread within the block."""
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def measure_reversed(
    candidate: CandidateConfig,
    search_params: SearchParams,
    rows: SampledRows,
    queries: QuerySet,
    at: int,
    *,
    seed: int,
    link_queries: Float32[Array, "L D"],
) -> ReversedResult | None:
    """Build and measure a configuration on rows of the queries' modality; None if it needs more rows."""
    try:
        built = TrialIndex(candidate, rows, seed=seed, link_queries=link_queries)
    except UsageError:
        return None
    # the reversed index is smaller, and so may have fewer lists
    effort = None
    if search_params.effort is not None and built.max_effort is not None:
        effort = min(search_params.effort, built.max_effort)
    params = SearchParams(effort=effort, rerank=search_params.rerank if built.is_reranked else 0)
    recalls = built.evaluate(params, [queries], at)[queries.direction]
    return ReversedResult(
        rows=len(rows),
        recall=mean_recalls(recalls),
        latency=built.time(params, queries.vectors, at),
    )


@dataclass(frozen=True, kw_only=True)
class TunedIndex:
    """A filled index with its search parameters; num_distances: computed by a query (`IndexType.num_distances`)."""

    built: TrialIndex
    search_params: SearchParams
    num_distances: float

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> Latency:
        """As `TrialIndex.time`."""
        return self.built.time(self.search_params, vectors, top)


@runtime_checkable
class Timeable(Protocol):
    """What can be timed again."""

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> tuple[Latency, Latency]:
        """Latency as measured on the sample, and as expected for all rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class LatencyProbe:
    """Times a configuration on the sample and extrapolates to all rows.

    subsample: the same configuration with part of the sample; None: latency grows with the distances alone.
    num_distances: computed by a query in the index of all rows.
    """

    full: TunedIndex
    subsample: TunedIndex | None
    num_distances: float

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> tuple[Latency, Latency]:
        """As `Timeable.time`."""
        measured = self.full.time(vectors, top)
        smaller = None
        if self.subsample:
            smaller = (self.subsample.num_distances, self.subsample.time(vectors, top).p50_ms)
        growth = latency_growth((self.full.num_distances, measured.p50_ms), smaller, self.num_distances)
        return measured, measured.scaled(growth)


def latency_growth(full: tuple[float, float], subsample: tuple[float, float] | None, num_distances: float) -> float:
    """The factor on latency at `num_distances`, by the line through two measurements of (distances, latency).

    The line has an offset, the cost of a query that does not depend on the index. It is not let fall, nor rise more
    steeply than in proportion. With one measurement the growth is in proportion.

    >>> latency_growth((100, 3.0), (50, 2.0), 400), latency_growth((100, 3.0), None, 400)
    (3.0, 4.0)
    """
    distances, latency = full
    proportional = latency / distances
    # without a second size the offset is unknown, and proportion is the cautious guess
    slope = proportional
    if subsample is not None:
        fewer_distances, lower_latency = subsample
        # a type may compute as many distances at both sizes; the line through them has no slope then
        if distances > fewer_distances:
            slope = (latency - lower_latency) / (distances - fewer_distances)
    return 1 + min(max(slope, 0.0), proportional) * (num_distances - distances) / latency


# a machine changes its pace within seconds; a round of all contenders takes about a tenth of one each
_ROUNDS = 10
_QUERIES_PER_ROUND = 200
# a slower one does not become the fastest by being timed again
_CONTENDER_RATIO = 1.5


def contenders(trials: Sequence[Trial]) -> set[int]:
    """The numbers of the trials that meet the target and may be the fastest of all, so are timed again."""
    latencies: dict[int, float] = {}
    for number, trial in enumerate(trials):
        if not trial.misses:
            latencies[number] = trial.latency.p50_ms
    limit = min(latencies.values(), default=0.0) * _CONTENDER_RATIO
    return {number for number, p50_ms in latencies.items() if p50_ms <= limit}


def time_head_to_head(
    probes: Mapping[int, Timeable], vectors: Float32[Array, "Q D"], top: int
) -> dict[int, tuple[Latency, Latency]]:
    """Time each again, in turn with the others; the medians of their latencies, by number."""
    # in rounds, so that a slow second of the machine hits all of them alike
    rounds: dict[int, list[tuple[Latency, Latency]]] = {number: [] for number in probes}
    for _ in range(_ROUNDS):
        for number, probe in probes.items():
            rounds[number].append(probe.time(vectors[:_QUERIES_PER_ROUND], top))
    medians = {}
    for number, latencies in rounds.items():
        measured, expected = zip(*latencies, strict=True)
        medians[number] = (_median(measured), _median(expected))
    return medians


def _median(latencies: Sequence[Latency]) -> Latency:
    # each figure by itself: no single round need have the median of all
    medians: dict[str, float] = {}
    for name in ("p50_ms", "p95_ms", "p99_ms", "per_second"):
        medians[name] = median(map(attrgetter(name), latencies))
    return Latency(**medians)
