"""Which of the trials keep a promise, which of those is taken, and why.

Try the ladder, judge what it gives against the promise, take the quickest that keeps it.

The effort of a finished index, set by all of its rows where the plan knew a sample of them.

The finished index against what its plan promised.
"""

import json
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import choose as choose_from
from vlm.console import say
from vlm.errors import UsageError
from vlm.index.ann.faiss_search import most_effort, set_effort
from vlm.index.ann.index_type import Tuning
from vlm.index.ann.index_types import KINDS, MAX_RERANK, settings_of
from vlm.index.autotune.query_sampling import SHOWN, Drawn, Questions, draw, exact_scores, lower_bound, recall_of_each
from vlm.index.autotune.trial import (
    LADDER,
    Asked,
    Built,
    Pace,
    Promise,
    Rung,
    Setting,
    Trial,
    Turned,
    extrapolated,
    near_quickest,
    one_thread,
    race,
    settled,
    show_bytes,
    turn,
    wishes_of,
)
from vlm.index.embeddings import Embeddings
from vlm.index.reader import Index
from vlm.index.segments import OpenSegment, Selected, nearest
from vlm.index.writer import IndexWriter
from vlm.tensors import Array, Float32

# medians nearer to each other than this are equally quick: a machine's noise is of that size
_AS_QUICK = 1.1


def pick(trials: Sequence[Trial], promise: Promise, *, left_out: dict[str, str]) -> Trial:
    """Of those that keep the promise the least median latency; of those within 10% of it the least memory.

    Raises:
        UsageError: none keeps it; the message names the one that comes nearest and what it has.
    """
    keeping = [trial for trial in trials if not trial.misses]
    if keeping:
        quickest = min(trial.latency.p50_ms for trial in keeping)
        as_quick = [trial for trial in keeping if trial.latency.p50_ms <= quickest * _AS_QUICK]
        return min(as_quick, key=lambda trial: (trial.resident_bytes, trial.latency.p50_ms))
    reasons = "; ".join(f"{kind}: {why}" for kind, why in left_out.items())
    if not trials:
        raise UsageError(f"No kind of index can promise {promise.in_words()}. {reasons}.")
    nearest = min(trials, key=lambda trial: _shortfall(trial, promise))
    raise UsageError(
        f"No kind of index keeps {promise.in_words()}. The nearest is {nearest.label}, with recall@{promise.at} "
        f"{promised_recall(nearest, promise):.4f}, {nearest.latency.p95_ms:.3g} ms (p95) and "
        f"{show_bytes(nearest.resident_bytes)}: it misses {' and '.join(nearest.misses)}. Promise what it has, or less."
        + (f" Not tried: {reasons}." if reasons else "")
    )


def reason(best: Trial, trials: Sequence[Trial], promise: Promise) -> str:
    """Why it was taken, in one sentence."""
    keeping = [trial for trial in trials if not trial.misses]
    has = (
        f"recall@{promise.at} {promised_recall(best, promise):.4f} (≥ {best.bound:.4f} with 95% confidence), "
        f"{best.latency.p95_ms:.3g} ms (p95), {show_bytes(best.resident_bytes)}"
    )
    others = [trial for trial in keeping if trial is not best]
    if not others:
        return f"{best.label} is the only kind of {len(trials)} tried that keeps {promise.in_words()}: {has}."
    quickest = min(keeping, key=lambda trial: trial.latency.p50_ms)
    if quickest is best:
        ground = f"is the quickest of {len(keeping)} kinds that keep {promise.in_words()}"
    else:
        ground = f"needs the least memory of those as quick as {quickest.label} that keep {promise.in_words()}"
    return f"{best.label} {ground}: {has}."


