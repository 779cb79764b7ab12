#!/usr/bin/env bash
# faiss-cpu 1.15.1: the further bits of RaBitQ codes ("RaBitQ2" to "RaBitQ8") are used by search and left out by reconstruct. The error
# of the scores falls from 0.08 at one bit to 0.0004 at eight; what reconstruct, reconstruct_n, search_and_reconstruct and sa_decode
# give back is the same row, to the last digit, at one bit as at eight: a cosine of 0.80 with the row that was stored, and 1.24 times
# its length. EDEN at four bits gives 0.996 and a length of 1.00, a scalar quantizer of four bits 0.993.
# Why it matters: codes of eight bits look like a store from which the vectors can be had again, for another index, to re-rank, to move
# to another machine, since search finds them to three digits; what comes out is the sign of each number. No error, no warning.
# The cure: keep the vectors elsewhere, or codes whose reconstruction was compared with the rows.
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
WIDTH = 64


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


centres = rng.standard_normal((40, WIDTH))
rows = unit(centres[rng.integers(0, 40, 4_000)] + 0.6 * rng.standard_normal((4_000, WIDTH)))
queries = unit(rows[:50] + 0.05 * rng.standard_normal((50, WIDTH)))
products = queries @ rows.T
decoded = {}
for spec in ("RaBitQ", "RaBitQ2", "RaBitQ4", "RaBitQ8", "EDEN4", "SQ4"):
    index = faiss.index_factory(WIDTH, spec, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    scores, found = index.search(queries, 10)
    error = float(np.abs(scores - np.take_along_axis(products, found, 1)).mean())
    back = decoded[spec] = index.reconstruct_n(0, len(rows))
    _, rows_found, with_search = index.search_and_reconstruct(queries[:1], 5)
    assert (with_search[0] == back[rows_found[0]]).all()
    assert (index.sa_decode(index.sa_encode(rows[:5])) == back[:5]).all()
    lengths = np.linalg.norm(back, axis=1)
    cosine = float(((back * rows).sum(1) / lengths).mean())
    print(f"{spec}: {index.sa_code_size()} bytes, error of a score {error:.4f}; cosine of the decoded row {cosine:.3f}, length {lengths.mean():.2f}")
    if spec.startswith("RaBitQ"):
        assert cosine < 0.83 and lengths.mean() > 1.2
        assert (back == decoded["RaBitQ"]).all()
        assert error < 0.001 if spec == "RaBitQ8" else error > 0.005
    else:
        assert cosine > 0.99
CODE
"$work/venv/bin/python" "$work/seen.py"
