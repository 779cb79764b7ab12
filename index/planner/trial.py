"""One kind tried on the sample: built, tuned with one half of the questions, judged by the other, timed."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vlm.index.kinds import KINDS, load_faiss
from vlm.index.kinds.hnsw import MAX_EF
from vlm.index.kinds.searching import candidates_for, most_effort, rerank, search_parameters
from vlm.index.planner.drawing import SHOWN, DrawnRows, Questions
from vlm.index.planner.ladder import Rung
from vlm.index.planner.promise import Promise
from vlm.index.planner.recall import lower_bound, recall_of_each
from vlm.index.planner.tuning import Setting, settings_that_reach, settled
from vlm.tensors import Array, Float, Float32

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
