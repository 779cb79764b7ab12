#!/usr/bin/env bash
# open_clip 3.3.0, create_model of any CoCa: the decoder's text_projection, the matrix from its last layer to the vocabulary, is made by
# torch.empty and never initialised, as the decoder does not call its init_parameters. It holds whatever the memory held before:
# zeros in a fresh process, numbers of any size after other work. With torch.use_deterministic_algorithms(True), under which torch
# fills such memory with NaN, it is NaN, and it alone of 629 parameters of coca_ViT-B-32.
# Why it matters: a CoCa trained from scratch starts with all captions equally likely or with a loss of any size, by no seed; two runs
# of one configuration may differ. Pretrained weights overwrite it. The cure: initialise it (normal, std width ** -0.5).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" "torch==2.13.0" "numpy<3" "pillow<13" 2>/dev/null
"${pip[@]}" --no-deps "torchvision==0.28.0" "open_clip_torch==3.3.0" "timm==1.0.31" 2>/dev/null
"${pip[@]}" "transformers==4.56.2" ftfy 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import sys

import torch

try:
    import torchvision
except RuntimeError:  # a CPU build of torch beside torchvision's usual wheel; none of its compiled operators is used here
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import open_clip

torch.use_deterministic_algorithms(True)
for name in ("coca_base", "coca_ViT-B-32", "ViT-B-32"):
    parameters = dict(open_clip.create_model(name).named_parameters())
    never_set = [key for key, value in parameters.items() if value.isnan().any()]
    print(f"{name}: {len(parameters)} parameters, never initialised: {' '.join(never_set) or 'none'}")
    assert never_set == (["text_decoder.text_projection"] if name.startswith("coca") else []), never_set
CODE
"$work/venv/bin/python" "$work/seen.py" 2>/dev/null
