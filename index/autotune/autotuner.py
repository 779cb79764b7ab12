"""The autotuner: which index type, with which parameters, meets a target of recall, latency and memory.

`autotune` tries the candidate configurations on a sample and takes the fastest trial that meets the target; what it
returns, a `Plan`, holds every measurement. A sample can mislead, so the finished index is measured on all rows:
`retune` sets its search parameters again, and `verify_plan` says whether it meets the target.
"""

import json
import logging
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import lookup
from vlm.console import percent
from vlm.errors import UsageError
from vlm.index.ann.faiss_search import effort_limit, set_search_effort
from vlm.index.ann.index_types import INDEX_TYPES, MAX_RERANK, TuningParams, search_params_dict
from vlm.index.autotune.machine_limits import Machine, MachineLimits, machine_limits
from vlm.index.autotune.query_sampling import (
    MIN_REVERSED_ROWS,
    SHOWN,
    QuerySet,
    SampledRows,
    TuningSample,
    exact_scores,
    lower_bound,
    mean_recalls,
    per_query_recall,
    sample_queries,
)
from vlm.index.autotune.search_params import MAX_TRIED_RERANK, SearchParams, extrapolate_power_law, minimize_params
from vlm.index.autotune.trial import (
    CANDIDATE_CONFIGS,
    CandidateConfig,
    LatencyProbe,
    ReversedResult,
    Trial,
    TrialIndex,
    TunedIndex,
    TuningTarget,
    contenders,
    format_bytes,
    measure_reversed,
    one_thread,
    time_head_to_head,
    tuning_values,
)
from vlm.index.embeddings_folder import Embeddings
from vlm.index.reader import Index
from vlm.index.segments import SegmentReader, SegmentView, nearest
from vlm.index.writer import IndexWriter
from vlm.tensor_types import Array, Float32

logger = logging.getLogger(__name__)

MAX_ROWS = 50_000
MAX_QUERIES = 1000
# the share of the sample measured too when the sample is not all rows, to extrapolate from two sizes
_SUBSAMPLE_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The index type that meets the target, its parameters, why it was taken, and everything that was measured.

    The manifest of the index keeps it, so its fields are a format.

    promise: the target. direction: the one it was evaluated in. is_optimistic: queried with rows, or with others of
        their modality.
    num_rows, sample_rows: rows of all, and rows indexed in the trials.
    tuned_with, judged_by: number of queries to tune with, and to evaluate on by direction.
    left_out: configurations that were not tried, and why. unturned: reversed directions that were not, and why.
    machine: when one no longer is enough, and what a cluster would need.
    questions: queries of the target's direction it was evaluated on. tuning_questions: those it was tuned with.
    link_queries: others, whose answers a graph is to link. linked_with: their number; 0 where no graph was taken.
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
    machine: MachineLimits
    linked_with: int
    questions: Float32[Array, "Q D"] = field(repr=False, compare=False)
    tuning_questions: Float32[Array, "P D"] = field(repr=False, compare=False)
    link_queries: Float32[Array, "L D"] = field(repr=False, compare=False)

    @property
    def evidence(self) -> dict[str, Any]:
        """All of it but the queries, in the plain values that JSON has, for the manifest."""
        # through JSON, which turns tuples into lists and number keys into texts: as a manifest read back has them
        nothing = self.questions[:0]
        values = asdict(replace(self, questions=nothing, tuning_questions=nothing, link_queries=nothing))
        del values["questions"], values["tuning_questions"], values["link_queries"]
        return json.loads(json.dumps(values))

    @property
    def winner(self) -> Trial:
        """The trial that was taken."""
        # by its parameters too, because a type may be tried with few lists and with many
        parameters = self.tuning.set_values()
        return next(trial for trial in self.trials if trial.kind == self.kind and trial.wishes == parameters)


