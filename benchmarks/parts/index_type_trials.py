"""Every index type on the same rows: tuned for recall targets with one half of the texts, measured with the other."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from parts.messages import say

from vlm.errors import UsageError
from vlm.index.ann.index_types import INDEX_TYPES
from vlm.index.autotune.autotuner import autotune, retune
from vlm.index.autotune.query_sampling import QuerySet, SampledRows, exact_scores, lower_bound, per_query_recall
from vlm.index.autotune.trial import CANDIDATE_CONFIGS, TrialIndex, TuningTarget
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings
from vlm.index.reader import Index
from vlm.tensor_types import Array, Float32

AT = 10
_COUNTS = (1, 10, 100)
TEXTS, IMAGES = "text→image", "image→image"


@dataclass(frozen=True, kw_only=True)
class Material:
    """Rows in random order without those used as queries, and texts for tuning and for evaluation."""

    rows: SampledRows
    tune: QuerySet
    judge: list[QuerySet]

    @classmethod
    def of(cls, images: Path, planned: Path, asked: Path, *, questions: int, seed: int) -> "Material":
        """From embeddings folders. questions: number of images held out as queries."""
        source = np.concatenate(list(Embeddings.open(images).blocks()))
        shuffled = source[np.random.default_rng(seed).permutation(len(source))]
        rows, top = SampledRows(shuffled[questions:]), max(_COUNTS)
        ask = [(TEXTS, _all(asked)), (IMAGES, shuffled[:questions])]
        return cls(
            rows=rows,
            tune=QuerySet.with_ground_truth(TEXTS, _all(planned), rows, top),
            judge=[QuerySet.with_ground_truth(name, vectors, rows, top) for name, vectors in ask],
        )


def try_kinds(material: Material, promises: tuple[float, ...], *, seed: int) -> Iterator[dict[str, Any]]:
    """For each index type and target: the tuned parameters, the recall on unseen queries, and the cost."""
    for rung in CANDIDATE_CONFIGS:
        say(f"{rung.kind} …")
        built = TrialIndex(rung, material.rows, seed=seed)
        index_bytes = len(faiss.serialize_index(built.index)) / len(material.rows)
        shared = {
            "kind": rung.kind + (f" {built.parameters['nlist']}" if rung.nlist_per_sqrt_rows else ""),
            "build_s": built.build_seconds,
            "index_bytes": index_bytes,
            "mapped_bytes": 2 * material.rows.dimension if built.is_reranked else 0,
        }
        for promise in promises:
            setting = built.tune(material.tune, TuningTarget(recall=promise, at=AT))
            if setting is None:
                yield {**shared, "promise": promise, "failed": "not reached"}
                continue
            recalls = built.evaluate(setting, material.judge, AT)
            latency = built.time(setting, material.judge[0].vectors, AT)
            yield {
                **shared,
                "promise": promise,
                "effort": setting.effort,
                "rerank": setting.rerank,
                "recall": {way: {n: float(each.mean()) for n, each in found.items()} for way, found in recalls.items()},
                "bound": lower_bound(recalls[TEXTS][AT], seed=seed),
                "p50_ms": latency.p50_ms,
                "p95_ms": latency.p95_ms,
                "p99_ms": latency.p99_ms,
            }


def keep_promises(
    folder: Path, images: Path, planned: Path, asked: Path, promises: tuple[float, ...], *, sample: int
) -> Iterator[dict[str, Any]]:
    """The autotuner end to end: tuned on a sample with some texts, built on all rows, evaluated with others."""
    source, texts, questions = Embeddings.open(images), Embeddings.open(planned), _all(asked)
    truth = exact_scores(source.blocks(), questions, AT)
    for promise in promises:
        try:
            plan = autotune(source, texts, TuningTarget(recall=promise, at=AT), max_rows=sample)
        except UsageError as error:
            yield {"promise": promise, "failed": str(error)}
            continue
        out = folder / f"index-{promise}"
        build_index(
            images, out, kind=plan.kind, tuning=plan.tuning, link_queries=plan.link_queries, evidence=plan.evidence
        )
        setting = retune(out, source, plan)
        index = Index.open(out)
        recalls = per_query_recall(index.nearest(questions, AT)[0], truth, AT)
        index.close()
        tuned = {
            name: plan.winner.wishes[name] for name in ("nprobe", "ef_search", "rerank") if name in plan.winner.wishes
        }
        yield {
            "promise": promise,
            "chosen": plan.winner.label,
            "tuned": tuned,
            "settled": setting and asdict(setting),
            "expected": plan.winner.recall[plan.direction][AT],
            "expected_bound": plan.winner.bound,
            "measured": float(recalls.mean()),
            "bound": lower_bound(recalls),
            "questions": len(questions),
        }


def effort_of(trial: dict[str, Any]) -> str:
    """The search parameters of a trial, as a string."""
    name = INDEX_TYPES[trial["kind"].split()[0]].effort
    words = [f"{name} {trial['effort']}"] if name and trial["effort"] is not None else []
    return ", ".join([*words, *([f"rerank {trial['rerank']}"] if trial["rerank"] else [])]) or "–"


def _all(folder: Path) -> Float32[Array, "Q D"]:
    return np.concatenate(list(Embeddings.open(folder).blocks()))
