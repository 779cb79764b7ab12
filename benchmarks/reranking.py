#!/usr/bin/env python
"""Recall and latency of text search with and without re-ranking the top results, by captioners and poly-encoders.

    benchmarks/run reranking INDEX MODEL [MODEL …] [--queries 1000] [--top 50] [--language en] [--json]

The index must hold images with captions that the models have not seen. On the synthetic shapes:

    vlm quickstart
    vlm train tiny-coca --data quickstart-out/shards/train --val quickstart-out/shards/val \\
        --run quickstart-out/captioner --tokenizer quickstart-out/tokenizer.model
    vlm embed quickstart-out/captioner quickstart-out/shards/val held-out
    vlm index build held-out held-out-index
    vlm embed quickstart-out/captioner quickstart-out/shards/train seen
    vlm index fit-reranker seen poly-encoder
    benchmarks/run reranking held-out-index quickstart-out/captioner poly-encoder

Each image's first caption is a query; every image with this caption is correct. Of the same results several orders are
compared: by cosine, by each MODEL's score (likelihood of a captioner, or that of a poly-encoder), and by reciprocal
rank fusion of the two (`fuse_ranks`). All rerankers get the same queries.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from vlm.cli.main import print_error
from vlm.console import show_fields, show_json, show_table, track
from vlm.errors import UsageError, VlmError
from vlm.evaluation.bootstrap import paired_difference
from vlm.service.ranking import ScoredRanking, fuse_ranks
from vlm.service.search import Query, SearchResult, SearchService

_COUNTS = (1, 5, 10)
_COSINE = "cosine"
_FUSED = "{} and cosine"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the re-ranking benchmark."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Index of held-out images."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """MODELs with a caption decoder, or folders of vlm index fit-reranker."""

    queries: int = 1000
    """Number of caption queries; a random subset if there are more."""

    top: int = 50
    """Number of results to re-rank."""

    language: str = "en"
    """Language of the captions; empty if they name none."""

    seed: int = 0
    """Random seed of the subset, and of the intervals' resamples."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Run the queries and print the results."""
    if not arguments.models:
        raise UsageError("Name a MODEL to re-rank with.")
    ranks: dict[str, np.ndarray] = {}
    milliseconds: dict[str, dict[str, float]] = {}
    services = [SearchService.open(arguments.index, rerank_spec=model) for model in arguments.models]
    texts = _captions(services[0], arguments)
    for model, service in zip(arguments.models, services, strict=True):
        by_order, spent = _ask(service, texts, arguments, Path(model).name)
        ranks |= by_order
        milliseconds[Path(model).name] = spent
    result = {
        "command": shlex.join(["benchmarks/run", "reranking", *sys.argv[1:]]),
        "rows": len(services[0].index),
        "questions": len(texts),
        "top": arguments.top,
        "recall": {order: _recalls(found) for order, found in ranks.items()},
        "less_cosine": {order: _less_cosine(ranks, order, arguments.seed) for order in ranks if order != _COSINE},
        "first_only": {order: _first_only(ranks, order) for order in ranks if order != _COSINE},
        "ms": milliseconds,
    }
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def _ask(
    service: SearchService, texts: tuple[str, ...], arguments: Arguments, name: str
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The ranks of the right images in each order, and milliseconds a query: medians, and of re-ranking the 95th."""
    service.search(Query(texts=texts[:1], top=arguments.top, rerank_top=arguments.top))
    ranks: dict[str, list[float]] = {_COSINE: [], name: [], _FUSED.format(name): []}
    milliseconds: dict[str, list[float]] = {part: [] for part in ("embed", "search", "rerank")}
    for text in track(texts, total=len(texts), what=f"asking {name}"):
        answer = service.search(Query(texts=(text,), top=arguments.top, rerank_top=arguments.top))
        for order, rank in zip(ranks, _ranks(answer, text, arguments.language), strict=True):
            ranks[order].append(rank)
        for part, spent in milliseconds.items():
            spent.append(getattr(answer, f"{part}_milliseconds"))
    medians = {part: float(np.median(spent)) for part, spent in milliseconds.items()}
    medians["rerank_p95"] = float(np.percentile(milliseconds["rerank"], 95))
    return {order: np.array(found) for order, found in ranks.items()}, medians


def _captions(service: SearchService, arguments: Arguments) -> tuple[str, ...]:
    rows = np.random.default_rng(arguments.seed).permutation(service.index.snapshot.rows)[: arguments.queries]
    found = [entry.captions.get(arguments.language, ()) for entry in service.index.catalogue.entries(rows.tolist())]
    texts = tuple(captions[0] for captions in found if captions)
    if not texts:
        raise UsageError(
            f"No row of {arguments.index} has a caption in {arguments.language!r}; choose another --language."
        )
    return texts


def _ranks(answer: SearchResult, text: str, language: str) -> tuple[float, float, float]:
    """The rank of the first correct image, from 1: by cosine, re-ranked, fused; infinite if it is not among them."""
    hits = answer.hits
    is_right = np.array([text in hit.entry.captions.get(language, ()) for hit in hits])
    if not is_right.any():
        return np.inf, np.inf, np.inf
    by_reranker = np.arange(len(hits))
    by_cosine = np.argsort([-hit.score for hit in hits], kind="stable")
    by_rank = -np.arange(len(hits), dtype=np.float64)
    places, scores = fuse_ranks([ScoredRanking(rows=order, scores=by_rank) for order in (by_cosine, by_reranker)])
    fused = places[np.argsort(-scores, kind="stable")]
    first, second, third = (float(np.argmax(is_right[order])) + 1 for order in (by_cosine, by_reranker, fused))
    return first, second, third


def _recalls(ranks: np.ndarray) -> dict[str, float]:
    found = {str(count): float((ranks <= count).mean()) for count in _COUNTS}
    return found | {"top": float(np.isfinite(ranks).mean())}


def _less_cosine(ranks: dict[str, np.ndarray], order: str, seed: int) -> list[float | None]:
    """Recall@1 less that by cosine, with its 95% interval over the queries."""
    is_first = {name: ranks[name] == 1 for name in (_COSINE, order)}
    told = paired_difference(is_first[_COSINE], is_first[order], rng=np.random.default_rng(seed))
    return [told.difference, told.low, told.high]


def _first_only(ranks: dict[str, np.ndarray], order: str) -> list[float]:
    """The share of queries whose correct image comes first in this order alone, and by cosine alone."""
    here, there = ranks[order] == 1, ranks[_COSINE] == 1
    return [float((here & ~there).mean()), float((there & ~here).mean())]


def _show(result: dict[str, Any]) -> None:
    columns = ["ordered by", *(f"R@{count}" for count in _COUNTS), f"among the {result['top']}", "R@1 less cosine"]
    rows: list[list[Any]] = []
    for order, found in result["recall"].items():
        row: list[Any] = [order, *found.values(), ""]
        if order in result["less_cosine"]:
            difference, low, high = result["less_cosine"][order]
            row[-1] = f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        rows.append(row)
    show_table(columns, rows, title=f"{result['questions']:,} caption queries over {result['rows']:,} images")
    fields: dict[str, Any] = {}
    for order, (here, there) in result["first_only"].items():
        fields[f"right first by {order} alone, by cosine alone"] = f"{here:.1%}, {there:.1%}"
    for name, spent in result["ms"].items():
        medians = ", ".join(f"{part} {spent[part]:.1f}" for part in ("embed", "search", "rerank"))
        fields[f"median ms per query, {name}"] = f"{medians} (p95 {spent['rerank_p95']:.1f})"
    show_fields(fields)
    print(f"To repeat: {result['command']}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
