#!/usr/bin/env bash
# faiss-cpu 1.15.1, "IVF32,PQ16x4fs" by METRIC_L2: range_search with a radius well below the distances of a query's rows returns all
# rows of the lists that were looked at, in place of none. Of 4,000 unit rows and 50 queries the smallest distance of a code is 0.26:
# radius 0.2 gives all 200,000 pairs, up to a distance of 2.7. It befalls query by query: at 0.3 eight queries have rows within
# and are answered rightly, and of the 42 others 19 get the whole corpus and 23 nothing. Codes of the residual ("x4fsr") do alike. By inner
# product it is the other way round: a threshold of -0.5 keeps all, as it should, and one of -0.9 nothing. "IVF32,PQ16" is right.
# Why it matters: near-duplicates are looked for with a small radius, and most images have none. Those are then linked to all others,
# and a clustering by such pairs makes one group of the corpus. On a sample with duplicates in it all looks right.
# The cure: throw away what lies beyond the radius, as the distances that come back are right; or search with a large k.
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
rows = unit(centres[rng.integers(0, 40, 4_000)] + 0.6 * rng.standard_normal((4_000, WIDTH)))
queries = unit(rows[:50] + 0.05 * rng.standard_normal((50, WIDTH)))


def counts_within(spec, metric, radius):
    """Rows a query by range_search, the distances that came with them, and the best of search."""
    index = faiss.index_factory(WIDTH, spec, metric)
    index.train(rows)
    index.add(rows)
    index.nprobe = 32
    limits, distances, _ = index.range_search(queries, radius)
    return np.diff(limits.astype(np.int64)), distances, index.search(queries, 1)[0][:, 0]


for spec, radius in (("x4fs", 0.2), ("x4fs", 0.3), ("x4fs", 0.6), ("x4fsr", 0.2), ("x4fsr", 0.6)):
    counts, distances, best = counts_within(f"IVF32,PQ16{spec}", faiss.METRIC_L2, radius)
    none, every = best > radius, counts == len(rows)
    print(
        f"{spec} by L2, radius {radius}: {none.sum()} queries have no row within; of these {(none & every).sum()} get all "
        f"rows and {(none & (counts == 0)).sum()} none. The others get at most {counts[~none].max(initial=0)}"
    )
    assert (every | (counts == 0))[none].all() and not every[~none].any()
    assert bool((none & every).sum() > 5) == (radius < 0.5)
    if radius < best.min():
        assert every.all() and distances.max() > 2

plain = counts_within("IVF32,PQ16", faiss.METRIC_L2, 0.01)[0]
low, lower = (counts_within("IVF32,PQ16x4fs", PRODUCT, threshold)[0] for threshold in (-0.5, -0.9))
print(f"IVF32,PQ16 by L2, radius 0.01: {plain.sum()} pairs; x4fs by product above -0.5: {low.sum():,}, above -0.9: {lower.sum()}")
assert plain.sum() == 0 and low.sum() == 50 * len(rows) and lower.sum() == 0
CODE
"$work/venv/bin/python" "$work/seen.py"
