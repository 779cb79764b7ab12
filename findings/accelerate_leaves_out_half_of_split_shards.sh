#!/usr/bin/env bash
# accelerate 1.15.0 with webdataset 1.0.2 (torch 2.13.0), two processes: shards are shared out by webdataset's
# nodesplitter=split_by_node. Accelerator.prepare(DataLoader(that)) then gives half of the samples: only the first process reads,
# and hands parts of its batches to the others, so that the shards of the second are never opened. With dispatch_batches=False every process
# reads, and accelerate skips batches of what is its own part already: half again. With four processes a quarter of the samples is
# given, in both ways. The epoch ends early, without a word, and no sample comes twice.
# Why it matters: each library alone does what its documentation says, one process shows nothing, and the more GPUs there are, the
# less of the data is seen, while the shorter epoch looks like the speed-up.
# The cure: do not prepare a loader whose shards are split; or give it whole (nodesplitter=lambda shards: shards).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "accelerate==1.15.0" "webdataset==1.0.2" "torch==2.13.0" "numpy<3" \
    2>/dev/null
cat >"$work/seen.py" <<'CODE'
import sys

import torch.distributed
import webdataset
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

folder = sys.argv[1]
cases = (
    ("split_by_node, prepared", webdataset.split_by_node, {}),
    ("split_by_node, prepared, dispatch_batches=False", webdataset.split_by_node, {"dispatch_batches": False}),
    ("split_by_node, not prepared", webdataset.split_by_node, None),
    ("all shards, prepared", lambda shards: shards, {}),
)
for name, nodesplitter, options in cases:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**(options or {})))
    tars = [f"{folder}/{number}.tar" for number in range(8)]
    samples = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=nodesplitter).decode().to_tuple("cls")
    loader = DataLoader(samples.map(lambda sample: sample[0]), batch_size=5)
    if options is not None:
        loader = accelerator.prepare(loader)
    given = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(given, [number for batch in loader for number in batch.tolist()])
    if accelerator.is_main_process:
        total = sum(len(each) for each in given)
        different = len(set().union(*given))
        processes = accelerator.num_processes
        print(f"{processes} processes, {name}: {different} of 400 samples, {total // processes} a process", flush=True)
        assert total == different == (400 // processes if name.startswith("split_by_node, prepared") else 400)
    accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
CODE
cat >"$work/tars.py" <<'CODE'
import sys

import webdataset

for number in range(8):
    with webdataset.TarWriter(f"{sys.argv[1]}/{number}.tar") as tar:
        for row in range(number * 50, number * 50 + 50):
            tar.write({"__key__": f"{row:04d}", "cls": row})
CODE
"$work/venv/bin/python" "$work/tars.py" "$work"
export ACCELERATE_USE_CPU=true HF_HOME="$work" OMP_NUM_THREADS=1
for processes in 2 4; do
    "$work/venv/bin/torchrun" --nproc-per-node "$processes" --master-port 2963$processes "$work/seen.py" "$work" 2>"$work/errors" ||
        { cat "$work/errors"; exit 1; }
done
