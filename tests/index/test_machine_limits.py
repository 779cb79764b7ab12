"""When one machine is no longer enough: the sums are those that are shown."""

import re

import pytest

from vlm.index.autotune.machine_limits import Machine, machine_limits
from vlm.index.autotune.trial import Latency, Trial

GB = 10**9
LATENCY = Latency(p50_ms=2.0, p95_ms=3.0, p99_ms=4.0, per_second=500.0)


def trial(resident_bytes: int) -> Trial:
    """As measured for an exact index."""
    return Trial(
        kind="flat",
        wishes={},
        parameters={},
        recall={},
        bound=1.0,
        measured=LATENCY,
        latency=LATENCY,
        resident_bytes=resident_bytes,
        mapped_bytes=0,
        build_seconds=10.0,
    )


@pytest.mark.parametrize(
    ("rows", "gigabytes", "is_enough", "max_rows", "cluster_rows", "nodes"),
    [
        (1_000_000, 16, True, 6_250_000, 10_000_000, 2),
        (100_000_000, 64, False, 25_000_000, 100_000_000, 5),
        (1_000_000_000, 64, False, 25_000_000, 1_000_000_000, 49),
    ],
)
def test_what_fits_and_what_does_not(
    rows: int, gigabytes: int, is_enough: bool, max_rows: int, cluster_rows: int, nodes: int
) -> None:
    limits = machine_limits(
        trial(rows * 2048),
        num_rows=rows,
        sample_rows=50_000,
        dimension=512,
        machine=Machine(memory_bytes=gigabytes * GB, cores=8),
    )
    assert (limits.is_enough, limits.max_rows) == (is_enough, max_rows)
    assert (limits.cluster_rows, limits.cluster_nodes) == (cluster_rows, nodes)
    assert limits.queries_per_second == 4000
    memory, queries, building, cluster = limits.arithmetic
    assert f"{rows:,} rows × 2,048 B (flat)" in memory
    assert ("they fit" in memory) is is_enough
    assert "8 cores × 500 queries/s = 4,000 queries/s" in queries
    assert f"÷ 5,000 rows/s (as the sample was built) = {rows // 5000:,} s" in building
    assert f"{cluster_rows:,} rows × (512 × 4 + 32 × 4 = 2,176 B)" in cluster
    assert re.search(rf"= {nodes} query nodes? like this one", cluster)