def autotune(
    source: Embeddings,
    texts: Embeddings | None,
    target: TuningTarget,
    *,
    images: Embeddings | None = None,
    kinds: Sequence[str] = (),
    max_rows: int = MAX_ROWS,
    max_queries: int = MAX_QUERIES,
    min_reversed_rows: int = MIN_REVERSED_ROWS,
    seed: int = 0,
) -> Plan:
    """The index type, and its parameters, that meets a target for all rows of `source` with the least latency.

    texts, images: queries, none of them a row; the target is about the texts, else the images, else held-out rows,
        whose recall is better than that of the other modality. Given enough of the other modality
        (`min_reversed_rows`), each configuration is also measured in the reversed direction: these as rows, held-out
        rows as queries.
    kinds: index types that may be taken; none: all candidates.
    max_rows: of the sample; effort and latency are extrapolated to all rows from a quarter of it and all of it.
    max_queries: to tune with, and to evaluate on, at most.

    Raises:
        UsageError: no configuration meets the target (the closest is named), an index type is unknown, or the queries
            are of another model.
    """
    for kind in kinds:
        lookup(INDEX_TYPES, kind, "index kind")
    # a misspelt type or queries of another model must fail before minutes of trials
    query_sources = _checked_query_sources(texts, images)
    sample = sample_queries(
        source,
        query_sources,
        max_rows=max_rows,
        max_queries=max_queries,
        min_reversed_rows=min_reversed_rows,
        seed=seed,
    )
    is_optimistic = not query_sources or (texts is None and source.space.modality == "image")
    if is_optimistic:
        logger.info("No text queries were given: recall of %s is optimistic for text queries.", sample.target_direction)
    for direction, reason in sample.unturned.items():
        logger.info(f"{direction} is not measured: {reason}.")

    autotuner = _Autotuner(sample, target, num_rows=len(source), seed=seed)
    for candidate in CANDIDATE_CONFIGS:
        if not kinds or candidate.kind in kinds:
            autotuner.try_candidate(candidate)
    # trials ran minutes apart, and the machine's load may have changed; those that may win are timed again in turn
    autotuner.time_head_to_head()

    best = select_trial(autotuner.trials, target, left_out=autotuner.left_out)
    return Plan(
        kind=best.kind,
        tuning=TuningParams(**best.wishes),
        why=explain_choice(best, autotuner.trials, target),
        promise=target,
        direction=sample.target_direction,
        is_optimistic=is_optimistic,
        num_rows=len(source),
        sample_rows=len(sample.rows),
        tuned_with=len(sample.tuning_queries),
        judged_by={direction: len(queries) for direction, queries in sample.eval_queries.items()},
        trials=tuple(autotuner.trials),
        left_out=autotuner.left_out,
        unturned=sample.unturned,
        machine=_limits_here(best, source, sample),
        linked_with=len(sample.link_queries) if INDEX_TYPES[best.kind].is_graph else 0,
        questions=sample.eval_queries[sample.target_direction],
        tuning_questions=sample.tuning_queries,
        link_queries=sample.link_queries,
    )


def _limits_here(best: Trial, source: Embeddings, sample: TuningSample) -> MachineLimits:
    return machine_limits(
        best,
        num_rows=len(source),
        sample_rows=len(sample.rows),
        dimension=source.dimension,
        machine=Machine.present(),
    )


def _checked_query_sources(texts: Embeddings | None, images: Embeddings | None) -> list[Embeddings]:
    query_sources = []
    # texts first: the first source is the direction that the target is about
    for source, modality in ((texts, "text"), (images, "image")):
        if source is None:
            continue
        if source.space.modality != modality:
            raise UsageError(
                f"{source.folder} holds {source.space.modality} embeddings; {modality} ones are needed here."
            )
        query_sources.append(source)
    return query_sources


