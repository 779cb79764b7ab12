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
from vlm.index.ann.faiss_search import candidates_for, most_effort, rerank, search_parameters
from vlm.index.ann.index_type import Tuning, load_faiss
from vlm.index.ann.index_types import KINDS, MAX_EF, MIN_LISTS, MIN_ROWS_PER_LIST
from vlm.index.autotune.query_sampling import SHOWN, DrawnRows, Questions, lower_bound, recall_of_each
from vlm.tensors import Array, Float, Float32

_UNITS = {"": 1} | {
    name: base**power
    for power, letter in enumerate("KMGT", start=1)
    for base, name in ((1000, f"{letter}B"), (1024, f"{letter}IB"))
}


@dataclass(frozen=True, kw_only=True)
class Promise:
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

    def in_words(self) -> str:
        """The promise, as one says it.

        >>> Promise(recall=0.9, latency_ms=5, memory_bytes=2_000_000_000).in_words()
        'recall@10 of 0.9 within 5 ms and 2 GB'
        """
        limits = [] if self.latency_ms is None else [f"{self.latency_ms:g} ms"]
        limits += [] if self.memory_bytes is None else [show_bytes(self.memory_bytes)]
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


def show_bytes(count: float) -> str:
    """A size for people, in powers of ten.

    >>> show_bytes(1_234_567_890)
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
class Setting:
    """What a search may be told after the build. effort: nprobe or ef_search; rerank: see `Prepared`."""

    effort: int | None
    rerank: int

    def less(self) -> "Setting | None":
        """With a ninth less effort; None if there is none to spare.

        >>> Setting(effort=90, rerank=2).less()
        Setting(effort=80, rerank=2)
        """
        return replace(self, effort=self.effort * 8 // 9) if self.effort is not None and self.effort > 1 else None

    def more(self, most: int | None) -> "Setting | None":
        """With an eighth more effort; where there is no more, with twice the re-ranking; None at the end of both.

        >>> Setting(effort=80, rerank=2).more(100), Setting(effort=100, rerank=2).more(100)
        (Setting(effort=90, rerank=2), Setting(effort=100, rerank=4))
        """
        if self.effort is not None and most is not None and self.effort < most:
            return replace(self, effort=min(most, self.effort + ceil(self.effort / 8)))
        return replace(self, rerank=2 * self.rerank) if 0 < self.rerank < _FACTORS[-1] else None


def least_effort(reaches: Callable[[int], bool], most: int) -> int | None:
    """The least effort in 1 … most that reaches the goal, if more effort never reaches less; None if not even `most`.

    Doubles until it does, then halves the interval, so that most trials are cheap.

    >>> least_effort(lambda effort: effort >= 37, 1000)
    37
    """
    missed, effort = 0, 1
    while not reaches(effort):
        if effort == most:
            return None
        missed, effort = effort, min(2 * effort, most)
    while effort - missed > 1:
        middle = (effort + missed) // 2
        missed, effort = (missed, middle) if reaches(middle) else (middle, effort)
    return effort


def settings_that_reach(
    reaches: Callable[[Setting], bool], *, most: int | None, is_reranked: bool
) -> Iterator[Setting]:
    """Settings that reach the goal: each with the least effort for its factor of re-ranking.

    Of the factors those are tried that suffice when every row is read: the least, and twice it, which may need so much
    less effort that it is quicker. Nothing comes if the goal cannot be reached. What has neither effort nor re-ranking
    is exact, and not asked.
    """
    factors: tuple[int, ...] = (0,)
    if is_reranked:
        enough = next((factor for factor in _FACTORS if reaches(Setting(effort=most, rerank=factor))), None)
        factors = () if enough is None else (enough,) if most is None else (enough, 2 * enough)
    for factor in factors:
        if most is None:
            yield Setting(effort=None, rerank=factor)
            continue
        effort = least_effort(lambda effort, factor=factor: reaches(Setting(effort=effort, rerank=factor)), most)
        if effort is not None:
            yield Setting(effort=effort, rerank=factor)


def settled(start: Setting, holds: Callable[[Setting], bool], *, most: int | None) -> Setting | None:
    """From a setting that holds or nearly does, to nearly the least that holds; None if none above does.

    >>> settled(Setting(effort=50, rerank=0), lambda setting: (setting.effort or 0) >= 60, most=1000)
    Setting(effort=60, rerank=0)
    >>> settled(Setting(effort=50, rerank=1), lambda setting: setting.rerank == 2 and setting.effort >= 30, most=1000)
    Setting(effort=30, rerank=2)
    """
    setting = start
    if holds(setting):
        while (less := setting.less()) is not None and holds(less):
            setting = less
        return _finest(setting, (less and less.effort) or 0, holds)
    while (more := setting.more(most)) is not None:
        if holds(more):  # with more re-ranking, anything may be enough
            return _finest(more, (setting.effort or 0) if more.rerank == setting.rerank else 0, holds)
        setting = more
    return None


def _finest(setting: Setting, missing: int, holds: Callable[[Setting], bool]) -> Setting:
    """A setting that holds, with an effort at most a fiftieth above one that does not, as `missing` does not."""
    while setting.effort is not None and setting.effort - missing > max(1, setting.effort // 50):
        middle = replace(setting, effort=(setting.effort + missing) // 2)
        if holds(middle):
            setting = middle
        else:
            missing = middle.effort or 0
    return setting


def extrapolated(small: tuple[int, int], large: tuple[int, int], rows: int) -> int:
    """A number measured at two sizes, as (rows, number), carried on to more rows by the power of the size they show.

    The power is held between 0 and 1: no effort falls as rows are added, and none need outgrow them.

    >>> extrapolated((10_000, 10), (40_000, 20), 160_000)
    40
    """
    (few, less), (many, more) = small, large
    power = min(max(log(more / less) / log(many / few), 0.0), 1.0) if many > few else 0.0
    return ceil(more * (rows / many) ** power - 1e-9)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A kind, and how many times √N lists it shall have; None leaves it to the kind, or it has none."""

    kind: str
    lists_per_root: int | None = None

    def wishes(self, rows: int, *, seed: int, effort: str | None = None, setting: Setting | None = None) -> Tuning:
        """What to ask of the kind for so many rows. effort: the parameter that the setting's effort is for."""
        numbers: dict[str, int] = {}
        if self.lists_per_root and rows >= MIN_LISTS * MIN_ROWS_PER_LIST:
            numbers["nlist"] = max(MIN_LISTS, min(round(self.lists_per_root * sqrt(rows)), rows // MIN_ROWS_PER_LIST))
        if setting and effort and setting.effort is not None:
            most = numbers.get("nlist", setting.effort)
            numbers[effort] = min(setting.effort, most)
        if setting and setting.rerank:
            numbers["rerank"] = setting.rerank
        return Tuning(seed=seed, **numbers)


# k-means takes time with the square of its lists: few lists first, and of many only one kind
LADDER = (
    Rung(kind="flat"),
    Rung(kind="sq8"),
    Rung(kind="ivf", lists_per_root=1),
    Rung(kind="ivfsq", lists_per_root=1),
    Rung(kind="rabitq", lists_per_root=2),
    Rung(kind="ivfpq", lists_per_root=2),
    Rung(kind="ivf", lists_per_root=4),
    Rung(kind="hnsw"),
)


_WARM_UP = 10
# a percentile of 99 wants hundreds of questions, a slow kind must not take minutes for them
_TIMED_QUESTIONS, _TIMED_SECONDS = 1000, 3.0
# a setting is looked for, and the curve drawn, with few
_FEW_QUESTIONS = 100
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
class Point:
    """One point of a kind's recall-latency curve."""

    effort: int
    recall: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class Turned:
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
    curve: tuple[Point, ...] = ()
    misses: tuple[str, ...] = ()
    turned: dict[str, Turned] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The kind, with its lists where it has them.

        A plan may try one kind with few lists and with many.
        """
        return f"{self.kind} {self.parameters['nlist']}" if "nlist" in self.parameters else self.kind


class Built:
    """A kind filled with rows in memory, asked with any setting."""

    def __init__(self, rung: Rung, rows: DrawnRows, *, seed: int) -> None:
        began = time.perf_counter()
        self.kind, self.rung, self.rows, self.seed = KINDS[rung.kind], rung, rows, seed
        prepared = self.kind(rows, rung.wishes(len(rows), seed=seed))
        self.index: Any = prepared.index
        self.index.add(rows.vectors)
        self.build_seconds = time.perf_counter() - began
        self.parameters, self.is_reranked = prepared.parameters, prepared.rerank > 0

    @property
    def most(self) -> int | None:
        """The most effort worth trying."""
        most = most_effort(self.index)
        return min(most, MAX_EF) if most and self.kind.effort == "ef_search" else most

    def searcher(self, setting: Setting, top: int) -> "Searcher":
        """Searches with this setting."""
        return Searcher(self, setting, top)

    def tune(self, questions: Questions, promise: Promise) -> Setting | None:
        """The quickest setting whose recall, by the bound of its mean, keeps the promise; None if none does.

        It is looked for with few questions, and then settled with all.
        """
        at = promise.at

        def reaches(setting: Setting) -> bool:
            return float(self._recall_of_each(setting, questions, at, few=True).mean()) >= promise.recall

        def holds(setting: Setting) -> bool:
            return lower_bound(self._recall_of_each(setting, questions, at), seed=self.seed) >= promise.recall

        found = list(settings_that_reach(reaches, most=self.most, is_reranked=self.is_reranked))
        if self.most or self.is_reranked:
            settled_ones = (settled(setting, holds, most=self.most) for setting in found)
            found = [setting for setting in settled_ones if setting is not None]
        if len(found) < 2:
            return found[0] if found else None
        some = questions.vectors[:_FEW_QUESTIONS]
        return min(found, key=lambda setting: self.time(setting, some, at).p50_ms)

    def time(self, setting: Setting, vectors: Float32[Array, "Q D"], top: int) -> Latency:
        """Ask one question after the other on one thread, for three seconds at most."""
        searcher, seconds = self.searcher(setting, top), []
        with one_thread():
            for vector in vectors[:_WARM_UP]:
                searcher.scores(vector[None])
            began = time.perf_counter()
            for vector in vectors[:_TIMED_QUESTIONS]:
                before = time.perf_counter()
                searcher.scores(vector[None])
                seconds.append(time.perf_counter() - before)
                if time.perf_counter() - began > _TIMED_SECONDS:
                    break
        p50, p95, p99 = (float(value) * 1000 for value in np.percentile(seconds, (50, 95, 99)))
        return Latency(p50_ms=p50, p95_ms=p95, p99_ms=p99, per_second=len(seconds) / sum(seconds))

    def curve(self, setting: Setting, questions: Questions, at: int) -> tuple[Point, ...]:
        """Recall and median latency with less effort and with more; none for a kind that has no effort."""
        if setting.effort is None or self.most is None:
            return ()
        points = []
        for effort in sorted({min(max(1, round(setting.effort * factor)), self.most) for factor in _CURVE_FACTORS}):
            tried = Setting(effort=effort, rerank=setting.rerank)
            recall = float(self._recall_of_each(tried, questions, at, few=True).mean())
            timed = self.time(tried, questions.vectors[:_FEW_QUESTIONS], at)
            points.append(Point(effort=effort, recall=recall, ms=timed.p50_ms))
        return tuple(points)

    def judge(self, setting: Setting, judge: list[Questions], at: int) -> dict[str, dict[int, Float[Array, " Q"]]]:
        """Recall of each question, by direction and number of answers."""
        recalls: dict[str, dict[int, Float[Array, " Q"]]] = {}
        for questions in judge:
            counts = sorted({*SHOWN, at})
            # a search for more answers reads more of a graph and re-ranks more, so each number is asked for apart
            asked = counts if setting.rerank or self.kind.effort == "ef_search" else counts[-1:]
            found = {count: self.searcher(setting, count).scores(questions.vectors) for count in asked}
            recalls[questions.direction] = {
                count: recall_of_each(found.get(count, found[counts[-1]]), questions.scores, count) for count in counts
            }
        return recalls

    def _recall_of_each(
        self, setting: Setting, questions: Questions, at: int, *, few: bool = False
    ) -> Float[Array, " Q"]:
        some = slice(_FEW_QUESTIONS if few else None)
        found = self.searcher(setting, at).scores(questions.vectors[some])
        return recall_of_each(found, questions.scores[some], at)


class Searcher:
    """Searches with one setting, whose FAISS parameters are made once."""

    def __init__(self, built: Built, setting: Setting, top: int) -> None:
        self._index, self._stored, self._setting = built.index, built.rows.stored, setting
        self._top = min(top, len(built.rows))
        self._parameters = search_parameters(built.index, effort=setting.effort)

    def scores(self, queries: Float32[Array, "Q D"]) -> Float32[Array, "Q K"]:
        """Exact cosines of the rows found, best first, -inf for what was not found."""
        wanted = min(candidates_for(self._top, self._setting.rerank), len(self._stored))
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


def wishes_of(rung: Rung, rows: int, setting: Setting, *, seed: int) -> dict[str, int]:
    """What to ask of the kind for so many rows, without what is left to it."""
    tuning = rung.wishes(rows, seed=seed, effort=KINDS[rung.kind].effort, setting=setting)
    return {name: value for name, value in asdict(tuning).items() if value is not None}


def turn(rung: Rung, setting: Setting, rows: DrawnRows, questions: Questions, at: int, *, seed: int) -> Turned | None:
    """Build and ask; None if the kind needs more rows."""
    try:
        built = Built(rung, rows, seed=seed)
    except UsageError:
        return None
    effort = None if setting.effort is None or built.most is None else min(setting.effort, built.most)
    tried = Setting(effort=effort, rerank=setting.rerank if built.is_reranked else 0)
    recalls = built.judge(tried, [questions], at)[questions.direction]
    return Turned(
        rows=len(rows),
        recall={count: float(each.mean()) for count, each in recalls.items()},
        latency=built.time(tried, questions.vectors, at),
    )


# a machine changes its pace within seconds; a round of all contenders takes a tenth of one each
_ROUNDS, _QUESTIONS_A_ROUND = 10, 200
# slower ones do not become the quickest by being asked again
_IN_THE_RACE = 1.5


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A filled index with the setting it is asked with; work: distances a question computes in it (`Kind.work`)."""

    built: Built
    setting: Setting
    work: float

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> Latency:
        """As `Built.time`."""
        return self.built.time(self.setting, vectors, top)


@runtime_checkable
class Timed(Protocol):
    """What can be timed again."""

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> tuple[Latency, Latency]:
        """Latency as measured on the sample, and as expected of all rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What tells how quick a kind is.

    fewer: the same kind with a part of the sample; None: latency is carried on by the work alone. work: of a question
        to all rows.
    """

    here: Asked
    fewer: Asked | None
    work: float

    def time(self, vectors: Float32[Array, "Q D"], top: int) -> tuple[Latency, Latency]:
        """As `Timed.time`."""
        measured = self.here.time(vectors, top)
        smaller = (self.fewer.work, self.fewer.time(vectors, top).p50_ms) if self.fewer else None
        return measured, measured.scaled(growth((self.here.work, measured.p50_ms), smaller, self.work))


def growth(here: tuple[float, float], fewer: tuple[float, float] | None, work: float) -> float:
    """How many times longer a question takes with more work, by the line through two measurements of (work, time).

    What a question takes whatever its work is not carried on; but neither does a line fall, nor rise more steeply than
    in proportion. Of one measurement it is the proportion.

    >>> growth((100, 3.0), (50, 2.0), 400), growth((100, 3.0), None, 400)
    (3.0, 4.0)
    """
    (done, time), steepest = here, here[1] / here[0]
    slope = (time - fewer[1]) / (done - fewer[0]) if fewer and done > fewer[0] else steepest
    return 1 + min(max(slope, 0.0), steepest) * (work - done) / time


def near_quickest(trials: Sequence[Trial]) -> set[int]:
    """The places of those that keep the promise and may be the quickest of all, timed again."""
    keeping = {place: trial.latency.p50_ms for place, trial in enumerate(trials) if not trial.misses}
    limit = min(keeping.values(), default=0.0) * _IN_THE_RACE
    return {place for place, p50_ms in keeping.items() if p50_ms <= limit}


def race(paces: Mapping[int, Timed], vectors: Float32[Array, "Q D"], top: int) -> dict[int, tuple[Latency, Latency]]:
    """Each timed again, in turn with the others; the medians of what they take, by place."""
    times: dict[int, list[tuple[Latency, Latency]]] = {place: [] for place in paces}
    for _ in range(_ROUNDS):
        for place, pace in paces.items():
            times[place].append(pace.time(vectors[:_QUESTIONS_A_ROUND], top))
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