def misses_of(trial: Trial, promise: Promise) -> tuple[str, ...]:
    """What the promise asks and the trial does not keep, in words."""
    found = []
    if promised_recall(trial, promise) < promise.recall:
        found.append(f"recall {promise.recall:g}")
    if promise.latency_ms is not None and trial.latency.p95_ms > promise.latency_ms:
        found.append(f"{promise.latency_ms:g} ms")
    if promise.memory_bytes is not None and trial.resident_bytes > promise.memory_bytes:
        found.append(show_bytes(promise.memory_bytes))
    return tuple(found)


def promised_recall(trial: Trial, promise: Promise) -> float:
    """Recall among as many answers as the promise counts, of the questions it is about."""
    return next(iter(trial.recall.values()))[promise.at]


def _shortfall(trial: Trial, promise: Promise) -> float:
    """How far from the promise: the greatest ratio of what it has to what was promised; of recall, the share missed."""
    missed = (1 - promised_recall(trial, promise)) / max(1 - promise.recall, 1e-3)
    latency = trial.latency.p95_ms / promise.latency_ms if promise.latency_ms else 0.0
    memory = trial.resident_bytes / promise.memory_bytes if promise.memory_bytes else 0.0
    return max(missed, latency, memory)


MAX_ROWS, MAX_QUESTIONS = 50_000, 1000
# share of the sample at which a setting is found a second time, when the sample is not all there is
_SMALL_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The kind that keeps the promise, its tuning, why it was taken, and everything that was measured.

    direction: the one the promise was judged by. is_optimistic: asked with rows, or others alike.
    num_rows, sample_rows: rows of all, and rows indexed in the trials.
    left_out: kinds that were not measured, and why. unturned: directions that were not, and why.
    questions: those of the promised direction it was judged by. tuning_questions: those it was tuned with.
    """

    kind: str
    tuning: Tuning
    why: str
    promise: Promise
    direction: str
    is_optimistic: bool
    num_rows: int
    sample_rows: int
    tuned_with: int
    judged_by: dict[str, int]
    trials: tuple[Trial, ...]
    left_out: dict[str, str]
    unturned: dict[str, str]
    questions: Float32[Array, "Q D"] = field(repr=False, compare=False)
    tuning_questions: Float32[Array, "P D"] = field(repr=False, compare=False)

    @property
    def evidence(self) -> dict[str, Any]:
        """All of it but the questions, in the plain values that JSON has, for the manifest."""
        found = {name: value for name, value in asdict(self).items() if not name.endswith("questions")}
        return json.loads(json.dumps(found))

    @property
    def winner(self) -> Trial:
        """The trial of the kind taken."""
        return next(trial for trial in self.trials if trial.kind == self.kind and trial.wishes == _given(self.tuning))


def choose(
    source: Embeddings,
    texts: Embeddings | None,
    promise: Promise,
    *,
    images: Embeddings | None = None,
    kinds: Sequence[str] = (),
    max_rows: int = MAX_ROWS,
    max_questions: int = MAX_QUESTIONS,
    seed: int = 0,
) -> Plan:
    """The kind of index, and its tuning, that keeps a promise about all rows of `source` with the least latency.

    texts, images: questions, none a row; the promise is about the texts, else the images, else rows held out, whose
        recall is better than that of the other modality. With 1,000 of the other modality each kind is measured the
        other way round too: they as rows, asked with rows held out.
    kinds: those that may be taken; none: all of the ladder.
    max_rows: the sample tried on; beyond it effort and latency are carried on from a quarter of it and all of it.
    max_questions: tuned with, and judged by, at most.

    Raises:
        UsageError: no kind keeps the promise (the nearest is named), an unknown kind, texts of another model.
    """
    for kind in kinds:
        choose_from(KINDS, kind, "index kind")
    others = _checked_questions(texts, images)
    drawn = draw(source, others, max_rows=max_rows, max_questions=max_questions, seed=seed)
    is_optimistic = not others or (texts is None and source.space.modality == "image")
    _say_limits(drawn, is_optimistic=is_optimistic)
    table = _Table(drawn, promise, whole=len(source), seed=seed)
    for rung in (rung for rung in LADDER if not kinds or rung.kind in kinds):
        table.try_rung(rung)
    table.race()
    best = pick(table.trials, promise, left_out=table.left_out)
    return Plan(
        kind=best.kind,
        tuning=Tuning(**best.wishes),
        why=reason(best, table.trials, promise),
        promise=promise,
        direction=drawn.promised,
        is_optimistic=is_optimistic,
        num_rows=len(source),
        sample_rows=len(drawn.rows),
        tuned_with=len(drawn.tune),
        judged_by={direction: len(asked) for direction, asked in drawn.judge.items()},
        trials=tuple(table.trials),
        left_out=table.left_out,
        unturned=drawn.unturned,
        questions=drawn.judge[drawn.promised],
        tuning_questions=drawn.tune,
    )


def _say_limits(drawn: Drawn, *, is_optimistic: bool) -> None:
    if is_optimistic:
        say(f"No texts to ask with: recall of {drawn.promised} is optimistic for questions in words.")
    for direction, why in drawn.unturned.items():
        say(f"{direction} is not measured: {why}.")


class _Table:
    """The trials, as they are made."""

    def __init__(self, drawn: Drawn, promise: Promise, *, whole: int, seed: int) -> None:
        self.promise, self.whole, self.seed, self.rows = promise, whole, seed, drawn.rows
        self._vectors, self._top = drawn.tune, max(*SHOWN, promise.at)
        self.judge = [Questions.ask(name, asked, drawn.rows, self._top) for name, asked in drawn.judge.items()]
        self.tune = Questions.ask(drawn.promised, drawn.tune, drawn.rows, self._top)
        self.turned = {
            direction: (rows, Questions.ask(direction, drawn.held_out, rows, self._top))
            for direction, rows in drawn.turned.items()
        }
        self.trials: list[Trial] = []
        self._paces: dict[int, Pace] = {}
        self.left_out: dict[str, str] = {}

    def try_rung(self, rung: Rung) -> None:
        """Build, tune, judge and time it, unless it cannot fit."""
        name = f"{rung.kind} ({rung.lists_per_root}√N lists)" if rung.lists_per_root else rung.kind
        limit = self.promise.memory_bytes
        try:
            least = self._parameters(rung, Setting(effort=None, rerank=0))
            needed = KINDS[rung.kind].resident_bytes(self.whole, self.rows.dimension, least)
            if limit is not None and needed > limit:
                self.left_out[name] = f"needs {show_bytes(needed)}"
                return
            built = Built(rung, self.rows, seed=self.seed)
        except UsageError as error:
            self.left_out[name] = str(error).rstrip(".")
            return
        trial, self._paces[len(self.trials)] = self._measure(rung, built)
        self.trials.append(trial)
        near = near_quickest(self.trials)
        self._paces = {place: pace for place, pace in self._paces.items() if place in near}
        say(
            f"{trial.label}: recall@{self.promise.at} {promised_recall(trial, self.promise):.4f}, "
            f"p50 {trial.latency.p50_ms:.3g} ms, {show_bytes(trial.resident_bytes)}"
            + (f"; misses {' and '.join(trial.misses)}" if trial.misses else "")
        )

    def race(self) -> None:
        """Time those again that may win, in turn."""
        if len(self._paces) < 2:
            return
        for place, (measured, expected) in race(self._paces, self.judge[0].vectors, self.promise.at).items():
            trial = replace(self.trials[place], measured=measured, latency=expected)
            self.trials[place] = replace(trial, misses=misses_of(trial, self.promise))
        timed = [self.trials[place] for place in self._paces]
        say(f"Timed again, in turn: {'; '.join(f'{one.label}: p50 {one.latency.p50_ms:.3g} ms' for one in timed)}.")

    def _measure(self, rung: Rung, built: Built) -> tuple[Trial, Pace]:
        promise, kind = self.promise, built.kind
        # a kind that cannot keep the recall is shown at its best
        setting = built.tune(self.tune, promise) or Setting(effort=built.most, rerank=128 if built.is_reranked else 0)
        recalls = built.judge(setting, self.judge, promise.at)
        fewer = self._asked_fewer(rung)
        wide = self._for_all_rows(setting, fewer)
        parameters, here = self._parameters(rung, wide), self._asked(built, setting)
        pace = Pace(here=here, fewer=fewer, work=kind.work(self.whole, parameters))
        measured, expected = pace.time(self.judge[0].vectors, promise.at)
        trial = Trial(
            kind=kind.name,
            wishes=wishes_of(rung, self.whole, wide, seed=self.seed),
            parameters=parameters,
            recall={way: {n: float(each.mean()) for n, each in found.items()} for way, found in recalls.items()},
            bound=lower_bound(recalls[self.tune.direction][promise.at], seed=self.seed),
            measured=measured,
            latency=expected,
            resident_bytes=kind.resident_bytes(self.whole, self.rows.dimension, parameters),
            mapped_bytes=2 * self.whole * self.rows.dimension if built.is_reranked else 0,
            build_seconds=built.build_seconds,
            curve=built.curve(setting, self.judge[0], promise.at),
            turned=self._turn(rung, setting),
        )
        return replace(trial, misses=misses_of(trial, promise)), pace

    def _asked(self, built: Built, setting: Setting) -> Asked:
        rows = len(built.rows)
        numbers = built.parameters | wishes_of(built.rung, rows, setting, seed=self.seed)
        return Asked(built=built, setting=setting, work=built.kind.work(rows, numbers))

    def _turn(self, rung: Rung, setting: Setting) -> dict[str, Turned]:
        found = {
            direction: turn(rung, setting, rows, questions, self.promise.at, seed=self.seed)
            for direction, (rows, questions) in self.turned.items()
        }
        return {direction: turned for direction, turned in found.items() if turned is not None}

    def _parameters(self, rung: Rung, setting: Setting) -> dict[str, int]:
        kind = KINDS[rung.kind]
        tuning = rung.wishes(self.whole, seed=self.seed, effort=kind.effort, setting=setting)
        return kind.parameters_for(self.whole, tuning)

    def _asked_fewer(self, rung: Rung) -> Asked | None:
        """The kind with a quarter of the sample, tuned; None if the sample is all there is, or nothing can be."""
        held_out = max(len(questions.vectors) for questions in self.judge)
        if self.whole <= len(self.rows) + held_out:
            return None
        few = self.rows.part(_SMALL_SHARE)
        asked = Questions.ask(self.tune.direction, self.tune.vectors, few, self._top)
        try:
            built = Built(rung, few, seed=self.seed)
            setting = built.tune(asked, self.promise)
        except UsageError:
            return None
        return setting and self._asked(built, setting)

    def _for_all_rows(self, setting: Setting, fewer: Asked | None) -> Setting:
        """The setting for all rows, from what a quarter of the sample and the sample need."""
        if fewer is None:
            return setting
        few, less = len(fewer.built.rows), fewer.setting

        def carried(small: int, large: int) -> int:
            return extrapolated((few, small), (len(self.rows), large), self.whole)

        effort = setting.effort and carried(less.effort or 1, setting.effort)
        return Setting(
            effort=effort, rerank=min(carried(less.rerank, setting.rerank), MAX_RERANK) if setting.rerank else 0
        )


def _checked_questions(texts: Embeddings | None, images: Embeddings | None) -> list[Embeddings]:
    for given, modality in ((texts, "text"), (images, "image")):
        if given is not None and given.space.modality != modality:
            raise UsageError(
                f"{given.folder} holds {given.space.modality} embeddings; {modality} ones are needed here."
            )
    return [given for given in (texts, images) if given is not None]


def _given(tuning: Tuning) -> dict[str, int]:
    return {name: value for name, value in asdict(tuning).items() if value is not None}


def settle(folder: Path, source: Embeddings, plan: Plan) -> Setting | None:
    """Give a new index of all rows of `source` the least effort that keeps the plan's promise, by its tuning questions.

    None, and nothing changes, if the kind has nothing to set, nothing it can be set to is enough, or so many answers
    are promised that a search compares all rows: by these any effort would do, and shorter answers need the plan's.
    """
    index = Index.open(folder)
    try:
        (selected,) = index.generation.selected
        start = _setting_of(selected.segment)
        if start.effort is None and not start.rerank:
            return None
        at, questions = plan.promise.at, plan.tuning_questions
        if selected.is_scanned(at):
            return None
        truth = exact_scores(source.blocks(), questions, at)

        def holds(setting: Setting) -> bool:
            scores, _ = nearest([_asked_with(selected, setting)], questions, at)
            return lower_bound(recall_of_each(scores, truth, at)) >= plan.promise.recall

        found = settled(start, holds, most=most_effort(selected.segment.index))
    finally:
        index.close()
    if found is not None and found != start:
        told, planned = (_in_words(plan.kind, setting) for setting in (found, start))
        say(f"Measured on all {len(source):,} rows: {told}; the plan had {planned}.")
        with IndexWriter(folder) as writer:
            writer.set_search(effort=found.effort, rerank=found.rerank)
    return found


def _setting_of(segment: OpenSegment) -> Setting:
    name = KINDS[segment.described.kind].effort
    effort = segment.described.parameters[name] if name else None
    return Setting(effort=effort, rerank=segment.described.rerank)


def _asked_with(selected: Selected, setting: Setting) -> Selected:
    """The same segment, searched with a setting."""
    segment = copy(selected.segment)
    described = segment.described
    told = settings_of(described.kind, effort=setting.effort, rerank=0)
    segment.described = replace(described, rerank=setting.rerank, parameters=described.parameters | told)
    if setting.effort is not None:
        set_effort(segment.index, setting.effort)
    return Selected(segment)


def _in_words(kind: str, setting: Setting) -> str:
    told = settings_of(kind, effort=setting.effort, rerank=setting.rerank)
    return ", ".join(f"{name} {value}" for name, value in told.items())


_WARM_UP = 10


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What the index of all rows has, asked as people ask it but for the model and the catalogue.

    recall: of the promised direction, among the promised number of answers. bound: what it is at least, with 95%
        confidence. p50_ms, p95_ms: of one question at a time on one thread.
    breaks: what of the promise it does not keep, in words; empty: it keeps it.
    """

    recall: float
    bound: float
    p50_ms: float
    p95_ms: float
    questions: int
    breaks: tuple[str, ...]