class _Autotuner:
    """Makes the trials, one candidate configuration after the other.

    trials: so far. left_out: configurations that were not tried, and why.
    """

    def __init__(self, sample: TuningSample, target: TuningTarget, *, num_rows: int, seed: int) -> None:
        self._target = target
        self._num_rows = num_rows
        self._seed = seed
        self._rows = sample.rows
        self._link_queries = sample.link_queries
        # ground truth is computed once, as deep as any recall that is reported
        self._top = max(*SHOWN, target.at)
        self._eval_queries: list[QuerySet] = []
        for direction, vectors in sample.eval_queries.items():
            self._eval_queries.append(QuerySet.with_ground_truth(direction, vectors, sample.rows, self._top))
        self._tuning_queries = QuerySet.with_ground_truth(
            sample.target_direction, sample.tuning_queries, sample.rows, self._top
        )
        self._reversed_sets: dict[str, tuple[SampledRows, QuerySet]] = {}
        for direction, rows in sample.turned.items():
            queries = QuerySet.with_ground_truth(direction, sample.held_out, rows, self._top)
            self._reversed_sets[direction] = (rows, queries)
        # of trials that may still win, by number: a probe holds its filled index, so others are dropped
        self._probes: dict[int, LatencyProbe] = {}
        self.trials: list[Trial] = []
        self.left_out: dict[str, str] = {}

    def try_candidate(self, candidate: CandidateConfig) -> None:
        """Build, tune, evaluate and time it, unless it cannot fit into memory or has too few rows."""
        name = candidate.kind
        if candidate.nlist_per_sqrt_rows:
            name = f"{candidate.kind} ({candidate.nlist_per_sqrt_rows}√N lists)"
        limit = self._target.memory_bytes
        try:
            # whether it can fit is known by formula, before it is built
            least = self._parameters(candidate, SearchParams(effort=None, rerank=0))
            needed = INDEX_TYPES[candidate.kind].resident_bytes(self._num_rows, self._rows.dimension, least)
            if limit is not None and needed > limit:
                self.left_out[name] = f"needs {format_bytes(needed)}"
                return
            built = self._build(candidate, self._rows)
        # too few rows for its lists, say: a reason to leave it out, not to give up
        except UsageError as error:
            self.left_out[name] = str(error).rstrip(".")
            return

        trial, probe = self._measure(candidate, built)
        self._probes[len(self.trials)] = probe
        self.trials.append(trial)
        # an index of the whole sample takes memory: those that can no longer win are let go
        for number in self._probes.keys() - contenders(self.trials):
            del self._probes[number]
        logger.info(
            f"{trial.label}: recall@{self._target.at} {percent(target_recall(trial, self._target))}, "
            f"p50 {trial.latency.p50_ms:.3g} ms, {format_bytes(trial.resident_bytes)}"
            + (f"; misses {' and '.join(trial.misses)}" if trial.misses else "")
        )

    def time_head_to_head(self) -> None:
        """Time the trials that may win again, in turn."""
        if len(self._probes) < 2:
            return
        latencies = time_head_to_head(self._probes, self._eval_queries[0].vectors, self._target.at)
        timings = []
        for number, (measured, expected) in latencies.items():
            trial = replace(self.trials[number], measured=measured, latency=expected)
            # a limit on latency may now be met, or missed
            self.trials[number] = replace(trial, misses=unmet_targets(trial, self._target))
            timings.append(f"{trial.label}: p50 {expected.p50_ms:.3g} ms")
        logger.info(f"Timed again, head to head: {'; '.join(timings)}.")

    def _measure(self, candidate: CandidateConfig, built: TrialIndex) -> tuple[Trial, LatencyProbe]:
        target = self._target
        kind = built.kind
        search_params = built.tune(self._tuning_queries, target)
        if search_params is None:
            # a configuration that cannot reach the recall is shown at its best
            search_params = SearchParams(effort=built.max_effort, rerank=MAX_TRIED_RERANK if built.is_reranked else 0)
        recalls = built.evaluate(search_params, self._eval_queries, target.at)

        # from here on for the index of all rows
        subsample = self._tune_on_subsample(candidate)
        full_params = self._extrapolate_to_all_rows(search_params, subsample)
        parameters = self._parameters(candidate, full_params)
        probe = LatencyProbe(
            full=self._tuned_index(built, search_params),
            subsample=subsample,
            num_distances=kind.num_distances(self._num_rows, parameters),
        )
        measured, expected = probe.time(self._eval_queries[0].vectors, target.at)

        recall: dict[str, dict[int, float]] = {}
        for direction, by_count in recalls.items():
            recall[direction] = mean_recalls(by_count)
        trial = Trial(
            kind=kind.name,
            wishes=tuning_values(candidate, self._num_rows, full_params, seed=self._seed),
            parameters=parameters,
            recall=recall,
            bound=lower_bound(recalls[self._tuning_queries.direction][target.at], seed=self._seed),
            measured=measured,
            latency=expected,
            resident_bytes=kind.resident_bytes(self._num_rows, self._rows.dimension, parameters),
            # two bytes a number: the float16 rows that reranking reads
            mapped_bytes=2 * self._num_rows * self._rows.dimension if built.is_reranked else 0,
            build_seconds=built.build_seconds,
            curve=built.curve(search_params, self._eval_queries[0], target.at),
            # with the search parameters of the forward direction: an index has only one setting
            turned=self._measure_reversed(candidate, search_params),
        )
        return replace(trial, misses=unmet_targets(trial, target)), probe

    def _build(self, candidate: CandidateConfig, rows: SampledRows) -> TrialIndex:
        link_queries = self._link_queries[: self._num_link_queries(rows)]
        return TrialIndex(candidate, rows, seed=self._seed, link_queries=link_queries)

    def _num_link_queries(self, rows: SampledRows) -> int:
        # as many for each row as the index of all rows will have
        return round(len(self._link_queries) * len(rows) / self._num_rows)

    def _tuned_index(self, built: TrialIndex, search_params: SearchParams) -> TunedIndex:
        rows = len(built.rows)
        parameters = built.parameters | tuning_values(built.candidate, rows, search_params, seed=self._seed)
        num_distances = built.kind.num_distances(rows, parameters)
        return TunedIndex(built=built, search_params=search_params, num_distances=num_distances)

    def _measure_reversed(self, candidate: CandidateConfig, search_params: SearchParams) -> dict[str, ReversedResult]:
        results = {}
        for direction, (rows, queries) in self._reversed_sets.items():
            # linked as this direction is, so that the same effort fits
            num_queries = self._num_link_queries(rows)
            result = measure_reversed(
                candidate,
                search_params,
                rows,
                queries,
                self._target.at,
                seed=self._seed,
                link_queries=self._rows.vectors[:num_queries],
            )
            if result is not None:
                results[direction] = result
        return results

    def _parameters(self, candidate: CandidateConfig, search_params: SearchParams) -> dict[str, int]:
        """All parameters of the index of all rows."""
        kind = INDEX_TYPES[candidate.kind]
        tuning = candidate.tuning_params(
            self._num_rows, seed=self._seed, effort=kind.effort, search_params=search_params
        )
        return kind.parameters_for(self._num_rows, tuning)

    def _tune_on_subsample(self, candidate: CandidateConfig) -> TunedIndex | None:
        """The configuration tuned on a quarter of the sample; None if the sample is all rows, or nothing suffices."""
        # queries that are rows are held out of the index, so the sample is at most this much smaller than all rows
        num_held_out = max(map(len, self._eval_queries))
        if self._num_rows <= len(self._rows) + num_held_out:
            return None
        rows = self._rows.part(_SUBSAMPLE_SHARE)
        queries = QuerySet.with_ground_truth(
            self._tuning_queries.direction, self._tuning_queries.vectors, rows, self._top
        )
        try:
            built = self._build(candidate, rows)
            search_params = built.tune(queries, self._target)
        except UsageError:
            return None
        return None if search_params is None else self._tuned_index(built, search_params)

    def _extrapolate_to_all_rows(self, search_params: SearchParams, subsample: TunedIndex | None) -> SearchParams:
        """The search parameters for all rows, from what the subsample and the sample need."""
        if subsample is None:
            return search_params
        subsample_rows = len(subsample.built.rows)
        subsample_params = subsample.search_params

        def extrapolate(small: int, large: int) -> int:
            return extrapolate_power_law((subsample_rows, small), (len(self._rows), large), self._num_rows)

        effort = search_params.effort
        if effort:
            effort = extrapolate(subsample_params.effort or 1, effort)
        factor = 0
        if search_params.rerank:
            factor = min(extrapolate(subsample_params.rerank, search_params.rerank), MAX_RERANK)
        return SearchParams(effort=effort, rerank=factor)


