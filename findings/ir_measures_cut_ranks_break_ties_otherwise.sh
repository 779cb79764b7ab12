#!/usr/bin/env bash
# ir_measures 0.4.3 with pytrec-eval-terrier 0.5.11, as pip installs it: RR and RR@10 of one call are computed by two programs, which order
# documents of equal score in opposite ways: RR, AP, P, Success and nDCG by the name of the document from the last to the first (trec_eval), RR@k
# and Judged@k from the first to the last. RR@10 can then be larger than RR, which by definition it cannot. A model that gives all ten candidates of
# a query one score has RR 0.1, Success@1 0, P@1 0 and RR@10, even RR@1, 1.0 where the true one is named first. Of 300 queries over 50 images
# with cosines of two digits RR@10 is larger than RR in 48. calc_aggregate does not say who computed what; without ties all agree.
# Why it matters: captions with their candidates, the true one first, are how rerankers and hard negatives are tested, scores of half
# precision or of codes tie often, and MRR@10 is the figure of choice: a model that says nothing looks perfect.
# The cure: round no scores; the provider named (ir_measures.pytrec_eval) for RR, and no cut; or a draw among ties of one's own first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "ir_measures==0.4.3" "pytrec-eval-terrier==0.5.11" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import ir_measures
import numpy as np
from ir_measures import AP, RR, Judged, P, Success, nDCG

measures = [RR, AP, P @ 1, Success @ 1, nDCG @ 10, RR @ 10, RR @ 1, Judged @ 1]


def figures(true, scores):
    names = [f"image{row}" for row in range(len(scores))]
    judged = {"query": {names[true]: 1}}
    found = ir_measures.calc_aggregate(measures, judged, {"query": dict(zip(names, map(float, scores)))})
    return {str(measure): round(found[measure], 3) for measure in measures}


first, last = figures(0, np.ones(10)), figures(9, np.ones(10))
print("all scores equal, the true one named first:", first)
print("all scores equal, the true one named last:", last)
assert (first["RR"], first["Success@1"], first["P@1"], first["RR@10"], first["RR@1"], first["Judged@1"]) == (0.1, 0, 0, 1, 1, 1)
assert (last["RR"], last["Success@1"], last["P@1"], last["RR@10"], last["RR@1"], last["Judged@1"]) == (1, 1, 1, 0.1, 0, 0)

rng = np.random.default_rng(0)
for digits in (2, 6):
    runs, judged = {}, {}
    for query in range(300):
        scores = rng.normal(0.2, 0.05, 50)
        scores[query % 50] += 0.08
        judged[str(query)] = {f"image{query % 50}": 1}
        runs[str(query)] = {f"image{row}": round(float(score), digits) for row, score in enumerate(scores)}
    by_query = {}
    for found in ir_measures.iter_calc([RR, RR @ 10], judged, runs):
        by_query.setdefault(found.query_id, {})[str(found.measure)] = found.value
    larger = sum(found["RR@10"] > found["RR"] + 1e-9 for found in by_query.values())
    print(f"scores of {digits} digits: RR@10 is larger than RR in {larger} of {len(by_query)} queries")
    assert (larger > 20) if digits == 2 else larger == 0
CODE
"$work/venv/bin/python" "$work/seen.py"
