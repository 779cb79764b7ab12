#!/usr/bin/env bash
# faiss-cpu 1.15.1: index_factory(d, "HNSW32,PQ16", METRIC_INNER_PRODUCT) gives an index by L2, and so does "NSG32,PQ16": the metric
# is not handed on, and nothing says so. "HNSW32,Flat", "HNSW32,SQ8", "NSG32,SQ8" and "IVF32,PQ16" of the same call are by inner
# product, and IndexHNSWPQ(d, 16, 32, 8, METRIC_INNER_PRODUCT), which the factory could have called, is too. metric_type of the
# answer tells. The scores are then squared distances, the best the smallest; on rows whose lengths differ by a fifth (standard
# deviation) the best product is among the ten found for a seventh of the queries, and for four fifths from the index that was asked for.
# Why it matters: on unit rows the order of the answers is right, so that recall shows nothing, while scores are read upside down:
# a threshold on the cosine keeps the worst of the answers, and a merge with another index's products puts the worst first.
# The cure: look at index.metric_type after index_factory, or build the class itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "faiss-cpu==1.15.1" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import faiss
import numpy as np

faiss.omp_set_num_threads(1)
rng = np.random.default_rng(0)
WIDTH, PRODUCT = 64, faiss.METRIC_INNER_PRODUCT


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


centres = rng.standard_normal((40, WIDTH))
rows = unit(centres[rng.integers(0, 40, 10_000)] + 0.6 * rng.standard_normal((10_000, WIDTH)))
queries = unit(rows[:200] + 0.05 * rng.standard_normal((200, WIDTH)))

for spec in ("HNSW32,Flat", "HNSW32,SQ8", "NSG32,SQ8", "IVF32,PQ16", "HNSW32,PQ16", "NSG32,PQ16"):
    index = faiss.index_factory(WIDTH, spec, PRODUCT)
    print(f"{spec}: metric asked for {PRODUCT}, metric of the index {index.metric_type}")
    assert index.metric_type == (faiss.METRIC_L2 if spec in ("HNSW32,PQ16", "NSG32,PQ16") else PRODUCT)

by_factory = faiss.index_factory(WIDTH, "HNSW32,PQ16", PRODUCT)
by_class = faiss.IndexHNSWPQ(WIDTH, 16, 32, 8, PRODUCT)
for index in (by_factory, by_class):
    index.train(rows)
    index.add(rows)
    scores, found = index.search(queries[:1], 3)
    print(f"metric {index.metric_type}: scores {scores[0].round(2)}, products {(rows[found[0]] @ queries[0]).round(2)}")
    assert bool((np.diff(scores[0]) < 0).all()) == (index is by_class)

uneven = rows * rng.normal(1, 0.2, (10_000, 1)).clip(0.2).astype(np.float32)
best = np.argmax(queries @ uneven.T, axis=1)
shares = []
for index in (faiss.index_factory(WIDTH, "HNSW32,PQ16", PRODUCT), faiss.IndexHNSWPQ(WIDTH, 16, 32, 8, PRODUCT)):
    index.train(uneven)
    index.add(uneven)
    found = index.search(queries, 10)[1]
    shares.append(float(np.mean([row in near for row, near in zip(best, found)])))
print(f"best product among ten, rows of uneven length: by the factory {shares[0]:.2f}, by the class {shares[1]:.2f}")
assert shares[0] < 0.3 and shares[1] > 0.7, shares
CODE
"$work/venv/bin/python" "$work/seen.py"