# medians closer to each other than this are equally fast: a machine's noise is of that size
_EQUALLY_FAST = 1.1


def select_trial(trials: Sequence[Trial], target: TuningTarget, *, left_out: dict[str, str]) -> Trial:
    """The trial that is preferred of those that meet the target (`TuningTarget.prefer`).

    By default the smallest of those within 10% of the lowest median latency.

    Raises:
        UsageError: none meets it; the message names the closest and what it has.
    """
    meeting = _meeting_target(trials)
    if meeting:
        fastest_ms = min(trial.latency.p50_ms for trial in meeting)
        # latencies differ by noise, memory does not, so among the equally fast the smallest is taken
        slack = {"speed": 1.0, "balanced": _EQUALLY_FAST, "memory": inf}[target.prefer]
        as_fast = [trial for trial in meeting if trial.latency.p50_ms <= fastest_ms * slack]
        return min(as_fast, key=lambda trial: (trial.resident_bytes, trial.latency.p50_ms))

    reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
    if not trials:
        raise UsageError(f"No index type can be tried for {target.describe()}. {reasons}.")
    closest = min(trials, key=lambda trial: _shortfall(trial, target))
    raise UsageError(
        f"No index type meets {target.describe()}. The closest is {closest.label}, with recall@{target.at} "
        f"{percent(target_recall(closest, target))}, {closest.latency.p95_ms:.3g} ms (p95) and "
        f"{format_bytes(closest.resident_bytes)}: it misses {' and '.join(closest.misses)}. "
        "Lower the target to what it has." + (f" Not tried: {reasons}." if reasons else "")
    )


