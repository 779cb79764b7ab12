"""From how many rows on one machine no longer is enough for an index, and what a cluster would need: sums, written out.

Measured are the memory of a row in the index that was taken, and the time of a query; the rest is multiplied in view of
the reader, so that another machine or another size can be put in.
"""

from dataclasses import dataclass
from math import ceil

import psutil

from vlm.console import pluralize
from vlm.index.autotune.trial import Trial, format_bytes

_INDEX_SHARE = 0.8
"""Of a machine's memory, for the index; the rest is for the system, the model and the server."""

_CLUSTER_SHARE = 0.7
"""Of a node's memory, for vectors; the rest is for metadata, segments that are being built, and the system."""

# edges of a node of Milvus's HNSW at its default M, on the level that has all nodes; 4 bytes each
_HNSW_EDGES = 2 * 16
_MORE_ROWS = 10


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Memory in bytes, and cores."""

    memory_bytes: int
    cores: int

    @classmethod
    def present(cls) -> "Machine":
        """This one."""
        return cls(memory_bytes=psutil.virtual_memory().total, cores=psutil.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """Where one machine ends.

    row_bytes: memory of a row in the index. max_rows: that fit into this machine's memory. queries_per_second: of all
    its cores. cluster_row_bytes: memory of a row in Milvus, as float32 with a graph. cluster_rows: for which
    cluster_nodes machines like this one are needed. arithmetic: the sums, a sentence each.
    """

    num_rows: int
    row_bytes: float
    max_rows: int
    queries_per_second: float
    cluster_row_bytes: int
    cluster_rows: int
    cluster_nodes: int
    arithmetic: tuple[str, ...]

    @property
    def is_enough(self) -> bool:
        """Whether all rows fit into one machine."""
        return self.num_rows <= self.max_rows


def machine_limits(trial: Trial, *, num_rows: int, sample_rows: int, dimension: int, machine: Machine) -> MachineLimits:
    """The limits for the index type that was taken, with all its rows.

    >>> from vlm.index.autotune.trial import Latency
    >>> latency = Latency(p50_ms=2.0, p95_ms=3.0, p99_ms=4.0, per_second=500.0)
    >>> trial = Trial(kind="flat", wishes={}, parameters={}, recall={}, bound=1.0, measured=latency, latency=latency,
    ...               resident_bytes=2_048_000_000, mapped_bytes=0, build_seconds=1.0)
    >>> limits = machine_limits(trial, num_rows=1_000_000, sample_rows=50_000, dimension=512,
    ...                         machine=Machine(memory_bytes=16_000_000_000, cores=4))
    >>> limits.max_rows, limits.cluster_rows, limits.cluster_nodes
    (6250000, 10000000, 2)
    >>> limits.arithmetic[0]
    '1,000,000 rows × 2,048 B (flat) = 2.05 GB of the 12.8 GB that are 80% of 16 GB: they fit, up to 6,250,000 rows.'
    """
    row_bytes = trial.resident_bytes / max(1, num_rows)
    room = _INDEX_SHARE * machine.memory_bytes
    max_rows = int(room / max(row_bytes, 1e-9))
    per_second = trial.latency.per_second * machine.cores
    # what no longer fits now, or else what ten times as many would need
    cluster_rows = num_rows if num_rows > max_rows else _MORE_ROWS * num_rows
    vector_bytes = 4 * dimension
    cluster_row_bytes = vector_bytes + 4 * _HNSW_EDGES
    cluster_bytes = cluster_rows * cluster_row_bytes
    node_bytes = _CLUSTER_SHARE * machine.memory_bytes
    nodes = max(1, ceil(cluster_bytes / node_bytes))
    verdict = f"they fit, up to {max_rows:,} rows" if num_rows <= max_rows else f"only {max_rows:,} rows fit"
    rows_per_second = sample_rows / max(trial.build_seconds, 1e-9)
    arithmetic = (
        f"{num_rows:,} rows × {row_bytes:,.0f} B ({trial.label}) = {format_bytes(trial.resident_bytes)} of the "
        f"{format_bytes(room)} that are {_INDEX_SHARE:.0%} of {format_bytes(machine.memory_bytes)}: {verdict}.",
        f"{machine.cores} cores × {trial.latency.per_second:,.0f} queries/s = {per_second:,.0f} queries/s; more than "
        "that needs copies of the index on other machines.",
        f"{num_rows:,} rows ÷ {rows_per_second:,.0f} rows/s (as the sample was built) = "
        f"{num_rows / rows_per_second:,.0f} s to build.",
        f"In Milvus (HNSW, float32) {cluster_rows:,} rows × ({dimension} × 4 + {_HNSW_EDGES} × 4 = "
        f"{cluster_row_bytes:,} B) = {format_bytes(cluster_bytes)} ÷ ({_CLUSTER_SHARE:.0%} of "
        f"{format_bytes(machine.memory_bytes)}) = {pluralize(nodes, 'query node')} like this one.",
    )
    return MachineLimits(
        num_rows=num_rows,
        row_bytes=row_bytes,
        max_rows=max_rows,
        queries_per_second=per_second,
        cluster_row_bytes=cluster_row_bytes,
        cluster_rows=cluster_rows,
        cluster_nodes=nodes,
        arithmetic=arithmetic,
    )
