#!/usr/bin/env bash
# voyager 2.2.3, Space.InnerProduct: rows are stored with one more number, which makes them all as long as the longest, and the graph
# is built by that. Where lengths differ by a fifth (standard deviation), most of the nearest rows are then not found: of 5,000 rows
# of 64 numbers recall@10 at query_ef 100 is 0.40, and 0.82 where they differ by a tenth; hnswlib 0.8.0 (M 16, ef 200 and 100, one
# thread, as here), which compares by the bare product, has 0.97 of the same rows. The same rows added from the shortest to the
# longest, or from the longest to the shortest: 0.95. The products that come back are right, and on rows of one length the two
# libraries are alike (0.97 and 0.96), so that a look at either shows nothing.
# Why it matters: vectors of two-tower models that are not normalised differ in length, and shuffled rows are the usual case.
# query_ef 1,000, ten times the work, gives 0.87.
# The cure: sort the rows by length before adding them, or a graph by the bare product.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "voyager==2.2.3" "hnswlib==0.8.0" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import hnswlib
import numpy as np
from voyager import Index, Space

rng = np.random.default_rng(0)
directions = rng.standard_normal((5000, 64)).astype(np.float32)
directions /= np.linalg.norm(directions, axis=1, keepdims=True)
queries = rng.standard_normal((200, 64)).astype(np.float32)


def recall(found, rows):
    truth = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    return float(np.mean([np.isin(nearest, near).mean() for nearest, near in zip(truth, found)]))


def by_voyager(rows, effort=100):
    index = Index(Space.InnerProduct, num_dimensions=64, M=16, ef_construction=200)
    index.add_items(rows, num_threads=1)
    ids, distances = index.query(queries, 10, num_threads=1, query_ef=effort)
    # the distances are right: one minus the product
    assert np.allclose(1 - distances[:, 0], np.sum(queries * rows[ids[:, 0]], axis=1), atol=1e-3)
    return recall(ids, rows)


def by_hnswlib(rows):
    index = hnswlib.Index("ip", 64)
    index.init_index(len(rows), M=16, ef_construction=200)
    index.set_num_threads(1)
    index.add_items(rows)
    index.set_ef(100)
    return recall(index.knn_query(queries, 10)[0], rows)


sizes = []
for space in (Space.Euclidean, Space.InnerProduct):
    index = Index(space, num_dimensions=64, M=16)
    index.add_items(directions, num_threads=1)
    sizes.append(len(index.as_bytes()))
print(f"bytes a row by inner product more than by L2: {(sizes[1] - sizes[0]) / len(directions):g}")
assert sizes[1] - sizes[0] == 4 * len(directions)

for spread in (0.0, 0.1, 0.2):
    lengths = rng.normal(1, spread, 5000).clip(0.2).astype(np.float32)
    rows = directions * lengths[:, None]
    shuffled, plain = by_voyager(rows), by_hnswlib(rows)
    rising, falling = (by_voyager(rows[np.argsort(sign * lengths, kind="stable")]) for sign in (1, -1))
    print(f"lengths 1 ± {spread}: voyager {shuffled:.2f}, rising {rising:.2f}, falling {falling:.2f}; hnswlib {plain:.2f}")
    assert min(rising, falling, plain) > 0.92
    if spread == 0.2:
        more = by_voyager(rows, 1000)
        print(f"query_ef 1000: {more:.2f}")
        assert shuffled < 0.5 and more < 0.9
CODE
"$work/venv/bin/python" "$work/seen.py"
