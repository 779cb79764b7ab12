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

from vlm.config import lookup as lookup
from vlm.console import say
from vlm.errors import UsageError
from vlm.index.ann.faiss_search import effort_limit, set_search_effort
from vlm.index.ann.index_type import TuningParams
from vlm.index.ann.index_types import INDEX_TYPES, MAX_RERANK, search_params_dict
from vlm.index.autotune.query_sampling import (
    SHOWN,
    QuerySet,
    TuningSample,
    exact_scores,
    lower_bound,
    per_query_recall,
    sample_queries,
)
from vlm.index.autotune.trial import (
    CANDIDATE_CONFIGS,
    CandidateConfig,
    LatencyProbe,
    ReversedResult,
    SearchParams,
    Trial,
    TrialIndex,
    TunedIndex,
    TuningTarget,
    contenders,
    extrapolate_power_law,
    format_bytes,
    measure_reversed,
    minimize_params,
    one_thread,
    time_head_to_head,
    tuning_values,
)
from vlm.index.embeddings import Embeddings
from vlm.index.reader import Index
from vlm.index.segments import SegmentReader, SegmentView, nearest
from vlm.index.writer import IndexWriter
from vlm.tensors import Array, Float32

# medians nearer to each other than this are equally quick: a machine's noise is of that size
_EQUALLY_FAST = 1.1


def select_trial(trials: Sequence[Trial], target: TuningTarget, *, left_out: dict[str, str]) -> Trial:
    """Of those that keep the promise the least median latency; of those within 10% of it the least memory.

    Raises:
        UsageError: none keeps it; the message names the one that comes nearest and what it has.
    """
    meeting = [trial for trial in trials if not trial.misses]
    if meeting:
        quickest = min(trial.latency.p50_ms for trial in meeting)
        as_quick = [trial for trial in meeting if trial.latency.p50_ms <= quickest * _EQUALLY_FAST]
        return min(as_quick, key=lambda trial: (trial.resident_bytes, trial.latency.p50_ms))
    reasons = "; ".join(f"{kind}: {why}" for kind, why in left_out.items())
    if not trials:
        raise UsageError(f"No kind of index can promise {target.describe()}. {reasons}.")
    nearest = min(trials, key=lambda trial: _shortfall(trial, target))
    raise UsageError(
        f"No kind of index keeps {target.describe()}. The nearest is {nearest.label}, with recall@{target.at} "
        f"{target_recall(nearest, target):.4f}, {nearest.latency.p95_ms:.3g} ms (p95) and "
        f"{format_bytes(nearest.resident_bytes)}: it misses {' and '.join(nearest.misses)}. "
        "Promise what it has, or less." + (f" Not tried: {reasons}." if reasons else "")
    )


def explain_choice(best: Trial, trials: Sequence[Trial], target: TuningTarget) -> str:
    """Why it was taken, in one sentence."""
    meeting = [trial for trial in trials if not trial.misses]
    has = (
        f"recall@{target.at} {target_recall(best, target):.4f} (≥ {best.bound:.4f} with 95% confidence), "
        f"{best.latency.p95_ms:.3g} ms (p95), {format_bytes(best.resident_bytes)}"
    )
    others = [trial for trial in meeting if trial is not best]
    if not others:
        return f"{best.label} is the only kind of {len(trials)} tried that keeps {target.describe()}: {has}."
    quickest = min(meeting, key=lambda trial: trial.latency.p50_ms)
    if quickest is best:
        ground = f"is the quickest of {len(meeting)} kinds that keep {target.describe()}"
    else:
        ground = f"needs the least memory of those as quick as {quickest.label} that keep {target.describe()}"
    return f"{best.label} {ground}: {has}."


def unmet_targets(trial: Trial, target: TuningTarget) -> tuple[str, ...]:
    """What the promise asks and the trial does not keep, in words."""
    found = []
    if target_recall(trial, target) < target.recall:
        found.append(f"recall {target.recall:g}")
    if target.latency_ms is not None and trial.latency.p95_ms > target.latency_ms:
        found.append(f"{target.latency_ms:g} ms")
    if target.memory_bytes is not None and trial.resident_bytes > target.memory_bytes:
        found.append(format_bytes(target.memory_bytes))
    return tuple(found)


def target_recall(trial: Trial, target: TuningTarget) -> float:
    """Recall among as many answers as the promise counts, of the questions it is about."""
    return next(iter(trial.recall.values()))[target.at]


