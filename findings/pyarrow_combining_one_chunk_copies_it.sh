#!/usr/bin/env bash
# pyarrow 26.0.1: `ChunkedArray.combine_chunks()` copies a column that has a single chunk already, numbers and texts alike.
# Of a memory-mapped file that is the whole column in the process's own memory. `Table.combine_chunks()` of the same table
# copies nothing, nor do `column.chunk(0)` and `column.to_numpy()`.
# Why it matters: an index of shards or a table of embeddings is mapped so that all workers share its pages; the call that
# is written to get one array "without a copy where there is one chunk" gives each worker its own. The cure:
# `column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()`, or combine the table.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "pyarrow==26.0.1" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import sys

import numpy as np
import pyarrow as pa

path = sys.argv[1]
table = pa.table({"n": np.arange(1_000_000), "key": [f"{number:08}" for number in range(1_000_000)]})
with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
    writer.write_table(table)
del table
mapped = pa.ipc.open_file(pa.memory_map(path)).read_all()


def copied(call):
    """Bytes that pyarrow holds more while the result lives."""
    before = pa.total_allocated_bytes()
    kept = call()
    return pa.total_allocated_bytes() - before if kept is not None else 0


for name in ("n", "key"):
    column = mapped.column(name)
    assert column.num_chunks == 1
    size, combined, chunk = column.nbytes, copied(column.combine_chunks), copied(lambda: column.chunk(0))
    print(f"{name}: one chunk of {size:,} bytes; combine_chunks copies {combined:,}, chunk(0) {chunk:,}")
    assert combined > 0.9 * size and chunk == 0
whole, numbers = copied(mapped.combine_chunks), copied(lambda: mapped.column("n").to_numpy())
print(f"the table's combine_chunks copies {whole:,} bytes, to_numpy {numbers:,}")
assert whole == numbers == 0
CODE
"$work/venv/bin/python" "$work/seen.py" "$work/table.arrow"
