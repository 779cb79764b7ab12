"""The finished index against what its plan promised."""

import time
from dataclasses import dataclass

import numpy as np

from vlm.index.embeddings import Embeddings
from vlm.index.planner.choice import Plan
from vlm.index.planner.recall import exact_scores, lower_bound, recall_of_each
from vlm.index.planner.trial import one_thread
from vlm.index.read import Index

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
