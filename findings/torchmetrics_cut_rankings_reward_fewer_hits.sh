#!/usr/bin/env bash
# torchmetrics 1.9.0, functional.retrieval with top_k (and RetrievalMAP(top_k=), RetrievalAUROC(top_k=)): retrieval_average_precision divides by
# the relevant items that were found among the k, not by those there are. Of an image's five captions one found at rank 1 gives AP@10 = 1.0,
# all five at ranks 1, 2, 3, 4 and 10 give 0.9; one at rank 1 and another at rank 10 0.6. ranx 0.3.21 and trec_eval (pytrec-eval-terrier
# 0.5.11) say 0.2, 0.9 and 0.24. retrieval_auroc of the k best is 0 where all k are relevant, as it is where none is, and 1.0 where
# only the first is. Recall, hit rate, reciprocal rank and normalised DCG of the same calls are what they are elsewhere.
# Why it matters: with several captions an image MAP@10 is the figure that is to see the others; here a model that finds one and loses four
# beats one that finds all, training for it teaches to forget, and figures of the three libraries stand in one table under one name.
# The cure: recall@k beside it, or multiply by the hits among k over min(k, relevant).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torchmetrics==1.9.0" "torch==2.15.0" "ranx==0.3.21" "pytrec-eval-terrier==0.5.11" "numpy<2.5" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import warnings

import pytrec_eval
import torch
from ranx import Qrels, Run, evaluate
from torchmetrics.functional.retrieval import retrieval_auroc, retrieval_average_precision, retrieval_recall
from torchmetrics.retrieval import RetrievalAUROC, RetrievalMAP

warnings.filterwarnings("ignore")
scores = torch.linspace(0.9, 0.1, 100)


def relevant(*ranks):
    """Five relevant items of a hundred: at these ranks, and the others last."""
    target = torch.zeros(100, dtype=torch.bool)
    for rank in (*ranks, 100, 99, 98, 97, 96)[:5]:
        target[rank - 1] = True
    return target


def precision_of_others(target):
    judged = {"image": {f"caption{row:03d}": int(found) for row, found in enumerate(target)}}
    found = {"image": {f"caption{row:03d}": float(score) for row, score in enumerate(scores)}}
    trec = pytrec_eval.RelevanceEvaluator(judged, {"map_cut.10"}).evaluate(found)["image"]["map_cut_10"]
    return round(float(evaluate(Qrels(judged), Run(found), "map@10")), 3), round(trec, 3)


seen = {}
for ranks in ((1,), (1, 10), (1, 2, 3, 4, 10)):
    target = relevant(*ranks)
    ours = round(float(retrieval_average_precision(scores, target, top_k=10)), 3)
    metric = RetrievalMAP(top_k=10)
    metric.update(scores, target, indexes=torch.zeros(100, dtype=torch.long))
    assert abs(float(metric.compute()) - ours) < 1e-3
    seen[ranks] = (ours, *precision_of_others(target))
    recall = float(retrieval_recall(scores, target, top_k=10))
    print(f"found at {ranks}: AP@10 by torchmetrics {ours}, by ranx and trec_eval {seen[ranks][1:]}; recall@10 {recall:.1f}")
assert seen == {(1,): (1.0, 0.2, 0.2), (1, 10): (0.6, 0.24, 0.24), (1, 2, 3, 4, 10): (0.9, 0.9, 0.9)}, seen

areas = {}
for name, target in (("none", relevant()), ("first only", relevant(1)), ("all", relevant(1, 2, 3))):
    metric = RetrievalAUROC(top_k=3)
    metric.update(scores, target, indexes=torch.zeros(100, dtype=torch.long))
    areas[name] = float(retrieval_auroc(scores, target, top_k=3))
    assert areas[name] == float(metric.compute())
print("AUROC of the three best, by which of them are relevant:", areas)
assert areas == {"none": 0.0, "first only": 1.0, "all": 0.0}, areas
CODE
"$work/venv/bin/python" "$work/seen.py"
