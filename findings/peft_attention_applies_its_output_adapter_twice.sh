#!/usr/bin/env bash
# peft 0.21.2, LoRA on torch.nn.MultiheadAttention (the attention of open_clip's transformers): the adapter of the output
# projection is applied twice. MultiheadAttention.merge adds B A to out_proj's weight and then calls out_proj.merge(), which
# adds it again, so that the layer computes with W + 2 · α/r · B A, in every forward pass and in what merge() leaves; the
# gradient is that of one. And since each pass adds the products to the frozen weights and subtracts them afterwards,
# rounding makes these weights wander off: after a few hundred passes in bfloat16 the "frozen" weights are others.
# Why it matters: a LoRA of a CLIP is trained at twice its scale in half of its matrices, a reader of adapter files that adds
# B A once (the formula of the paper) gets another model, and a base shared by several adapters changes under them.
# The cure: adapt these layers by functional_call with W + α/r · B A, which leaves W alone, or split them into linear layers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "peft==0.21.2" "torch==2.15.0" "numpy<3" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


def adapted(dtype):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["attention"]), model)
    model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model.attention


layer = adapted(torch.float32)
out = layer.base_layer.out_proj
before = out.base_layer.weight.detach().clone()
product = (out.lora_B["default"].weight @ out.lora_A["default"].weight).detach() * out.scaling["default"]
layer.merge()
times = (out.base_layer.weight.detach() - before).norm() / product.norm()
print(f"out_proj: B A added {times:.2f} times")

layer = adapted(torch.bfloat16)
frozen = layer.base_layer.in_proj_weight
print("requires grad:", frozen.requires_grad)
before = frozen.detach().clone()
rows = torch.randn(1, 3, 16, dtype=torch.bfloat16)
with torch.no_grad():
    for _ in range(300):
        layer(rows, rows, rows)
changed = (layer.base_layer.in_proj_weight != before).float().mean()
print("frozen in_proj after 300 passes:", "changed" if changed > 0.1 else "the same")
CODE
seen=$("$work/venv/bin/python" "$work/seen.py" 2>/dev/null)
echo "$seen"
grep -q "out_proj: B A added 2.00 times" <<<"$seen"
grep -q "requires grad: False" <<<"$seen"
grep -q "frozen in_proj after 300 passes: changed" <<<"$seen"
