"""One kind tried on the sample: built, tuned with one half of the questions, judged by the other, timed.

What an index shall promise.

How much effort, and how much re-ranking, a recall needs.

The kinds a plan tries, the cheapest to build first.

The other way round: rows of the questions' modality, asked with rows held out of the index.

How quick the kinds are that may win: asked in turn, and carried on to all rows.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, log, sqrt
from statistics import median
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm.errors import UsageError
from vlm.index.ann.faiss_search import effort_limit, num_candidates, rerank, search_parameters
from vlm.index.ann.index_type import TuningParams, load_faiss
from vlm.index.ann.index_types import INDEX_TYPES, MAX_EF, MIN_LISTS, MIN_ROWS_PER_LIST
from vlm.index.autotune.query_sampling import SHOWN, QuerySet, SampledRows, lower_bound, per_query_recall
from vlm.tensors import Array, Float, Float32

_UNITS = {"": 1} | {
    name: base**power
    for power, letter in enumerate("KMGT", start=1)
    for base, name in ((1000, f"{letter}B"), (1024, f"{letter}IB"))
}


@dataclass(frozen=True, kw_only=True)
class TuningTarget:
    """Recall, and what it may cost; None is no limit.

    recall: share of the `at` nearest rows that a search finds, on average over questions.
    latency_ms: of one question alone on one thread, that 95 of 100 questions keep.
    memory_bytes: what the FAISS index of all rows may hold; the float16 rows mapped from disk are not counted.

    Raises:
        UsageError: a number that cannot be.
    """

    recall: float = 0.95
    at: int = 10
    latency_ms: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise UsageError(f"recall = {self.recall} does not fit: more than 0 and at most 1 can be promised.")
        if self.at < 1:
            raise UsageError(f"at = {self.at} does not fit: recall is counted among at least one answer.")
        for name, value in (("latency-ms", self.latency_ms), ("memory", self.memory_bytes)):
            if value is not None and value <= 0:
                raise UsageError(f"{name} = {value} does not fit: it must be more than 0.")

    def describe(self) -> str:
        """The promise, as one says it.

        >>> TuningTarget(recall=0.9, latency_ms=5, memory_bytes=2_000_000_000).describe()
        'recall@10 of 0.9 within 5 ms and 2 GB'
        """
        limits = [] if self.latency_ms is None else [f"{self.latency_ms:g} ms"]
        limits += [] if self.memory_bytes is None else [format_bytes(self.memory_bytes)]
        return f"recall@{self.at} of {self.recall:g}" + (f" within {' and '.join(limits)}" if limits else "")


def parse_bytes(text: str) -> int:
    """A size with its unit: GB is 10^9 bytes, GiB is 2^30.

    >>> parse_bytes("1.5 GB"), parse_bytes("2GiB"), parse_bytes("4096")
    (1500000000, 2147483648, 4096)

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write it like 4GB, 512MiB or 1000000.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


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


