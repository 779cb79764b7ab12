#!/usr/bin/env python
"""Recall and latency of text search with and without re-ranking the top results, by a captioner or a poly-encoder.

    benchmarks/run reranking INDEX MODEL [--questions 1000] [--top 50] [--language en] [--json]

The index must hold images with captions that the model has not seen. On the synthetic shapes:

    vlm quickstart
    vlm train tiny-coca --data quickstart-out/shards/train --val quickstart-out/shards/val \\
        --run quickstart-out/captioner --tokenizer quickstart-out/tokenizer.model
    vlm embed quickstart-out/captioner quickstart-out/shards/val held-out
    vlm index build held-out held-out-index
    benchmarks/run reranking held-out-index quickstart-out/captioner

Each image's first caption is a query; every image with this caption is correct. Three orders of the same results are
compared: by cosine, by likelihood (or a poly-encoder's score), and by reciprocal rank fusion of the two (`fuse_ranks`).
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
from vlm.service.ranking import ScoredRanking, fuse_ranks
from vlm.service.search import Query, SearchResult, SearchService

_COUNTS = (1, 5, 10)
_ORDERS = ("cosine", "likelihood", "both")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the re-ranking benchmark."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Index of held-out images."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """MODEL with a caption decoder, or a folder of vlm index fit-reranker."""

    queries: int = 1000
    """Number of caption queries; a random subset if there are more."""

    top: int = 50
    """Number of results to re-rank."""

    language: str = "en"
    """Language of the captions; empty if they name none."""

    seed: int = 0
    """Random seed of the subset."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Run the queries and print the results."""
    service = SearchService.open(arguments.index, rerank_spec=arguments.model)
    texts = _captions(service, arguments)
    service.search(Query(texts=texts[:1], top=arguments.top, rerank_top=arguments.top))
    ranks: dict[str, list[float]] = {order: [] for order in _ORDERS}
    milliseconds: dict[str, list[float]] = {part: [] for part in ("embed", "search", "rerank")}
    for text in track(texts, total=len(texts), what="asking"):
        answer = service.search(Query(texts=(text,), top=arguments.top, rerank_top=arguments.top))
        for order, rank in _ranks(answer, text, arguments.language).items():
            ranks[order].append(rank)
        for part, spent in milliseconds.items():
            spent.append(getattr(answer, f"{part}_milliseconds"))
    result = {
        "command": shlex.join(["benchmarks/run", "reranking", *sys.argv[1:]]),
        "rows": len(service.index),
        "questions": len(texts),
        "top": arguments.top,
        "recall": {order: _recalls(np.array(found)) for order, found in ranks.items()},
        "likelihood_better": _share_better(ranks, "likelihood", "cosine"),
        "likelihood_worse": _share_better(ranks, "cosine", "likelihood"),
        "median_ms": {part: float(np.median(spent)) for part, spent in milliseconds.items()},
        "p95_ms": {part: float(np.percentile(spent, 95)) for part, spent in milliseconds.items()},
    }
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def _captions(service: SearchService, arguments: Arguments) -> tuple[str, ...]:
    rows = np.random.default_rng(arguments.seed).permutation(service.index.snapshot.rows)[: arguments.queries]
    found = [entry.captions.get(arguments.language, ()) for entry in service.index.catalogue.entries(rows.tolist())]
    texts = tuple(captions[0] for captions in found if captions)
    if not texts:
        raise UsageError(
            f"No row of {arguments.index} has a caption in {arguments.language!r}; choose another --language."
        )
    return texts


def _ranks(answer: SearchResult, text: str, language: str) -> dict[str, float]:
    """The rank of the first correct image in each order, from 1; infinite if it is not among the results."""
    hits = answer.hits
    is_right = np.array([text in hit.entry.captions.get(language, ()) for hit in hits])
    by_likelihood = np.arange(len(hits))
    by_cosine = np.argsort([-hit.score for hit in hits], kind="stable")
    by_rank = -np.arange(len(hits), dtype=np.float64)
    places, scores = fuse_ranks([ScoredRanking(rows=order, scores=by_rank) for order in (by_cosine, by_likelihood)])
    orders = {"cosine": by_cosine, "likelihood": by_likelihood, "both": places[np.argsort(-scores, kind="stable")]}
    return {name: float(np.argmax(is_right[order])) + 1 if is_right.any() else np.inf for name, order in orders.items()}


def _recalls(ranks: np.ndarray) -> dict[str, float]:
    found = {str(count): float((ranks <= count).mean()) for count in _COUNTS}
    return found | {"top": float(np.isfinite(ranks).mean())}


def _share_better(ranks: dict[str, list[float]], first: str, second: str) -> float:
    """The share of queries whose correct image is the first result in one order but not in the other."""
    return float(((np.array(ranks[first]) == 1) & (np.array(ranks[second]) > 1)).mean())


def _show(result: dict[str, Any]) -> None:
    columns = ["ordered by", *(f"R@{count}" for count in _COUNTS), f"among the {result['top']}"]
    rows = [[order, *found.values()] for order, found in result["recall"].items()]
    show_table(columns, rows, title=f"{result['questions']:,} caption queries over {result['rows']:,} images")
    show_fields(
        {
            "right first only by likelihood": f"{result['likelihood_better']:.1%}",
            "right first only by cosine": f"{result['likelihood_worse']:.1%}",
            "median ms per query": ", ".join(f"{part} {spent:.1f}" for part, spent in result["median_ms"].items()),
            "p95 ms per query": ", ".join(f"{part} {spent:.1f}" for part, spent in result["p95_ms"].items()),
        }
    )
    print(f"To repeat: {result['command']}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
