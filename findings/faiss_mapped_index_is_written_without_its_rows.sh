#!/usr/bin/env bash
# faiss-cpu 1.15.1: an index with lists that was read by IO_FLAG_MMAP is written without its rows. `write_index` raises nothing
# and leaves a file of some kilobytes (2.7 MB for the same index read whole), `serialize_index` as many bytes; reading the
# file raises, also beside the file that it came from. Searches of the mapped index itself are right. The newer
# IO_FLAG_MMAP_IFC maps too, and its index is written whole.
# Why it matters: the copy or the backup of an index that a server has open, or its conversion, is noticed when it is needed. The
# cure: copy the file, or read with IO_FLAG_MMAP_IFC or without a flag before writing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "faiss-cpu==1.15.1" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import sys
from pathlib import Path

import faiss
import numpy as np

folder = Path(sys.argv[1])
rows = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32)
index = faiss.index_factory(32, "IVF64,Flat")
index.train(rows)
index.add(rows)
source = folder / "source.faiss"
faiss.write_index(index, str(source))

sizes = {}
for name, flags in (("whole", 0), ("IO_FLAG_MMAP", faiss.IO_FLAG_MMAP), ("IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP_IFC)):
    opened = faiss.read_index(str(source), flags)
    assert opened.search(rows[:1], 1)[1][0, 0] == 0
    copy = folder / f"{name}.faiss"
    faiss.write_index(opened, str(copy))
    sizes[name] = copy.stat().st_size
    try:
        read = f"{faiss.read_index(str(copy)).ntotal:,} rows"
    except RuntimeError as error:
        read = str(error).rsplit("Error: ", 1)[-1]
    print(f"read by {name}: written {sizes[name]:,} bytes, serialized {faiss.serialize_index(opened).nbytes:,}; read again: {read}")
    assert ("rows" in read) == (name != "IO_FLAG_MMAP"), read
assert sizes["IO_FLAG_MMAP"] < 20_000 < sizes["whole"] == sizes["IO_FLAG_MMAP_IFC"] == source.stat().st_size
CODE
"$work/venv/bin/python" "$work/seen.py" "$work"