def _meeting_target(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if not trial.misses]


def explain_choice(best: Trial, trials: Sequence[Trial], target: TuningTarget) -> str:
    """Why a trial was taken, in one sentence."""
    meeting = _meeting_target(trials)
    measurements = (
        f"recall@{target.at} {percent(target_recall(best, target))} (≥ {percent(best.bound)} with 95% confidence), "
        f"{best.latency.p95_ms:.3g} ms (p95), {format_bytes(best.resident_bytes)}"
    )
    if meeting == [best]:
        return f"{best.label} is the only one of {len(trials)} tried that meets {target.describe()}: {measurements}."
    fastest = min(meeting, key=lambda trial: trial.latency.p50_ms)
    if target.prefer == "memory":
        smallest = "is the smallest and the fastest" if fastest is best else "is the smallest"
        reason = f"{smallest} of {len(meeting)} that meet {target.describe()}"
    elif fastest is best:
        reason = f"is the fastest of {len(meeting)} that meet {target.describe()}"
    else:
        reason = f"needs the least memory of those as fast as {fastest.label} that meet {target.describe()}"
    return f"{best.label} {reason}: {measurements}."


def unmet_targets(trial: Trial, target: TuningTarget) -> tuple[str, ...]:
    """What of the target a trial does not meet, in words."""
    unmet = []
    if target_recall(trial, target) < target.recall:
        unmet.append(f"recall {target.recall:g}")
    if target.latency_ms is not None and trial.latency.p95_ms > target.latency_ms:
        unmet.append(f"{target.latency_ms:g} ms")
    if target.memory_bytes is not None and trial.resident_bytes > target.memory_bytes:
        unmet.append(format_bytes(target.memory_bytes))
    return tuple(unmet)


def target_recall(trial: Trial, target: TuningTarget) -> float:
    """Recall in the target's direction, which is the first, at its number of results."""
    return next(iter(trial.recall.values()))[target.at]


def _shortfall(trial: Trial, target: TuningTarget) -> float:
    """How far a trial is from the target: the largest ratio of measured to allowed; of recall, of the share missed."""
    # a target of 1 allows no miss at all, and a ratio to 0 would not rank the trials
    missed = (1 - target_recall(trial, target)) / max(1 - target.recall, 1e-3)
    latency = trial.latency.p95_ms / target.latency_ms if target.latency_ms else 0.0
    memory = trial.resident_bytes / target.memory_bytes if target.memory_bytes else 0.0
    return max(missed, latency, memory)


