#!/usr/bin/env python
"""An index on a GPU compared with the CPU: training lists, adding rows, searching; or why FAISS cannot use a GPU.

    benchmarks/run index_gpu [--rows 1000000 --dimension 512 --kinds flat ivf ivfsq ivfpq rabitq] [--json]

Both sides build from the same synthetic vectors with the same parameters and get the same text queries. For index types
that a GPU cannot search only the build is compared. Takes about five minutes with a GPU; --threads 0 uses all cores.
"""

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError
from vlm.index.ann.faiss_search import CopyToGpu, find_gpu, gpu_unavailable_reason, load_faiss
from vlm.index.ann.gpu import gpu_unsupported_reason
from vlm.index.ann.index_types import INDEX_TYPES, TuningParams, fill_index
from vlm.index.autotune.query_sampling import QuerySet, SampledRows
from vlm.tensor_types import Array, Float32

sys.path.insert(0, str(Path(__file__).parent))
from parts.index_vectors import draw_vectors
from parts.messages import say

_TOP = 10
_ROWS_AT_ONCE = 65_536
_TIE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the GPU index benchmark."""

    rows: int = 1_000_000
    """Number of synthetic image vectors."""

    dimension: int = 512
    """Dimension of the synthetic vectors."""

    questions: int = 1000
    """Number of text queries, searched as one batch and one by one."""

    kinds: tuple[str, ...] = ("flat", "ivf", "ivfsq", "ivfpq", "rabitq")
    """Index types."""

    threads: int = 0
    """FAISS threads on the CPU; 0 uses all cores."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the measurements and print the results.

    Raises:
        UsageError: FAISS cannot use a GPU.
    """
    copy = find_gpu()
    if copy is None:
        raise UsageError(f"FAISS cannot use a GPU here: {gpu_unavailable_reason()}.")
    if arguments.threads:
        load_faiss().omp_set_num_threads(arguments.threads)
    vectors, texts = draw_vectors(arguments.rows, arguments.questions, arguments.dimension, seed=0, decay=1.5)
    drawn = SampledRows(vectors)
    lowest = QuerySet.with_ground_truth("text→image", texts, drawn, _TOP).scores[:, -1]
    rows = [row for kind in arguments.kinds for row in _compare(kind, drawn, texts, lowest, copy)]
    command = shlex.join(["benchmarks/run", "index_gpu", *sys.argv[1:]])
    if arguments.json:
        show_json({"command": command, "rows": rows})
        return
    columns = list(rows[0])
    show_table(columns, [[row[column] for column in columns] for row in rows], title=f"{arguments.rows:,} rows")
    print(f"To repeat: {command}")


def _compare(
    kind: str, rows: SampledRows, texts: Float32[Array, "Q D"], lowest: Float32[Array, " Q"], copy: CopyToGpu
) -> Iterator[dict[str, Any]]:
    for where, chosen in (("CPU", None), ("GPU", copy)):
        say(f"{kind} on the {where} …")
        yield {"kind": kind, "on": where} | _measure(kind, rows, texts, lowest, chosen)


def _measure(
    kind: str, rows: SampledRows, texts: Float32[Array, "Q D"], lowest: Float32[Array, " Q"], copy: CopyToGpu | None
) -> dict[str, Any]:
    began = time.perf_counter()
    index: Any = INDEX_TYPES[kind](rows, TuningParams(), copy).index
    trained = time.perf_counter()
    for _ in fill_index(index, lambda: np.array_split(rows.vectors, ceil(len(rows) / _ROWS_AT_ONCE)), len(rows), copy):
        pass
    found = {"train s": f"{trained - began:.2f}", "add s": f"{time.perf_counter() - trained:.2f}"}
    reason = gpu_unsupported_reason(index) if copy else ""
    if reason:
        return found | dict.fromkeys(("batched / s", "one by one / s", "recall@10"), "–") | {"why not": reason}
    asked = copy(index) if copy else index
    _, positions = asked.search(texts, _TOP)
    scores = np.einsum("qd,qkd->qk", texts, rows.vectors[np.maximum(positions, 0)])
    recall = float(((scores >= lowest[:, None] - _TIE) & (positions >= 0)).mean())
    return found | {
        "batched / s": round(len(texts) / _seconds(lambda: asked.search(texts, _TOP))),
        "one by one / s": round(100 / _seconds(lambda: [asked.search(text[None], _TOP) for text in texts[:100]])),
        "recall@10": f"{recall:.4f}",
        "why not": "",
    }


def _seconds(work: Any) -> float:
    """Queries per second by the median of three times."""
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[1]


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except UsageError as error:
        sys.exit(print_error(str(error), 2))
