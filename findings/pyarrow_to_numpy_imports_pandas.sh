#!/usr/bin/env bash
# pyarrow 26.0.1: ParquetFile.read does not import pandas, and np.from_dlpack of a column does not, but read_table of the same file, to_numpy of the
# same column, and pa.array of a list or of an array of numpy import it where it is installed. Nothing of it is used: the numbers are equal.
# Why it matters: pandas comes with other packages, and every process that looks at one column of numbers then pays a third of a
# second and tens of megabytes: each worker of a data loader, each command.
# The cure: ParquetFile for files, np.from_dlpack(column.combine_chunks()) for columns of numbers without nulls.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "pyarrow==26.0.1" "pandas==3.1.1" "numpy==2.4.6" 2>/dev/null
cat >"$work/write.py" <<'CODE'
import sys

import pyarrow as pa
import pyarrow.parquet as pq

pq.write_table(pa.table({"size": [3, 1, 2]}), sys.argv[1])
CODE
cat >"$work/seen.py" <<'CODE'
import resource
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


column = pq.ParquetFile(sys.argv[1]).read().column("size")
assert "pandas" not in sys.modules
numbers = np.from_dlpack(column.combine_chunks())
assert "pandas" not in sys.modules
before, began = megabytes(), time.perf_counter()
if sys.argv[2] == "to_numpy":
    assert (column.to_numpy() == numbers).all()
elif sys.argv[2] == "read_table":
    pq.read_table(sys.argv[1])
elif sys.argv[2] == "list":
    pa.array([3, 1, 2])
else:
    pa.array(numbers)
assert "pandas" in sys.modules, "pandas is no longer imported: the finding is out of date"
print(f"{sys.argv[2]}: pandas imported, {time.perf_counter() - began:.2f} s, {megabytes() - before:.0f} MB more")
CODE
"$work/venv/bin/python" "$work/write.py" "$work/sizes.parquet"
for way in read_table to_numpy list array; do "$work/venv/bin/python" "$work/seen.py" "$work/sizes.parquet" "$way"; done
