#!/usr/bin/env python
"""Whether codes of unit rows find more true neighbours by Euclidean distance than by inner product.

    benchmarks/run code_metrics IMAGES [--texts TEXTS] [--json]

IMAGES and TEXTS are embeddings folders of one model. The same codes are searched by both measures, all lists read, so
that only the codes lose rows. Shown is the share of the true ten nearest images among the first 10 to 320 codes, for
texts and for held-out images as queries.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import tyro

from vlm.console import show_json, show_table
from vlm.index.ann.index_types import default_lists, num_subvectors

sys.path.insert(0, str(Path(__file__).parent))
from parts.index_vectors import read_vectors

AT = 10
FACTORS = (1, 2, 4, 8, 16, 32)
METRICS = {"inner product": faiss.METRIC_INNER_PRODUCT, "Euclidean": faiss.METRIC_L2}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of code metrics."""

    images: Annotated[Path, tyro.conf.Positional]
    """Embeddings folder of images."""

    texts: Path | None = None
    """Embeddings folder of texts as queries."""

    queries: int = 1000
    """Number of queries of each kind; so many images are held out."""

    json: bool = False
    """Print the results as JSON."""


def recalls(images: np.ndarray, queries: np.ndarray, *, description: str, metric: int, lists: int) -> list[float]:
    """Share of the true nearest among the first codes, for each factor."""
    truth = np.argsort(-(queries @ images.T), axis=1)[:, :AT]
    index = faiss.index_factory(images.shape[1], description, metric)
    index.cp.spherical, index.cp.seed, index.nprobe = True, 0, lists
    index.train(images)
    index.add(images)
    _, found = index.search(queries, AT * FACTORS[-1])
    return [
        float(
            np.mean(
                [np.isin(nearest, codes[: AT * factor]).mean() for nearest, codes in zip(truth, found, strict=True)]
            )
        )
        for factor in FACTORS
    ]


def measure(arguments: Arguments) -> list[dict[str, Any]]:
    """A row for each kind of query, code and metric."""
    images = read_vectors(arguments.images)
    cases = {"images": (images[arguments.queries :], images[: arguments.queries])}
    if arguments.texts:
        cases["texts"] = (images, read_vectors(arguments.texts)[: arguments.queries])
    rows: list[dict[str, Any]] = []
    for name, (indexed, queries) in cases.items():
        lists = default_lists(len(indexed))
        codes = {
            "ivfpq": f"IVF{lists},PQ{num_subvectors(images.shape[1])}x4fs",
            "rabitq": f"IVF{lists},RaBitQ",
            "ivfsq": f"IVF{lists},SQ8",
        }
        for code, description in codes.items():
            for metric, number in METRICS.items():
                values = recalls(indexed, queries, description=description, metric=number, lists=lists)
                rows.append({"queries": name, "codes": code, "metric": metric, "recall": values})
    return rows


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    rows = measure(arguments)
    if arguments.json:
        show_json(rows)
    else:
        columns = ["queries", "codes", "metric", *(f"of {AT * factor}" for factor in FACTORS)]
        shown = [[row["queries"], row["codes"], row["metric"], *(f"{x:.4f}" for x in row["recall"])] for row in rows]
        show_table(columns, shown)
