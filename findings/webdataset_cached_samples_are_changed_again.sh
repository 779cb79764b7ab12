#!/usr/bin/env bash
# webdataset 1.0.2 (and filters.Cached of 0.2.86), .mcached(), which keeps the samples of the first epoch in memory for later ones: what
# .map_dict() does after it is done again in every epoch to what it did before. map_dict writes into the sample that it is given, and
# that one is kept. Scores doubled by map_dict(json=...) are 2 in the first epoch, then 4, then 8; a pixel of 200 divided by 255 is 0.78,
# then 0.003, then 0.00001. .map_tuple() makes a new sample and is right, and so is .map_dict() before .mcached(). Nothing is raised
# where the function takes its own output.
# Why it matters: decode, keep in memory, then augment or scale is the natural order for a small set on which one trains many epochs, and
# the first epoch, the only one that is looked at, is right. Lower-casing or resizing hides it; scaling and noise add up.
# The cure: .to_tuple(...) and .map_tuple(...) after .mcached(), or .map(dict) between the two.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" "numpy<3" pyyaml braceexpand 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import sys

import numpy as np
import webdataset

path, version = sys.argv[1:]
with webdataset.TarWriter(path) as writer:
    writer.write({"__key__": "photo", "npy": np.full((2, 2), 200, np.float32), "json": {"score": 1}, "txt": "a caption"})


def samples():
    return webdataset.WebDataset(path, shardshuffle=False).decode()


def cached(dataset):
    return dataset.mcached() if hasattr(dataset, "mcached") else dataset.compose(webdataset.filters.Cached())


def twice(score):
    return {"score": 2 * score["score"]}


def scaled(pixels):
    return pixels / 255


def epochs(dataset, value):
    return [value(next(iter(list(dataset)))) for _ in range(3)]


after = epochs(cached(samples()).map_dict(json=twice, npy=scaled), lambda sample: (sample["json"]["score"], float(sample["npy"].max())))
before = epochs(cached(samples().map_dict(json=twice)), lambda sample: sample["json"]["score"])
copied = epochs(cached(samples()).map(dict).map_dict(json=twice), lambda sample: sample["json"]["score"])
in_tuples = epochs(cached(samples()).to_tuple("json").map_tuple(twice), lambda sample: sample[0]["score"])
print(f"{version}: map_dict after the cache {after}")
print(f"  before it {before}, after a copy {copied}, map_tuple {in_tuples}")
assert [score for score, _ in after] == [2, 4, 8]
assert [pixel < 1.3e-5 for _, pixel in after] == [False, False, True]
assert before == copied == in_tuples == [2, 2, 2]
CODE
for version in 0.2.86 1.0.2; do
  "${pip[@]}" --no-deps "webdataset==$version" 2>/dev/null
  "$work/venv/bin/python" "$work/seen.py" "$work/$version.tar" "$version"
done
