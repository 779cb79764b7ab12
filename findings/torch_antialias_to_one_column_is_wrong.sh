#!/usr/bin/env bash
# torch 2.15.0: F.interpolate(x, (H, 1), antialias=True) of floats on the CPU gives wrong numbers where x is contiguous (the usual
# layout): off by up to the whole range of pixels. The transposed image resized to one row, which is the same, is right, so is a
# batch in channels-last, and so are two columns. Bytes are right, but contiguous ones shrunk to 1 × 1 fail by an internal assertion.
# Why it matters: antialiased resizing to one column is how a feature map or a spectrogram is pooled over its width with a smooth
# filter; the result has the right shape and range. The cure: x.contiguous(memory_format=torch.channels_last), or a transposed x.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.15.0" "numpy<3"
cat >"$work/seen.py" <<'CODE'
import torch
from torch.nn.functional import interpolate

torch.manual_seed(0)
print(f"torch {torch.__version__}; pixels of 0 to 255")
wrong = {}
for width, columns in ((1, 1), (64, 1), (64, 2)):
    image = torch.randint(0, 256, (1, 3, 64, width)).float()
    # the same by rows and columns exchanged
    wanted = interpolate(image.transpose(2, 3).contiguous(), (columns, 32), mode="bilinear", antialias=True).transpose(2, 3)
    layouts = {"contiguous": image, "channels-last": image.contiguous(memory_format=torch.channels_last)}
    for layout, laid_out in layouts.items():
        found = interpolate(laid_out, (32, columns), mode="bilinear", antialias=True)
        wrong[width, columns, layout] = float((found - wanted).abs().max())
        print(f"64 × {width} to 32 × {columns}, {layout}: off by up to {wrong[width, columns, layout]:.3f}")
for (_, columns, layout), error in wrong.items():
    assert error > 5 if (columns, layout) == (1, "contiguous") else error < 0.01, (columns, layout, error)
try:
    interpolate(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), (1, 1), mode="bilinear", antialias=True)
    raise SystemExit("bytes shrunk to one pixel do not fail")
except RuntimeError as error:
    print(f"bytes to 1 × 1: {str(error)[:60]}")
    assert "INTERNAL ASSERT" in str(error)
CODE
"$work/venv/bin/python" "$work/seen.py"
