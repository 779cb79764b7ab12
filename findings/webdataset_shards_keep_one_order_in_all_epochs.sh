#!/usr/bin/env bash
# webdataset 1.0.2, WebDataset(shardshuffle=N) without a seed: the order of the shards is drawn once, when the object is made, and is the same
# in each epoch. With 0.2.86 it is another one each time. A later .shuffle() of samples, whose order does change, hides it. Epochs by
# .with_epoch(n) begin anew with these shards too: of 20 shards of 10 samples, epochs of 50 samples read the same five shards in eight
# epochs out of eight, and 150 of the 200 samples are never seen; with 0.2.86 all shards are read. detshuffle=True changes the order.
# Why it matters: short epochs over many shards are how large sets are read, and a fixed part of the data is trained on as if it were all. The
# first look at such a loader shows other samples in each run, as the order does depend on the run, and the upgrade says nothing.
# The cure: detshuffle=True (with persistent_workers=True, as it counts its epochs in the worker), resampled=True, or
# WebDataset(shardshuffle=False) after a list of shards that was shuffled by oneself, for each epoch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" "numpy<3" pyyaml braceexpand 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import sys
import warnings

import webdataset

warnings.filterwarnings("ignore", message=".*shardshuffle.*")
folder, version = sys.argv[1:]
shards = [f"{folder}/{shard:02d}.tar" for shard in range(20)]
for path in shards:
    with webdataset.TarWriter(path) as writer:
        for sample in range(10):
            writer.write({"__key__": path[-6:-4] + str(sample), "txt": "a caption"})


def orders(dataset, epochs=3):
    """The shards of each epoch, as they were opened."""
    return [tuple(dict.fromkeys(sample["__url__"] for sample in dataset)) for _ in range(epochs)]


def different(dataset):
    return len(set(orders(dataset)))


plain = different(webdataset.WebDataset(shards, shardshuffle=100))
counted = different(webdataset.WebDataset(shards, shardshuffle=100, detshuffle=True))
runs = {orders(webdataset.WebDataset(shards, shardshuffle=100), 1)[0] for _ in range(3)}
print(f"{version}: of 3 epochs {plain} orders of shards, {counted} with detshuffle; of 3 objects {len(runs)}")
short = webdataset.WebDataset(shards, shardshuffle=100).with_epoch(50)
read = [[sample["__key__"] for _, sample in zip(range(50), short)] for _ in range(8)]
seen = {key for epoch in read for key in epoch}
mixed = webdataset.WebDataset(shards, shardshuffle=100).shuffle(30)
firsts = {tuple(sample["__key__"] for _, sample in zip(range(20), mixed)) for _ in range(3)}
print(f"  8 epochs of 50 samples saw {len(seen)} of 200; {len(firsts)} orders of samples of 3 with .shuffle(30)")
assert counted == len(runs) == len(firsts) == 3
assert (plain, len(seen)) == (1, 50) if version == "1.0.2" else (plain == 3 and len(seen) > 100)
CODE
for version in 0.2.86 1.0.2; do
  "${pip[@]}" --no-deps "webdataset==$version" 2>/dev/null
  mkdir "$work/$version"
  "$work/venv/bin/python" "$work/seen.py" "$work/$version" "$version"
done