# the factors of re-ranking that are tried
_FACTORS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class SearchParams:
    """What a search may be told after the build. effort: nprobe or ef_search; rerank: see `Prepared`."""

    effort: int | None
    rerank: int

    def less(self) -> "SearchParams | None":
        """With a ninth less effort; None if there is none to spare.

        >>> SearchParams(effort=90, rerank=2).less()
        SearchParams(effort=80, rerank=2)
        """
        return replace(self, effort=self.effort * 8 // 9) if self.effort is not None and self.effort > 1 else None

    def more(self, max_effort: int | None) -> "SearchParams | None":
        """With an eighth more effort; where there is no more, with twice the re-ranking; None at the end of both.

        >>> SearchParams(effort=80, rerank=2).more(100), SearchParams(effort=100, rerank=2).more(100)
        (SearchParams(effort=90, rerank=2), SearchParams(effort=100, rerank=4))
        """
        if self.effort is not None and max_effort is not None and self.effort < max_effort:
            return replace(self, effort=min(max_effort, self.effort + ceil(self.effort / 8)))
        return replace(self, rerank=2 * self.rerank) if 0 < self.rerank < _FACTORS[-1] else None


def min_effort(reaches_target: Callable[[int], bool], max_effort: int) -> int | None:
    """The least effort in 1 … most that reaches the goal, if more effort never reaches less; None if not even `most`.

    Doubles until it does, then halves the interval, so that most trials are cheap.

    >>> min_effort(lambda effort: effort >= 37, 1000)
    37
    """
    missed, effort = 0, 1
    while not reaches_target(effort):
        if effort == max_effort:
            return None
        missed, effort = effort, min(2 * effort, max_effort)
    while effort - missed > 1:
        middle = (effort + missed) // 2
        missed, effort = (missed, middle) if reaches_target(middle) else (middle, effort)
    return effort


def candidate_params(
    reaches_target: Callable[[SearchParams], bool], *, max_effort: int | None, is_reranked: bool
) -> Iterator[SearchParams]:
    """Settings that reach the goal: each with the least effort for its factor of re-ranking.

    Of the factors those are tried that suffice when every row is read: the least, and twice it, which may need so much
    less effort that it is quicker. Nothing comes if the goal cannot be reached. What has neither effort nor re-ranking
    is exact, and not asked.
    """
    factors: tuple[int, ...] = (0,)
    if is_reranked:
        enough = next(
            (factor for factor in _FACTORS if reaches_target(SearchParams(effort=max_effort, rerank=factor))), None
        )
        factors = () if enough is None else (enough,) if max_effort is None else (enough, 2 * enough)
    for factor in factors:
        if max_effort is None:
            yield SearchParams(effort=None, rerank=factor)
            continue
        effort = min_effort(
            lambda effort, factor=factor: reaches_target(SearchParams(effort=effort, rerank=factor)), max_effort
        )
        if effort is not None:
            yield SearchParams(effort=effort, rerank=factor)


def minimize_params(
    start: SearchParams, meets_target: Callable[[SearchParams], bool], *, max_effort: int | None
) -> SearchParams | None:
    """From a setting that holds or nearly does, to nearly the least that holds; None if none above does.

    >>> minimize_params(SearchParams(effort=50, rerank=0), lambda params: (params.effort or 0) >= 60, max_effort=1000)
    SearchParams(effort=60, rerank=0)
    >>> meets = lambda params: params.rerank == 2 and params.effort >= 30
    >>> minimize_params(SearchParams(effort=50, rerank=1), meets, max_effort=1000)
    SearchParams(effort=30, rerank=2)
    """
    search_params = start
    if meets_target(search_params):
        while (less := search_params.less()) is not None and meets_target(less):
            search_params = less
        return _bisect_effort(search_params, (less and less.effort) or 0, meets_target)
    while (more := search_params.more(max_effort)) is not None:
        if meets_target(more):  # with more re-ranking, anything may be enough
            return _bisect_effort(
                more, (search_params.effort or 0) if more.rerank == search_params.rerank else 0, meets_target
            )
        search_params = more
    return None


def _bisect_effort(
    search_params: SearchParams, missing: int, meets_target: Callable[[SearchParams], bool]
) -> SearchParams:
    """A setting that holds, with an effort at most a fiftieth above one that does not, as `missing` does not."""
    while search_params.effort is not None and search_params.effort - missing > max(1, search_params.effort // 50):
        middle = replace(search_params, effort=(search_params.effort + missing) // 2)
        if meets_target(middle):
            search_params = middle
        else:
            missing = middle.effort or 0
    return search_params


def extrapolate_power_law(small: tuple[int, int], large: tuple[int, int], rows: int) -> int:
    """A number measured at two sizes, as (rows, number), carried on to more rows by the power of the size they show.

    The power is held between 0 and 1: no effort falls as rows are added, and none need outgrow them.

    >>> extrapolate_power_law((10_000, 10), (40_000, 20), 160_000)
    40
    """
    (few, less), (many, more) = small, large
    power = min(max(log(more / less) / log(many / few), 0.0), 1.0) if many > few else 0.0
    return ceil(more * (rows / many) ** power - 1e-9)


@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """A kind, and how many times √N lists it shall have; None leaves it to the kind, or it has none."""

    kind: str
    nlist_per_sqrt_rows: int | None = None

    def tuning_params(
        self, rows: int, *, seed: int, effort: str | None = None, search_params: SearchParams | None = None
    ) -> TuningParams:
        """What to ask of the kind for so many rows. effort: the parameter that the setting's effort is for."""
        numbers: dict[str, int] = {}
        if self.nlist_per_sqrt_rows and rows >= MIN_LISTS * MIN_ROWS_PER_LIST:
            numbers["nlist"] = max(
                MIN_LISTS, min(round(self.nlist_per_sqrt_rows * sqrt(rows)), rows // MIN_ROWS_PER_LIST)
            )
        if search_params and effort and search_params.effort is not None:
            max_effort = numbers.get("nlist", search_params.effort)
            numbers[effort] = min(search_params.effort, max_effort)
        if search_params and search_params.rerank:
            numbers["rerank"] = search_params.rerank
        return TuningParams(seed=seed, **numbers)


# k-means takes time with the square of its lists: few lists first, and of many only one kind
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


_WARM_UP = 10
# a percentile of 99 wants hundreds of questions, a slow kind must not take minutes for them
_TIMED_QUERIES, _TIMED_SECONDS = 1000, 3.0
# a setting is looked for, and the curve drawn, with few
_FEW_QUERIES = 100
_CURVE_FACTORS = (0.125, 0.25, 0.5, 1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Of one question at a time on one thread, in milliseconds; per_second: questions answered so in a second."""

    p50_ms: float
    p95_ms: float
    p99_ms: float
    per_second: float

    def scaled(self, ratio: float) -> "Latency":
        """Of an index in which a question does `ratio` times as much."""
        return Latency(
            p50_ms=self.p50_ms * ratio,
            p95_ms=self.p95_ms * ratio,
            p99_ms=self.p99_ms * ratio,
            per_second=self.per_second / ratio,
        )


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One point of a kind's recall-latency curve."""

    effort: int
    recall: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class ReversedResult:
    """What a kind gives when its index is turned round, with the effort that was found for the index to be built.

    rows: indexed. recall: by number of answers. latency: as measured, of these rows.
    """

    rows: int
    recall: dict[int, float]
    latency: Latency


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured of one kind.

    wishes: what to ask of the kind for all rows. parameters: what it will then have.
    recall: by direction and number of answers; `bound`: what the promised one is at least, with 95% confidence.
    measured: on the sample. latency: expected of all rows (`race.growth`). resident_bytes: of all rows, by the kind's
        formula.
    build_seconds: of the sample. mapped_bytes: of the float16 rows it re-ranks from.
    curve: recall and median latency around the setting. misses: what the promise asks and this does not keep.
    turned: the other way round, by direction.
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
        """The kind, with its lists where it has them.

        A plan may try one kind with few lists and with many.
        """
        return f"{self.kind} {self.parameters['nlist']}" if "nlist" in self.parameters else self.kind


class TrialIndex:
    """A kind filled with rows in memory, asked with any setting."""

    def __init__(self, candidate: CandidateConfig, rows: SampledRows, *, seed: int) -> None:
        began = time.perf_counter()
        self.kind, self.candidate, self.rows, self.seed = INDEX_TYPES[candidate.kind], candidate, rows, seed
        prepared = self.kind(rows, candidate.tuning_params(len(rows), seed=seed))
        self.index: Any = prepared.index
        self.index.add(rows.vectors)
        self.build_seconds = time.perf_counter() - began
        self.parameters, self.is_reranked = prepared.parameters, prepared.rerank > 0

    @property
    def max_effort(self) -> int | None:
        """The most effort worth trying."""
        max_effort = effort_limit(self.index)
        return min(max_effort, MAX_EF) if max_effort and self.kind.effort == "ef_search" else max_effort

    def searcher(self, search_params: SearchParams, top: int) -> "Searcher":
        """Searches with this setting."""
        return Searcher(self, search_params, top)

    def tune(self, questions: QuerySet, target: TuningTarget) -> SearchParams | None:
        """The quickest setting whose recall, by the bound of its mean, keeps the promise; None if none does.

        It is looked for with few questions, and then settled with all.
        """
        at = target.at

        def reaches_target(search_params: SearchParams) -> bool:
            return float(self._per_query_recall(search_params, questions, at, few=True).mean()) >= target.recall

        def meets_target(search_params: SearchParams) -> bool:
            return lower_bound(self._per_query_recall(search_params, questions, at), seed=self.seed) >= target.recall

        found = list(candidate_params(reaches_target, max_effort=self.max_effort, is_reranked=self.is_reranked))
        if self.max_effort or self.is_reranked:
            settled_ones = (
                minimize_params(search_params, meets_target, max_effort=self.max_effort) for search_params in found
            )
            found = [search_params for search_params in settled_ones if search_params is not None]
        if len(found) < 2:
            return found[0] if found else None
        some = questions.vectors[:_FEW_QUERIES]
        return min(found, key=lambda search_params: self.time(search_params, some, at).p50_ms)

    def time(self, search_params: SearchParams, vectors: Float32[Array, "Q D"], top: int) -> Latency:
        """Ask one question after the other on one thread, for three seconds at most."""
        searcher, seconds = self.searcher(search_params, top), []
        with one_thread():
            for vector in vectors[:_WARM_UP]:
                searcher.scores(vector[None])
            began = time.perf_counter()
            for vector in vectors[:_TIMED_QUERIES]:
                before = time.perf_counter()
                searcher.scores(vector[None])
                seconds.append(time.perf_counter() - before)
                if time.perf_counter() - began > _TIMED_SECONDS:
                    break
        p50, p95, p99 = (float(value) * 1000 for value in np.percentile(seconds, (50, 95, 99)))
        return Latency(p50_ms=p50, p95_ms=p95, p99_ms=p99, per_second=len(seconds) / sum(seconds))

    def curve(self, search_params: SearchParams, questions: QuerySet, at: int) -> tuple[CurvePoint, ...]:
        """Recall and median latency with less effort and with more; none for a kind that has no effort."""
        if search_params.effort is None or self.max_effort is None:
            return ()
        points = []
        for effort in sorted(
            {min(max(1, round(search_params.effort * factor)), self.max_effort) for factor in _CURVE_FACTORS}
        ):
            tried = SearchParams(effort=effort, rerank=search_params.rerank)
            recall = float(self._per_query_recall(tried, questions, at, few=True).mean())
            timed = self.time(tried, questions.vectors[:_FEW_QUERIES], at)
            points.append(CurvePoint(effort=effort, recall=recall, ms=timed.p50_ms))
        return tuple(points)

    def evaluate(
        self, search_params: SearchParams, query_sets: list[QuerySet], at: int
    ) -> dict[str, dict[int, Float[Array, " Q"]]]:
        """Recall of each question, by direction and number of answers."""
        recalls: dict[str, dict[int, Float[Array, " Q"]]] = {}
        for questions in query_sets:
            counts = sorted({*SHOWN, at})
            # a search for more answers reads more of a graph and re-ranks more, so each number is asked for apart
            asked = counts if search_params.rerank or self.kind.effort == "ef_search" else counts[-1:]
            found = {count: self.searcher(search_params, count).scores(questions.vectors) for count in asked}
            recalls[questions.direction] = {
                count: per_query_recall(found.get(count, found[counts[-1]]), questions.scores, count)
                for count in counts
            }
        return recalls

    def _per_query_recall(
        self, search_params: SearchParams, questions: QuerySet, at: int, *, few: bool = False
    ) -> Float[Array, " Q"]:
        some = slice(_FEW_QUERIES if few else None)
        found = self.searcher(search_params, at).scores(questions.vectors[some])
        return per_query_recall(found, questions.scores[some], at)


class Searcher:
    """Searches with one setting, whose FAISS parameters are made once."""

    def __init__(self, built: TrialIndex, search_params: SearchParams, top: int) -> None:
        self._index, self._stored, self._setting = built.index, built.rows.stored, search_params
        self._top = min(top, len(built.rows))
        self._parameters = search_parameters(built.index, effort=search_params.effort)

    def scores(self, queries: Float32[Array, "Q D"]) -> Float32[Array, "Q K"]:
        """Exact cosines of the rows found, best first, -inf for what was not found."""
        wanted = min(num_candidates(self._top, self._setting.rerank), len(self._stored))
        scores, positions = self._index.search(queries, wanted, params=self._parameters)
        if self._setting.rerank:
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


def tuning_values(candidate: CandidateConfig, rows: int, search_params: SearchParams, *, seed: int) -> dict[str, int]:
    """What to ask of the kind for so many rows, without what is left to it."""
    tuning = candidate.tuning_params(
        rows, seed=seed, effort=INDEX_TYPES[candidate.kind].effort, search_params=search_params
    )
    return {name: value for name, value in asdict(tuning).items() if value is not None}


def measure_reversed(
    candidate: CandidateConfig,
    search_params: SearchParams,
    rows: SampledRows,
    questions: QuerySet,
    at: int,
    *,
    seed: int,
) -> ReversedResult | None:
    """Build and ask; None if the kind needs more rows."""
    try:
        built = TrialIndex(candidate, rows, seed=seed)
    except UsageError:
        return None
    effort = (
        None
        if search_params.effort is None or built.max_effort is None
        else min(search_params.effort, built.max_effort)
    )
    tried = SearchParams(effort=effort, rerank=search_params.rerank if built.is_reranked else 0)
    recalls = built.evaluate(tried, [questions], at)[questions.direction]
    return ReversedResult(
        rows=len(rows),
        recall={count: float(each.mean()) for count, each in recalls.items()},
        latency=built.time(tried, questions.vectors, at),
    )


# a machine changes its pace within seconds; a round of all contenders takes a tenth of one each
_ROUNDS, _QUERIES_PER_ROUND = 10, 200
# slower ones do not become the quickest by being asked again
_CONTENDER_RATIO = 1.5


@dataclass(frozen=True, kw_only=True)
class TunedIndex:
    """A filled index with the setting it is asked with; work: distances a question computes in it (`Kind.work`)."""

    built: TrialIndex
    search_params: SearchParams
    num_distances: float

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> Latency:
        """As `Built.time`."""
        return self.built.time(self.search_params, vectors, top)


@runtime_checkable
class Timeable(Protocol):
    """What can be timed again."""

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> tuple[Latency, Latency]:
        """Latency as measured on the sample, and as expected of all rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class LatencyProbe:
    """What tells how quick a kind is.

    fewer: the same kind with a part of the sample; None: latency is carried on by the work alone. work: of a question
        to all rows.
    """

    full: TunedIndex
    subsample: TunedIndex | None
    num_distances: float

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> tuple[Latency, Latency]:
        """As `Timed.time`."""
        measured = self.full.time(vectors, top)
        smaller = (self.subsample.num_distances, self.subsample.time(vectors, top).p50_ms) if self.subsample else None
        return measured, measured.scaled(
            latency_growth((self.full.num_distances, measured.p50_ms), smaller, self.num_distances)
        )


def latency_growth(full: tuple[float, float], subsample: tuple[float, float] | None, num_distances: float) -> float:
    """How many times longer a question takes with more work, by the line through two measurements of (work, time).

    What a question takes whatever its work is not carried on; but neither does a line fall, nor rise more steeply than
    in proportion. Of one measurement it is the proportion.

    >>> latency_growth((100, 3.0), (50, 2.0), 400), latency_growth((100, 3.0), None, 400)
    (3.0, 4.0)
    """
    (done, time), steepest = full, full[1] / full[0]
    slope = (time - subsample[1]) / (done - subsample[0]) if subsample and done > subsample[0] else steepest
    return 1 + min(max(slope, 0.0), steepest) * (num_distances - done) / time


def contenders(trials: Sequence[Trial]) -> set[int]:
    """The places of those that keep the promise and may be the quickest of all, timed again."""
    meeting = {place: trial.latency.p50_ms for place, trial in enumerate(trials) if not trial.misses}
    limit = min(meeting.values(), default=0.0) * _CONTENDER_RATIO
    return {place for place, p50_ms in meeting.items() if p50_ms <= limit}


def time_head_to_head(
    probes: Mapping[int, Timeable], vectors: Float32[Array, "Q D"], top: int
) -> dict[int, tuple[Latency, Latency]]:
    """Each timed again, in turn with the others; the medians of what they take, by place."""
    times: dict[int, list[tuple[Latency, Latency]]] = {place: [] for place in probes}
    for _ in range(_ROUNDS):
        for place, probe in probes.items():
            times[place].append(probe.time(vectors[:_QUERIES_PER_ROUND], top))
    return {
        place: (_median([measured for measured, _ in found]), _median([expected for _, expected in found]))
        for place, found in times.items()
    }


def _median(times: Sequence[Latency]) -> Latency:
    return Latency(
        p50_ms=median(time.p50_ms for time in times),
        p95_ms=median(time.p95_ms for time in times),
        p99_ms=median(time.p99_ms for time in times),
        per_second=median(time.per_second for time in times),
    )
