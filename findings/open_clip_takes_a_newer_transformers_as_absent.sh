#!/usr/bin/env bash
# open_clip 3.3.0, CoCa.generate: with transformers 4.57.6 every way of generating, sampling as well, ends with an AssertionError
# that asks to install transformers, which is installed. open_clip imports BeamSearchScorer among other names in one try block;
# 4.57 has it no more, so that open_clip takes the whole package as absent. With transformers 4.56.2 the same lines work.
# Why it matters: the two versions lie one step apart and nothing pins them; the message sends one to reinstall what is there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" "torch==2.13.0" "numpy<3" "pillow<13" 2>/dev/null
"${pip[@]}" --no-deps "torchvision==0.28.0" "open_clip_torch==3.3.0" "timm==1.0.31" 2>/dev/null
"${pip[@]}" ftfy 2>/dev/null
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
import transformers
from open_clip.coca_model import CoCa

text = {"context_length": 8, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
vision = {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1, "output_tokens": True}
pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
torch.manual_seed(0)
model = CoCa(16, text, text | {"embed_cls": True, "output_tokens": True}, vision | pooled, pad_id=0).eval()
torch.nn.init.normal_(model.text_decoder.text_projection)
for kind in ("top_k", "top_p", "beam_search"):
    tokens = {"sot_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    try:
        model.generate(torch.randn(1, 3, 16, 16), generation_type=kind, seq_len=6, min_seq_len=2, max_seq_len=8, **tokens)
        outcome = "works"
    except AssertionError as error:
        outcome = str(error).split(" for ")[0]
    print(f"transformers {transformers.__version__}, {kind}: {outcome}")
CODE
seen=""
for version in 4.56.2 4.57.6; do
  "${pip[@]}" "transformers==$version" 2>/dev/null
  seen+="$("$work/venv/bin/python" "$work/seen.py" 2>/dev/null)"$'\n'
done
printf '%s' "$seen"
for kind in top_k top_p beam_search; do
  grep -qx "transformers 4.56.2, $kind: works" <<<"$seen"
  grep -qx "transformers 4.57.6, $kind: Please install transformers" <<<"$seen"
done
