#!/usr/bin/env bash
# onnxruntime 1.32.0, CPU: opening a session of a model whose weights are inside the .onnx file takes many times the CPU seconds
# of the same model with its weights in a file beside it (external data) and session.disable_prepacking = 1. With external data
# alone the packing of matrices remains: both are needed. The outputs are equal.
# Why it matters: a command that embeds one query opens the session for it; most of its time was this.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "onnxruntime==1.32.0" "onnx==1.23.2" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
WIDTH, LAYERS = 1024, 60  # 252 MB of weights
nodes, weights, name = [], [], "x"
for layer in range(LAYERS):
    matrix = (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32)
    weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
    nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [f"h{layer}"]))
    name = f"h{layer}"
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])
y = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH])
model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 17)])
model.ir_version = 9
onnx.save(model, folder / "inside.onnx")
onnx.save(model, folder / "beside.onnx", save_as_external_data=True, location="beside.data")
OPEN = """
import sys, time
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if sys.argv[2] == "unpacked":
    options.add_session_config_entry("session.disable_prepacking", "1")
began = time.process_time()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
cpu = time.process_time() - began
(out,) = session.run(None, {"x": np.ones((1, 1024), np.float32)})
print(cpu, float(np.abs(out).sum()))
"""
seen, sums = {}, set()
for file, packing in (("inside", "packed"), ("beside", "packed"), ("beside", "unpacked")):
    rounds = []
    for _ in range(5):
        command = [sys.executable, "-c", OPEN, str(folder / f"{file}.onnx"), packing]
        cpu, total = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        rounds.append(cpu)
        sums.add(round(total, 3))
    seen[file, packing] = statistics.median(rounds)
for (file, packing), cpu in seen.items():
    print(f"weights {file}, {packing}: {cpu:.3f} s of CPU to open")
print("sums of outputs:", sums)
assert seen["inside", "packed"] > 4 * seen["beside", "unpacked"], "opening costs alike now"
assert max(sums) - min(sums) < 1e-3 * max(sums)
CODE
"$work/venv/bin/python" "$work/seen.py" "$work"
# seen: inside, packed 0.596 s; beside, packed 0.305 s; beside, unpacked 0.007 s