def retune(folder: Path, source: Embeddings, plan: Plan) -> SearchParams | None:
    """Set the least search parameters of a new index of all rows of `source` that reach the target's recall.

    They are measured with the plan's tuning queries. None, and nothing changes, if the index type has none, if none
    suffice, or if the target has so many results that a search compares all rows: these searches ignore the search
    parameters, but shorter ones still need the plan's.
    """
    index = Index.open(folder)
    try:
        # a new index has just one segment
        (view,) = index.snapshot.views
        planned = _search_params_of(view.segment)
        at = plan.promise.at
        if (planned.effort is None and not planned.rerank) or view.uses_exact_scan(at):
            return None
        queries = plan.tuning_questions
        truth = exact_scores(source.blocks(), queries, at)

        def meets_target(search_params: SearchParams) -> bool:
            # by the lower bound of the recall, because other queries than these will be searched
            scores, _ = nearest([_with_search_params(view, search_params)], queries, at)
            return lower_bound(per_query_recall(scores, truth, at)) >= plan.promise.recall

        least = minimize_params(planned, meets_target, max_effort=effort_limit(view.segment.index))
    finally:
        index.close()
    if least is not None and least != planned:
        logger.info(
            f"Measured on all {len(source):,} rows: {_describe_params(plan.kind, least)}; "
            f"the plan had {_describe_params(plan.kind, planned)}."
        )
        with IndexWriter(folder) as writer:
            writer.set_search_params(effort=least.effort, rerank=least.rerank)
    return least


def _search_params_of(segment: SegmentReader) -> SearchParams:
    name = INDEX_TYPES[segment.meta.kind].effort
    effort = segment.meta.parameters[name] if name else None
    return SearchParams(effort=effort, rerank=segment.meta.rerank)


def _with_search_params(view: SegmentView, search_params: SearchParams) -> SegmentView:
    """The same open segment, searched with other parameters; the two share their FAISS index."""
    # a shallow copy, so that the view itself keeps its parameters
    segment = copy(view.segment)
    meta = segment.meta
    changed = search_params_dict(meta.kind, effort=search_params.effort, rerank=0)
    segment.meta = replace(meta, rerank=search_params.rerank, parameters=meta.parameters | changed)
    if search_params.effort is not None:
        set_search_effort(segment.index, search_params.effort)
    return SegmentView(segment)


def _describe_params(kind: str, search_params: SearchParams) -> str:
    values = search_params_dict(kind, effort=search_params.effort, rerank=search_params.rerank)
    return ", ".join(f"{name} {value}" for name, value in values.items())


_WARM_UP_QUERIES = 10


@dataclass(frozen=True, kw_only=True)
class VerificationResult:
    """What the finished index has, searched as users do but without the model and the catalogue.

    recall: in the target's direction, at its number of results. bound: its lower bound, with 95% confidence.
    p50_ms, p95_ms: latency of single queries on one thread. questions: number of queries.
    breaks: what of the target is not met, in words; empty: all of it is met.
    """

    recall: float
    bound: float
    p50_ms: float
    p95_ms: float
    questions: int
    breaks: tuple[str, ...]


def verify_plan(index: Index, source: Embeddings, plan: Plan) -> VerificationResult:
    """Search the index for the plan's evaluation queries and compare with all rows of `source`."""
    target = plan.promise
    queries = plan.questions
    truth = exact_scores(source.blocks(), queries, target.at)
    # -inf stays where the index finds fewer rows than there are
    scores = np.full(truth.shape, -np.inf, np.float32)
    seconds = []
    with one_thread():
        # the first searches read the mapped files from disk
        index.nearest(queries[:_WARM_UP_QUERIES], target.at)
        for number, query in enumerate(queries):
            before = time.perf_counter()
            query_scores, _ = index.nearest(query[None], target.at)
            # one query at a time: the target's latency is that of a user who waits for an answer
            seconds.append(time.perf_counter() - before)
            scores[number, : query_scores.shape[1]] = query_scores[0]

    recalls = per_query_recall(scores, truth, target.at)
    recall = float(recalls.mean())
    p95_ms = float(np.percentile(seconds, 95)) * 1000
    breaks = []
    if recall < target.recall:
        # two decimals: with one, a near miss would read as the target itself
        breaks.append(f"recall@{target.at} {recall:.2%} instead of {100 * target.recall:g}%")
    if target.latency_ms is not None and p95_ms > target.latency_ms:
        breaks.append(f"{p95_ms:.3g} ms (p95) instead of {target.latency_ms:g}")
    return VerificationResult(
        recall=recall,
        bound=lower_bound(recalls),
        p50_ms=float(np.median(seconds)) * 1000,
        p95_ms=p95_ms,
        questions=len(queries),
        breaks=tuple(breaks),
    )