def confirm(index: Index, source: Embeddings, plan: Plan) -> Confirmation:
    """Ask the index the plan's judging questions and compare with all rows of `source`."""
    at, questions = plan.promise.at, plan.questions
    truth = exact_scores(source.blocks(), questions, at)
    found, seconds = np.full(truth.shape, -np.inf, np.float32), []
    with one_thread():
        index.nearest(questions[:_WARM_UP], at)
        for number, question in enumerate(questions):
            before = time.perf_counter()
            scores, _ = index.nearest(question[None], at)
            seconds.append(time.perf_counter() - before)
            found[number, : scores.shape[1]] = scores[0]
    recalls = recall_of_each(found, truth, at)
    recall, p95_ms = float(recalls.mean()), float(np.percentile(seconds, 95)) * 1000
    breaks = [f"recall@{at} {recall:.4f} instead of {plan.promise.recall:g}"] if recall < plan.promise.recall else []
    if plan.promise.latency_ms is not None and p95_ms > plan.promise.latency_ms:
        breaks.append(f"{p95_ms:.3g} ms (p95) instead of {plan.promise.latency_ms:g}")
    return Confirmation(
        recall=recall,
        bound=lower_bound(recalls),
        p50_ms=float(np.median(seconds)) * 1000,
        p95_ms=p95_ms,
        questions=len(questions),
        breaks=tuple(breaks),
    )
