#!/usr/bin/env bash
# faiss-cpu 1.15.1, IndexHNSWFlat by METRIC_INNER_PRODUCT: add() builds as good a graph as by METRIC_L2, but the two calls that make
# one over, shrink_level_0_neighbors and init_level_0_from_knngraph, take the largest products for the largest distances. Of 10,000
# unit rows recall@10 at efSearch 256 falls from 1.00 to 0.05 after shrink_level_0_neighbors(64), where
# 64 is the size that nodes have already, and is 0.10 for a graph from the exact neighbours; by L2, over the same rows, it is 1.00 both
# times. A row is left with one or two edges in place of thirty. No error, no warning; efSearch 2,048 does not repair it.
# Why it matters: unit rows have the same neighbours by both metrics, inner product is what embeddings of CLIP are indexed by, and
# these calls are the way to build a graph from neighbours found elsewhere (by matrix products or on a GPU) or to thin one.
# The cure: do it in an index by METRIC_L2 (for unit rows it may stay so), and measure recall after each such step.
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
rows, queries = (rng.standard_normal((count, 64)).astype(np.float32) for count in (10_000, 300))
for each in (rows, queries):
    faiss.normalize_L2(each)
truth = np.argsort(-(queries @ rows.T), axis=1)[:, :10]


def recall(index, effort=256):
    index.hnsw.efSearch = effort
    found = index.search(queries, 10)[1]
    return float(np.mean([np.isin(nearest, near).mean() for nearest, near in zip(truth, found)]))


def edges(index):
    offsets, neighbors = (faiss.vector_to_array(each) for each in (index.hnsw.offsets, index.hnsw.neighbors))
    per_row = index.hnsw.nb_neighbors(0)
    return float(np.mean([(neighbors[start : start + per_row] >= 0).sum() for start in offsets[:-1]]))


for name, metric in (("inner product", faiss.METRIC_INNER_PRODUCT), ("L2", faiss.METRIC_L2)):
    index = faiss.IndexHNSWFlat(64, 32, metric)
    index.add(rows)
    built = recall(index)
    index.shrink_level_0_neighbors(index.hnsw.nb_neighbors(0))
    shrunk, more, left = recall(index), recall(index, 2048), edges(index)

    flat = faiss.IndexFlat(64, metric)
    flat.add(rows)
    values, ids = flat.search(rows, 65)
    joined = faiss.IndexHNSWFlat(64, 32, metric)
    joined.init_level0 = False
    joined.add(rows)
    joined.init_level_0_from_knngraph(65, faiss.swig_ptr(values), faiss.swig_ptr(ids))
    from_neighbours = recall(joined)
    print(
        f"{name}: add {built:.2f}; after shrink_level_0_neighbors {shrunk:.2f} (efSearch 2048: {more:.2f}), {left:.0f} edges a row; "
        f"from exact neighbours {from_neighbours:.2f}, {edges(joined):.0f} edges a row"
    )
    assert built > 0.95
    if metric == faiss.METRIC_L2:
        assert shrunk > 0.95 and from_neighbours > 0.95 and left > 20 and edges(joined) > 20
    else:
        assert shrunk < 0.2 and more < 0.5 and from_neighbours < 0.3 and left < 3 and edges(joined) < 3
CODE
"$work/venv/bin/python" "$work/seen.py"
