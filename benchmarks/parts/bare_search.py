"""The bare calls under a search: the model's on each text, FAISS's on each vector; run as a process.

python benchmarks/parts/bare_search.py REQUEST     (JSON: index, texts, vectors, top, seconds) → JSON on stdout
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlm.index.reader import Index
from vlm.service.query import load_query_encoder


def measure_bare_calls(
    index: str, texts: list[str], vectors: list[list[float]], top: int, seconds: float
) -> dict[str, dict[str, float]]:
    """CPU and wall time in milliseconds of a query, by kind, one after the other."""
    opened = Index.open(Path(index))
    model = load_query_encoder(opened.details.space.model)
    matrix = np.asarray(vectors, np.float32)

    def by_text(number: int) -> Any:
        return opened.search(np.asarray(model.embed_texts([texts[number % len(texts)]])), top)

    def by_vector(number: int) -> Any:
        return opened.search(matrix[[number % len(matrix)]], top)

    return {"texts, all different": _timed(by_text, seconds), "vectors": _timed(by_vector, seconds)}


def _timed(ask: Callable[[int], Any], seconds: float) -> dict[str, float]:
    ask(0)
    cpu, began, number = time.process_time(), time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        number += 1
        ask(number)
    wall = time.perf_counter() - began
    return {"cpu_ms": 1000 * (time.process_time() - cpu) / number, "wall_ms": 1000 * wall / number}


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    print(json.dumps(measure_bare_calls(**request)))
