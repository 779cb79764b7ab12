#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.15.0: one process that a launcher started (WORLD_SIZE=1, as torchrun --nproc-per-node 1 or a
# resized job gives) is wrapped in DistributedDataParallel by prepare(), but Accelerator.no_sync() does nothing there, since
# it asks for more than one process. DDP's reducer then runs in every backward pass. Two passes over different parts of a
# network under no_sync() fail with "Expected to have finished reduction in the prior iteration", although the same lines
# work with two processes, and with one process that no launcher started.
# Why it matters: gradient caching and accumulation that were tested on 1 and 2 processes break when a job shrinks to one.
# The cure: ask the wrapped module itself (module.no_sync()).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "accelerate==1.15.0" "torch==2.15.0" "numpy<3"
cat >"$work/seen.py" <<'CODE'
import sys

import torch
from accelerate import Accelerator
from torch import nn


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, which):
        return (self.first if which == 0 else self.second)(x)


accelerator = Accelerator(cpu=True)
network = accelerator.prepare(TwoHeads())


context = {"accelerator": lambda: accelerator.no_sync(network), "module": network.no_sync}[sys.argv[1]]
print("wrapped:", type(network).__name__, "processes:", accelerator.num_processes)
try:
    with context():
        network(torch.ones(1, 2), 0).sum().backward()
    network(torch.ones(1, 2), 1).sum().backward()
    print(f"{sys.argv[1]}.no_sync: works")
except RuntimeError as error:
    print(f"{sys.argv[1]}.no_sync:", str(error).split(" before")[0])
CODE
export ACCELERATE_USE_CPU=true RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29611
seen=$(for which in accelerator module; do "$work/venv/bin/python" "$work/seen.py" "$which" 2>/dev/null; done)
echo "$seen"
grep -q "wrapped: DistributedDataParallel processes: 1" <<<"$seen"
grep -q "accelerator.no_sync: Expected to have finished reduction" <<<"$seen"
grep -q "module.no_sync: works" <<<"$seen"
