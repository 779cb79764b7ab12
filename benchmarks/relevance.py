#!/usr/bin/env python
"""Precision and recall of `--relevant`, on fashion types and on captions beside queries about what is not there.

    benchmarks/run relevance --fashion INDEX --flickr8k INDEX [--captions 500] [--json]

Both are indexes of photos that the model has not seen. Fashion: every article type of the rows is a query, and all rows
of that type are relevant. Flickr8k: first captions are queries, each with its own photo as the only relevant row, which
makes precision a lower bound; `parts/absent_queries.txt` has 100 queries about things that the photos do not show, to
which no row at all is the right answer. Hits of all probabilities are found once, and cut at each probability.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError, VlmError
from vlm.service.query import Query
from vlm.service.search import SearchResult, SearchService

PROBABILITIES = (0.5, 0.75, 0.9, 0.95, 0.99)
ABSENT_QUERIES = Path(__file__).parent / "parts" / "absent_queries.txt"

# the least that a query may ask for: all but the farthest rows
_ALL = 1e-9


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the relevance benchmark."""

    fashion: Path | None = None
    """Index of fashion photos, with articleType in their metadata."""

    flickr8k: Path | None = None
    """Index of Flickr8k photos with captions."""

    captions: int = 500
    """Number of captions as queries; a random subset if there are more."""

    seed: int = 0
    """Random seed of the subset."""

    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a cut at one probability keeps, of queries with relevant rows and of queries about what is not there.

    precision, recall: over the hits of all queries with relevant rows together; precision is None without a hit.
    answered: fraction of these queries with a hit. absent_answered: of the others, which is best 0.
    """

    probability: float
    hits: int
    precision: float | None
    recall: float
    answered: float
    absent_answered: float


def run(arguments: Arguments) -> None:
    """Search, cut and print."""
    if arguments.fashion is None and arguments.flickr8k is None:
        raise UsageError("Name an index: --fashion INDEX, --flickr8k INDEX, or both.")
    result: dict[str, Any] = {"command": shlex.join(["benchmarks/run", "relevance", *sys.argv[1:]])}
    if arguments.fashion is not None:
        service = SearchService.open(arguments.fashion)
        result["fashion"] = measure(service, type_queries(service))
    if arguments.flickr8k is not None:
        service = SearchService.open(arguments.flickr8k)
        result["flickr8k"] = measure(service, caption_queries(service, arguments.captions, arguments.seed))
    if arguments.json:
        show_json(result)
    else:
        _show(result)


def type_queries(service: SearchService) -> dict[str, set[int]]:
    """For each article type the rows of that type."""
    queries: dict[str, set[int]] = {}
    for row, entry in service.index.snapshot.entries():
        queries.setdefault(str(entry.metadata["articleType"]), set()).add(row)
    return queries


def caption_queries(service: SearchService, count: int, seed: int) -> dict[str, set[int]]:
    """For each of `count` first captions the rows that it belongs to."""
    queries: dict[str, set[int]] = {}
    for row, entry in service.index.snapshot.entries():
        first = next(iter(entry.captions.values()), ())[:1]
        for caption in first:
            queries.setdefault(caption, set()).add(row)
    names = np.random.default_rng(seed).permutation(sorted(queries))[:count].tolist()
    return {name: queries[name] for name in names}


def measure(service: SearchService, queries: dict[str, set[int]]) -> dict[str, Any]:
    """The cuts of these queries, and of the absent ones, over one index."""
    absent = ABSENT_QUERIES.read_text(encoding="utf-8").splitlines()
    results = _search_all(service, list(queries))
    absent_results = _search_all(service, absent)
    cuts = [asdict(_cut(probability, results, list(queries.values()), absent_results)) for probability in PROBABILITIES]
    return {
        "rows": len(service.index),
        "model": service.index.details.space.model,
        "queries": len(queries),
        "absent_queries": len(absent),
        "best_median": _median_best(results),
        "absent_best_median": _median_best(absent_results),
        "cuts": cuts,
    }


def _search_all(service: SearchService, texts: Sequence[str]) -> list[SearchResult]:
    top = len(service.index)
    return service.search_many([Query(texts=text, relevant=_ALL, top=top) for text in texts])


def _cut(
    probability: float, results: Sequence[SearchResult], relevant: Sequence[set[int]], absent: Sequence[SearchResult]
) -> Cut:
    num_hits = 0
    num_right = 0
    num_answered = 0
    for result, rows in zip(results, relevant, strict=True):
        hits = _rows_from(result, probability)
        num_hits += len(hits)
        num_right += len(hits & rows)
        num_answered += bool(hits)
    return Cut(
        probability=probability,
        hits=num_hits,
        precision=num_right / num_hits if num_hits else None,
        recall=num_right / sum(map(len, relevant)),
        answered=num_answered / len(results),
        absent_answered=float(np.mean([bool(_rows_from(result, probability)) for result in absent])),
    )


def _rows_from(result: SearchResult, probability: float) -> set[int]:
    return {hit.entry.row for hit in result if hit.probability is not None and hit.probability >= probability}


def _median_best(results: Sequence[SearchResult]) -> float:
    best = [max((hit.probability or 0.0 for hit in result), default=0.0) for result in results]
    return float(np.median(best))


def _show(result: dict[str, Any]) -> None:
    columns = ["probability", "hits", "precision", "recall", "answered", "absent answered"]
    for name in ("fashion", "flickr8k"):
        if name not in result:
            continue
        measured = result[name]
        rows: list[list[object]] = []
        for cut in measured["cuts"]:
            shares = ["–" if cut["precision"] is None else f"{cut['precision']:.1%}"]
            shares += [f"{cut[key]:.1%}" for key in ("recall", "answered", "absent_answered")]
            rows.append([f"{cut['probability']:g}", f"{cut['hits']:,}", *shares])
        title = (
            f"{name}: {measured['queries']:,} queries and {measured['absent_queries']} about what is not there, over "
            f"{measured['rows']:,} photos"
        )
        show_table(columns, rows, title=title)
    print(f"To repeat: {result['command']}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments, description=__doc__))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
