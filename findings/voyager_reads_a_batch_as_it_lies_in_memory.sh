#!/usr/bin/env bash
# voyager 2.2.3: add_items and query take a batch of float32 that is not laid out row by row (a slice of columns, every second row, a
# matrix in Fortran order) without a word, and read the numbers as they lie in memory: other rows are stored than were given. A batch
# of queries is read alike, so that each row finds itself; a single vector is read rightly, and does not. float64, which is
# copied first, is stored rightly.
# Why it matters: embeddings[:, :256] of a Matryoshka model, or embeddings[::2], are indexed as something else, a test of the index by
# its own rows passes, and only the single queries of the service find nothing. The cure: numpy.ascontiguousarray before both calls.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "voyager==2.2.3" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import numpy as np
from voyager import Index, Space

rng = np.random.default_rng(0)
wide = rng.standard_normal((1000, 64)).astype(np.float32)
batches = {
    "rows of their own": wide[:, :32].copy(),
    "columns [:, :32]": wide[:, :32],
    "every second row [::2]": rng.standard_normal((2000, 32)).astype(np.float32)[::2],
    "Fortran order": np.asfortranarray(wide[:, :32]),
    "columns, float64": wide.astype(np.float64)[:, :32],
}
for name, rows in batches.items():
    index = Index(Space.Euclidean, num_dimensions=32)
    index.add_items(rows, num_threads=1)
    same = float(np.mean([np.allclose(index.get_vector(row), rows[row], atol=1e-3) for row in range(200)]))
    in_batch = float(np.mean(index.query(rows[:200], 1, num_threads=1)[0][:, 0] == np.arange(200)))
    singly = float(np.mean([index.query(rows[row], 1)[0][0] == row for row in range(200)]))
    print(f"{name}: stored as given {same:.2f}, finds itself in a batch {in_batch:.2f}, singly {singly:.2f}")
    if name in ("rows of their own", "columns, float64"):
        assert same == 1 and in_batch > 0.95 and singly > 0.95
    else:
        assert same < 0.1 and in_batch > 0.95 and singly < 0.1
CODE
"$work/venv/bin/python" "$work/seen.py"
