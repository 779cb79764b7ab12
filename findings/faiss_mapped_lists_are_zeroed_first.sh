#!/usr/bin/env bash
# faiss-cpu 1.15.1: read_index(path, IO_FLAG_MMAP_IFC) of an index with lists sets as much memory to zero as its lists have, list
# by list, before it throws that away and points into the mapped file. So opening takes time with the bytes of the index, though
# no row is read: 36 ms for 2 GB, against 6 ms by IO_FLAG_MMAP, which maps the same file as lists on disk. Of 400 MB, here, the
# lists cost it several times as much.
# Also: an index opened by IO_FLAG_MMAP searches as fast, but each search first starts up to 32 threads that read its lists, until
# prefetch_nthread of the lists is 0.
# Why it matters: what is mapped so that it opens at once does not, and opening a hundred times the rows takes a hundred times as
# long. The cure: IO_FLAG_MMAP with prefetch_nthread = 0 for lists that are arrays.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "faiss-cpu==1.15.1" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import sys
import time

import faiss
import numpy as np

faiss.omp_set_num_threads(1)
path = sys.argv[1]
rng = np.random.default_rng(0)


def write(rows, lists=400, dimension=512):
    quantizer = faiss.IndexFlatIP(dimension)
    quantizer.add(rng.standard_normal((lists, dimension)).astype(np.float32))
    index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    vectors = np.zeros((rows, dimension), np.float32)
    numbers = np.arange(rows) % lists
    index.add_core(rows, faiss.swig_ptr(vectors), None, faiss.swig_ptr(numbers))
    faiss.write_index(index, path)


def milliseconds(flag):
    times = []
    for _ in range(5):
        began = time.process_time()
        faiss.read_index(path, flag)
        times.append(1000 * (time.process_time() - began))
    return min(times)


measured = {}
for rows in (2_000, 200_000):
    write(rows)
    measured[rows] = {name: milliseconds(getattr(faiss, name)) for name in ("IO_FLAG_MMAP_IFC", "IO_FLAG_MMAP")}
    print(f"{rows:,} rows:", ", ".join(f"{name} {value:.2f} ms" for name, value in measured[rows].items()))
grown = {name: measured[200_000][name] - measured[2_000][name] for name in measured[2_000]}
assert grown["IO_FLAG_MMAP_IFC"] > 1.5, grown
assert grown["IO_FLAG_MMAP"] < grown["IO_FLAG_MMAP_IFC"] / 3, grown
CODE
"$work/venv/bin/python" "$work/seen.py" "$work/index.faiss"
