"""The index size benchmark as tables, with estimates for sizes that were not measured."""

from collections.abc import Callable
from itertools import pairwise
from math import log
from typing import Any

from vlm.index.ann.index_types import INDEX_TYPES, TuningParams
from vlm.index.autotune.trial import format_bytes

Steps = dict[str, dict[str, Any]]
Measured = dict[int, Steps]
Cells = tuple[list[str], list[list[str]]]

PAPER = (10**8, 10**9)
_CHANGES = ("build", "add", "delete", "compact", "check")
# row numbers (int64) of segments and generation, the order of the training sample, a mask of the live rows
_NUMBER_BYTES = 8 + 8 + 8 + 1


def steps_table(measured: Measured) -> Cells:
    """Seconds, CPU seconds and peak memory of each step at each size."""
    columns = ["step"] + [f"{rows:,}: {what}" for rows in measured for what in ("s", "CPU s", "peak GB")]
    cells = []
    for step in next(iter(measured.values())):
        line = [step]
        for steps in measured.values():
            found = steps[step]
            over = "" if found["kept_limit"] else " (over)"
            line += [f"{found['seconds']:.1f}", f"{found['cpu_s']:.1f}", f"{found['peak_mb'] / 1000:.2f}{over}"]
        cells.append(line)
    return columns, cells


def growth_table(measured: Measured) -> Cells:
    """Each cost per item at each size, and the power of the size with which it grows between neighbours."""
    sizes = list(measured)
    pairs = list(pairwise(sizes))
    columns = ["", *(f"{rows:,} rows" for rows in sizes), *(f"power {few:,} to {many:,}" for few, many in pairs)]
    cells = []
    for name, unit, cost in _COSTS:
        costs = {rows: cost(steps) for rows, steps in measured.items()}
        powers = (f"{_power(costs, few, many):+.2f}" for few, many in pairs)
        cells.append([f"{name}, {unit}", *(f"{value:.3g}" for value in costs.values()), *powers])
    return columns, cells


def searches_table(measured: Measured) -> Cells:
    """Queries with every filter, before and after the changes."""
    columns = [
        "rows",
        "index",
        "among",
        "rows chosen",
        "first filter ms",
        "filter ms",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "recall@10",
    ]
    cells = []
    for rows, steps in measured.items():
        for step, state in (("search", "as built"), ("search again", "after add and delete")):
            for among, found in steps[step].items():
                if isinstance(found, dict):
                    times = [f"{found[name]:.2f}" if name in found else "–" for name in _TIMES]
                    recall = f"{found['recall@10']:.4f}"
                    cells.append([f"{rows:,}", state, among, f"{found['rows']:,}", *times, recall])
    return columns, cells


def needs_table(measured: Measured, *, dimension: int) -> tuple[list[str], list[list[str]], str]:
    """Estimated needs of larger indexes, from the two largest sizes measured, and how they were derived."""
    few, many = sorted(measured)[-2:]
    largest = measured[many]
    cells = [["rows on disk, float16", *(format_bytes(2 * dimension * rows) for rows in PAPER)]]
    per_row = largest["build"]["catalogue_bytes"] / many
    cells.append(["catalog on disk", *(format_bytes(per_row * rows) for rows in PAPER)])
    cells += [
        [
            f"index of type {name}, in memory or mapped",
            *(format_bytes(_index_bytes(name, rows, dimension)) for rows in PAPER),
        ]
        for name in ("flat", "ivf", "ivfsq", "ivfpq", "rabitq", "hnsw")
    ]
    cells.append(["row numbers and masks while building, in memory", *(format_bytes(_NUMBER_BYTES * r) for r in PAPER)])
    for name, cost, powers in _TIMED:
        seconds = {rows: cost(measured[rows]) for rows in (few, many)}
        grown = (_carried(seconds, few, many, rows, powers) for rows in PAPER)
        cells.append([name, *(f"{value / 3600:,.1f} h" for value in grown)])
    return ["", *(f"{rows:.0e}".replace("e+0", "e") + " rows" for rows in PAPER)], cells, _RECKONING


def _index_bytes(kind: str, rows: int, dimension: int) -> int:
    return INDEX_TYPES[kind].resident_bytes(rows, dimension, INDEX_TYPES[kind].parameters_for(rows, TuningParams()))


def _power(costs: dict[int, float], few: int, many: int) -> float:
    return log(costs[many] / costs[few]) / log(many / few)


def _carried(seconds: dict[int, float], few: int, many: int, rows: int, powers: tuple[float, float]) -> float:
    """a N^p + b N^q through both sizes; if one of them would be negative, the other alone through the larger."""
    low, high = powers
    ratio = (many / few) ** low
    b = (seconds[many] - ratio * seconds[few]) / (many**high - ratio * few**high)
    a = (seconds[many] - b * many**high) / many**low
    if b < 0 or a < 0:
        power = low if b < 0 else high
        return seconds[many] * (rows / many) ** power
    return a * rows**low + b * rows**high


def _micros(step: str, field: str = "cpu_s") -> Callable[[Steps], float]:
    return lambda steps: 1e6 * steps[step][field] / steps[step]["items"]


def _bytes(field: str) -> Callable[[Steps], float]:
    return lambda steps: steps["build"][field] / steps["build"]["items"]


_TIMES = ("where_first_ms", "where_ms", "p50_ms", "p95_ms", "p99_ms")
_COSTS: list[tuple[str, str, Callable[[Steps], float]]] = [
    *((step, "CPU µs per row", _micros(step)) for step in _CHANGES),
    ("build: segment", "CPU µs per row", _micros("build", "segment_cpu_s")),
    ("build: catalog", "CPU µs per row", _micros("build", "catalogue_cpu_s")),
    ("compact: catalog", "CPU µs per row", _micros("compact", "catalogue_cpu_s")),
    ("catalog", "bytes per row", _bytes("catalogue_bytes")),
    ("FAISS index", "bytes per row", _bytes("faiss_bytes")),
    ("open", "ms", lambda steps: 1000 * steps["search"]["open_s"]),
    ("query", "CPU ms", lambda steps: steps["search"]["all"]["cpu_ms"]),
]
_TIMED: list[tuple[str, Callable[[Steps], float], tuple[float, float]]] = [
    ("build: segment, CPU", lambda steps: steps["build"]["segment_cpu_s"], (1.0, 1.5)),
    ("build: catalog, CPU", lambda steps: steps["build"]["catalogue_cpu_s"], (1.0, 1.15)),
    ("check, CPU", lambda steps: steps["check"]["cpu_s"], (1.0, 1.15)),
]
_RECKONING = (
    "Bytes of rows and indexes follow the index types' formulas with their default parameters; bytes of the catalog, "
    "those per row at the largest size measured. Hours are of one core of this machine, extrapolated from the two "
    "largest sizes as a N + b N^1.5 for the segment (training reads 50 rows per list and has 4 √N lists: N; every row "
    "is compared with 4 √N centroids: N^1.5) and as a N + b N^1.15 for the rest (sorting N rows: N log N)."
)
