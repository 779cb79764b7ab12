#!/usr/bin/env bash
# faiss-cpu 1.15.1, "IVF32,RaBitQfs" (IndexIVFRaBitQFastScan, the form of RaBitQ that is searched fastest): range_search does not use the
# scores of search. Over 4,000 unit rows and 50 queries, all lists looked at, 45 rows score above 0.9 by search, and range_search
# with 0.9 returns 1,273; below the squared distance 0.2 there are 49, and 159,089 of the 200,000 pairs are returned, some at a distance
# of -0.99. One and the same row gets a score that differs by 0.8 between the two, by 2 in L2. With further bits
# ("RaBitQfs4") it gives what it gives at one bit. "IVF32,RaBitQ" gives the same counts both ways, "IVF32,PQ16x4fs" nearly.
# Why it matters: range_search is how near-duplicates and "all above a threshold" are found. Changing the type of the index for
# its speed turns a handful of pairs into most of the corpus, without an error, and a check by search says that all is well.
# The cure: "IVF,RaBitQ" without fs for ranges, or search with a large k and a cut at the threshold.
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
by_range = {}
for metric, radii in ((PRODUCT, (0.9, 0.7)), (faiss.METRIC_L2, (0.2, 0.6))):
    for spec in ("IVF32,RaBitQ", "IVF32,PQ16x4fs", "IVF32,RaBitQfs", "IVF32,RaBitQfs4"):
        index = faiss.index_factory(WIDTH, spec, metric)
        index.train(rows)
        index.add(rows)
        index.nprobe = 32
        scores, found = index.search(queries, len(rows))
        for radius in radii:
            # PQ has no score above 0.9 here, and a radius below every distance is another matter:
            # see faiss_fast_scan_range_below_all_distances.sh
            if "PQ" in spec and radius in (0.9, 0.2):
                continue
            limits, distances, ids = index.range_search(queries, radius)
            expected = int(((scores > radius) if metric == PRODUCT else (scores < radius)).sum())
            name = "product" if metric == PRODUCT else "L2"
            print(f"{spec} by {name}, radius {radius}: {expected:,} by search, {limits[-1]:,} by range_search")
            if "RaBitQfs" not in spec:
                assert abs(int(limits[-1]) - expected) < 0.05 * expected
                continue
            assert limits[-1] > 3 * expected
            by_range[metric, spec, radius] = distances.min(), distances.max(), int(limits[-1])
            table = np.zeros_like(scores)
            np.put_along_axis(table, found, scores, 1)
            query_of = np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64)))
            off = float(np.abs(table[query_of, ids] - distances).mean())
            print(
                f"    a row's two scores differ by {off:.2f}; smallest and largest by range_search "
                f"{distances.min():.2f} and {distances.max():.2f}"
            )
            assert off > 0.05
        if spec == "IVF32,RaBitQfs4":
            assert all(by_range[metric, spec, radius] == by_range[metric, "IVF32,RaBitQfs", radius] for radius in radii)
assert by_range[faiss.METRIC_L2, "IVF32,RaBitQfs", 0.2][0] < 0
CODE
"$work/venv/bin/python" "$work/seen.py"