def _shortfall(trial: Trial, target: TuningTarget) -> float:
    """How far from the promise: the greatest ratio of what it has to what was promised; of recall, the share missed."""
    missed = (1 - target_recall(trial, target)) / max(1 - target.recall, 1e-3)
    latency = trial.latency.p95_ms / target.latency_ms if target.latency_ms else 0.0
    memory = trial.resident_bytes / target.memory_bytes if target.memory_bytes else 0.0
    return max(missed, latency, memory)


MAX_ROWS, MAX_QUERIES = 50_000, 1000
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
    tuning: TuningParams
    why: str
    promise: TuningTarget
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
        return next(
            trial for trial in self.trials if trial.kind == self.kind and trial.wishes == _given_params(self.tuning)
        )


def autotune(
    source: Embeddings,
    texts: Embeddings | None,
    target: TuningTarget,
    *,
    images: Embeddings | None = None,
    kinds: Sequence[str] = (),
    max_rows: int = MAX_ROWS,
    max_queries: int = MAX_QUERIES,
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
        lookup(INDEX_TYPES, kind, "index kind")
    others = _checked_queries(texts, images)
    sample = sample_queries(source, others, max_rows=max_rows, max_queries=max_queries, seed=seed)
    is_optimistic = not others or (texts is None and source.space.modality == "image")
    _log_limits(sample, is_optimistic=is_optimistic)
    table = _Autotuner(sample, target, whole=len(source), seed=seed)
    for candidate in (candidate for candidate in CANDIDATE_CONFIGS if not kinds or candidate.kind in kinds):
        table.try_candidate(candidate)
    table.time_head_to_head()
    best = select_trial(table.trials, target, left_out=table.left_out)
    return Plan(
        kind=best.kind,
        tuning=TuningParams(**best.wishes),
        why=explain_choice(best, table.trials, target),
        promise=target,
        direction=sample.target_direction,
        is_optimistic=is_optimistic,
        num_rows=len(source),
        sample_rows=len(sample.rows),
        tuned_with=len(sample.tuning_queries),
        judged_by={direction: len(asked) for direction, asked in sample.eval_queries.items()},
        trials=tuple(table.trials),
        left_out=table.left_out,
        unturned=sample.unturned,
        questions=sample.eval_queries[sample.target_direction],
        tuning_questions=sample.tuning_queries,
    )


def _log_limits(sample: TuningSample, *, is_optimistic: bool) -> None:
    if is_optimistic:
        say(f"No texts to ask with: recall of {sample.target_direction} is optimistic for questions in words.")
    for direction, why in sample.unturned.items():
        say(f"{direction} is not measured: {why}.")


class _Autotuner:
    """The trials, as they are made."""

    def __init__(self, sample: TuningSample, target: TuningTarget, *, whole: int, seed: int) -> None:
        self.target, self.whole, self.seed, self.rows = target, whole, seed, sample.rows
        self._vectors, self._top = sample.tuning_queries, max(*SHOWN, target.at)
        self.eval_queries = [
            QuerySet.with_ground_truth(name, asked, sample.rows, self._top)
            for name, asked in sample.eval_queries.items()
        ]
        self.tuning_queries = QuerySet.with_ground_truth(
            sample.target_direction, sample.tuning_queries, sample.rows, self._top
        )
        self.turned = {
            direction: (rows, QuerySet.with_ground_truth(direction, sample.held_out, rows, self._top))
            for direction, rows in sample.turned.items()
        }
        self.trials: list[Trial] = []
        self._probes: dict[int, LatencyProbe] = {}
        self.left_out: dict[str, str] = {}

    def try_candidate(self, candidate: CandidateConfig) -> None:
        """Build, tune, judge and time it, unless it cannot fit."""
        name = (
            f"{candidate.kind} ({candidate.nlist_per_sqrt_rows}√N lists)"
            if candidate.nlist_per_sqrt_rows
            else candidate.kind
        )
        limit = self.target.memory_bytes
        try:
            least = self._parameters(candidate, SearchParams(effort=None, rerank=0))
            needed = INDEX_TYPES[candidate.kind].resident_bytes(self.whole, self.rows.dimension, least)
            if limit is not None and needed > limit:
                self.left_out[name] = f"needs {format_bytes(needed)}"
                return
            built = TrialIndex(candidate, self.rows, seed=self.seed)
        except UsageError as error:
            self.left_out[name] = str(error).rstrip(".")
            return
        trial, self._probes[len(self.trials)] = self._measure(candidate, built)
        self.trials.append(trial)
        near = contenders(self.trials)
        self._probes = {place: probe for place, probe in self._probes.items() if place in near}
        say(
            f"{trial.label}: recall@{self.target.at} {target_recall(trial, self.target):.4f}, "
            f"p50 {trial.latency.p50_ms:.3g} ms, {format_bytes(trial.resident_bytes)}"
            + (f"; misses {' and '.join(trial.misses)}" if trial.misses else "")
        )

    def time_head_to_head(self) -> None:
        """Time those again that may win, in turn."""
        if len(self._probes) < 2:
            return
        for place, (measured, expected) in time_head_to_head(
            self._probes, self.eval_queries[0].vectors, self.target.at
        ).items():
            trial = replace(self.trials[place], measured=measured, latency=expected)
            self.trials[place] = replace(trial, misses=unmet_targets(trial, self.target))
        timed = [self.trials[place] for place in self._probes]
        say(f"Timed again, in turn: {'; '.join(f'{one.label}: p50 {one.latency.p50_ms:.3g} ms' for one in timed)}.")

    def _measure(self, candidate: CandidateConfig, built: TrialIndex) -> tuple[Trial, LatencyProbe]:
        target, kind = self.target, built.kind
        # a kind that cannot keep the recall is shown at its best
        search_params = built.tune(self.tuning_queries, target) or SearchParams(
            effort=built.max_effort, rerank=128 if built.is_reranked else 0
        )
        recalls = built.evaluate(search_params, self.eval_queries, target.at)
        subsample = self._tune_on_subsample(candidate)
        wide = self._extrapolate_to_all_rows(search_params, subsample)
        parameters, full = self._parameters(candidate, wide), self._tuned_index(built, search_params)
        probe = LatencyProbe(full=full, subsample=subsample, num_distances=kind.num_distances(self.whole, parameters))
        measured, expected = probe.time(self.eval_queries[0].vectors, target.at)
        trial = Trial(
            kind=kind.name,
            wishes=tuning_values(candidate, self.whole, wide, seed=self.seed),
            parameters=parameters,
            recall={way: {n: float(each.mean()) for n, each in found.items()} for way, found in recalls.items()},
            bound=lower_bound(recalls[self.tuning_queries.direction][target.at], seed=self.seed),
            measured=measured,
            latency=expected,
            resident_bytes=kind.resident_bytes(self.whole, self.rows.dimension, parameters),
            mapped_bytes=2 * self.whole * self.rows.dimension if built.is_reranked else 0,
            build_seconds=built.build_seconds,
            curve=built.curve(search_params, self.eval_queries[0], target.at),
            turned=self._reversed(candidate, search_params),
        )
        return replace(trial, misses=unmet_targets(trial, target)), probe

    def _tuned_index(self, built: TrialIndex, search_params: SearchParams) -> TunedIndex:
        rows = len(built.rows)
        numbers = built.parameters | tuning_values(built.candidate, rows, search_params, seed=self.seed)
        return TunedIndex(
            built=built, search_params=search_params, num_distances=built.kind.num_distances(rows, numbers)
        )

    def _reversed(self, candidate: CandidateConfig, search_params: SearchParams) -> dict[str, ReversedResult]:
        found = {
            direction: measure_reversed(candidate, search_params, rows, questions, self.target.at, seed=self.seed)
            for direction, (rows, questions) in self.turned.items()
        }
        return {direction: turned for direction, turned in found.items() if turned is not None}

    def _parameters(self, candidate: CandidateConfig, search_params: SearchParams) -> dict[str, int]:
        kind = INDEX_TYPES[candidate.kind]
        tuning = candidate.tuning_params(self.whole, seed=self.seed, effort=kind.effort, search_params=search_params)
        return kind.parameters_for(self.whole, tuning)

    def _tune_on_subsample(self, candidate: CandidateConfig) -> TunedIndex | None:
        """The kind with a quarter of the sample, tuned; None if the sample is all there is, or nothing can be."""
        held_out = max(len(questions.vectors) for questions in self.eval_queries)
        if self.whole <= len(self.rows) + held_out:
            return None
        few = self.rows.part(_SMALL_SHARE)
        asked = QuerySet.with_ground_truth(self.tuning_queries.direction, self.tuning_queries.vectors, few, self._top)
        try:
            built = TrialIndex(candidate, few, seed=self.seed)
            search_params = built.tune(asked, self.target)
        except UsageError:
            return None
        return search_params and self._tuned_index(built, search_params)

    def _extrapolate_to_all_rows(self, search_params: SearchParams, subsample: TunedIndex | None) -> SearchParams:
        """The setting for all rows, from what a quarter of the sample and the sample need."""
        if subsample is None:
            return search_params
        few, less = len(subsample.built.rows), subsample.search_params

        def extrapolate(small: int, large: int) -> int:
            return extrapolate_power_law((few, small), (len(self.rows), large), self.whole)

        effort = search_params.effort and extrapolate(less.effort or 1, search_params.effort)
        return SearchParams(
            effort=effort,
            rerank=min(extrapolate(less.rerank, search_params.rerank), MAX_RERANK) if search_params.rerank else 0,
        )


def _checked_queries(texts: Embeddings | None, images: Embeddings | None) -> list[Embeddings]:
    for given, modality in ((texts, "text"), (images, "image")):
        if given is not None and given.space.modality != modality:
            raise UsageError(
                f"{given.folder} holds {given.space.modality} embeddings; {modality} ones are needed here."
            )
    return [given for given in (texts, images) if given is not None]


def _given_params(tuning: TuningParams) -> dict[str, int]:
    return {name: value for name, value in asdict(tuning).items() if value is not None}


def retune(folder: Path, source: Embeddings, plan: Plan) -> SearchParams | None:
    """Give a new index of all rows of `source` the least effort that keeps the plan's promise, by its tuning questions.

    None, and nothing changes, if the kind has nothing to set, nothing it can be set to is enough, or so many answers
    are promised that a search compares all rows: by these any effort would do, and shorter answers need the plan's.
    """
    index = Index.open(folder)
    try:
        (view,) = index.snapshot.views
        start = _search_params_of(view.segment)
        if start.effort is None and not start.rerank:
            return None
        at, questions = plan.promise.at, plan.tuning_questions
        if view.uses_exact_scan(at):
            return None
        truth = exact_scores(source.blocks(), questions, at)

        def meets_target(search_params: SearchParams) -> bool:
            scores, _ = nearest([_with_search_params(view, search_params)], questions, at)
            return lower_bound(per_query_recall(scores, truth, at)) >= plan.promise.recall

        found = minimize_params(start, meets_target, max_effort=effort_limit(view.segment.index))
    finally:
        index.close()
    if found is not None and found != start:
        told, planned = (_describe_params(plan.kind, search_params) for search_params in (found, start))
        say(f"Measured on all {len(source):,} rows: {told}; the plan had {planned}.")
        with IndexWriter(folder) as writer:
            writer.set_search_params(effort=found.effort, rerank=found.rerank)
    return found


def _search_params_of(segment: SegmentReader) -> SearchParams:
    name = INDEX_TYPES[segment.meta.kind].effort
    effort = segment.meta.parameters[name] if name else None
    return SearchParams(effort=effort, rerank=segment.meta.rerank)


def _with_search_params(view: SegmentView, search_params: SearchParams) -> SegmentView:
    """The same segment, searched with a setting."""
    segment = copy(view.segment)
    meta = segment.meta
    told = search_params_dict(meta.kind, effort=search_params.effort, rerank=0)
    segment.meta = replace(meta, rerank=search_params.rerank, parameters=meta.parameters | told)
    if search_params.effort is not None:
        set_search_effort(segment.index, search_params.effort)
    return SegmentView(segment)


def _describe_params(kind: str, search_params: SearchParams) -> str:
    told = search_params_dict(kind, effort=search_params.effort, rerank=search_params.rerank)
    return ", ".join(f"{name} {value}" for name, value in told.items())


_WARM_UP = 10


@dataclass(frozen=True, kw_only=True)
class VerificationResult:
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


def verify_plan(index: Index, source: Embeddings, plan: Plan) -> VerificationResult:
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
    recalls = per_query_recall(found, truth, at)
    recall, p95_ms = float(recalls.mean()), float(np.percentile(seconds, 95)) * 1000
    breaks = [f"recall@{at} {recall:.4f} instead of {plan.promise.recall:g}"] if recall < plan.promise.recall else []
    if plan.promise.latency_ms is not None and p95_ms > plan.promise.latency_ms:
        breaks.append(f"{p95_ms:.3g} ms (p95) instead of {plan.promise.latency_ms:g}")
    return VerificationResult(
        recall=recall,
        bound=lower_bound(recalls),
        p50_ms=float(np.median(seconds)) * 1000,
        p95_ms=p95_ms,
        questions=len(questions),
        breaks=tuple(breaks),
    )
