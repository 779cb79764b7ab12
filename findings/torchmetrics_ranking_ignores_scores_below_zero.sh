#!/usr/bin/env bash
# torchmetrics 1.9.0, functional.retrieval, retrieval_reciprocal_rank and retrieval_average_precision: a relevant item whose score is
# not above 0 counts as if it were not relevant. Four items with cosines -0.1, -0.2, -0.3, -0.4, the second of them relevant: both
# give 0.0; the same four with 1 added to each, in the same order: 0.5. No warning is given, and retrieval_normalized_dcg of the
# same module takes them as they are.
# Why it matters: cosines of images and texts are often below 0, so that a mean reciprocal rank is too low by an unknown amount, and
# the same ranking gives two figures. The cure: add a constant to all scores first, which changes no rank.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torchmetrics==1.9.0" "torch==2.15.0" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import torch
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

scores = torch.tensor([-0.1, -0.2, -0.3, -0.4])
relevant = torch.tensor([False, True, False, False])
for metric in (retrieval_reciprocal_rank, retrieval_average_precision, retrieval_normalized_dcg):
    as_they_are, shifted = float(metric(scores, relevant)), float(metric(scores + 1, relevant))
    print(f"{metric.__name__}: as they are {as_they_are:.3f}, with 1 added to each {shifted:.3f}")
    if metric is retrieval_normalized_dcg:
        assert as_they_are == shifted > 0.6
    else:
        assert (as_they_are, shifted) == (0.0, 0.5)
CODE
"$work/venv/bin/python" "$work/seen.py"
# seen: reciprocal rank and average precision 0.000 as they are and 0.500 with 1 added, normalised DCG 0.631 both times
