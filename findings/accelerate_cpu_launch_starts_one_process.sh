#!/usr/bin/env bash
# accelerate 1.15.0: `accelerate launch --cpu --num_processes 2` starts one process, without a warning or an error; the same with
# --num_machines 2, where each machine then trains alone. The processes of --num_processes are started on the paths for
# several GPUs only. `accelerate launch --multi_gpu --num_processes 2` with ACCELERATE_USE_CPU=true does start two, on the CPU
# (gloo), although the flag names what it does not use; torchrun does as well.
# Why it matters: a recipe for several machines that was "checked on the CPU" was checked with one process, and a run on CPU
# nodes is N runs that write into one folder.
# The cure: start with --multi_gpu and ACCELERATE_USE_CPU=true, or by torchrun; log the number of processes that there are.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "accelerate==1.15.0" "torch==2.15.0" "numpy<3"
cat >"$work/seen.py" <<'CODE'
from accelerate import Accelerator

accelerator = Accelerator()
# one write, so that two processes do not mix their words
print(f"processes: {accelerator.num_processes} on {accelerator.device.type}\n", end="", flush=True)
accelerator.end_training()
CODE
export HF_HOME="$work" OMP_NUM_THREADS=1
common=(--num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no --main_process_port 29617)
cpu=$("$work/venv/bin/accelerate" launch --cpu "${common[@]}" "$work/seen.py" 2>/dev/null)
both=$(ACCELERATE_USE_CPU=true "$work/venv/bin/accelerate" launch --multi_gpu "${common[@]}" "$work/seen.py" 2>/dev/null)
printf -- '--cpu:\n%s\n--multi_gpu, ACCELERATE_USE_CPU:\n%s\n' "$cpu" "$both"
[ "$cpu" = "processes: 1 on cpu" ]
[ "$(grep -c "processes: 2 on cpu" <<<"$both")" = 2 ]
