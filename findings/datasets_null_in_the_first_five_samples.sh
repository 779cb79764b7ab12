#!/usr/bin/env bash
# datasets 5.2.0, load_dataset("webdataset"): a JSON key that is null in the first five samples of the first tar makes the whole
# load fail as soon as a later sample has a value: "Couldn't cast array of type double to null". Where the key is missing from
# the first five, the same load succeeds and drops the value. So null, which is what one writes so that all samples have all
# keys, is worse than nothing. Nested keys and lists that are empty in the first five behave alike.
# Why it matters: scores that only some images have, second captions and captions in a second language often begin after the
# fifth sample; such shards are read by webdataset, Ray Data and Energon, and by datasets only in part or not at all.
# The cure: a README.md beside the tars whose YAML block names the features (dataset_info), read by load_dataset(FOLDER).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "datasets==5.2.0" 2>/dev/null
cat >"$work/seen.py" <<'CODE'
import io
import json
import sys
import tarfile
from pathlib import Path

import datasets

root = Path(sys.argv[1])
datasets.disable_progress_bars()
CARD = """---
dataset_info: {"features": [{"name": "txt", "dtype": "string"}, {"name": "json", "struct": [{"name": "n", "dtype": "int64"},
  {"name": "score", "dtype": "float64"}]}, {"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]}
---
"""


def write(folder, first_five):
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(8):
            values = {"n": number} | (first_five if number < 5 else {"score": 0.5})
            for ending, data in (("txt", b"a dog"), ("json", json.dumps(values).encode())):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def scores(folder):
    try:
        rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / f"cache-{folder.name}"))
    except Exception as error:
        return f"{type(error).__name__}: {error.__cause__}"
    return [row["json"].get("score", "dropped") for row in rows][-1]


for name, first_five in (("missing", {}), ("null", {"score": None}), ("card", {"score": None})):
    write(root / name, first_five)
    if name == "card":
        (root / name / "README.md").write_text(CARD)
    print(f"{name}: {scores(root / name)}")
CODE
export HF_HUB_OFFLINE=1
seen=$("$work/venv/bin/python" "$work/seen.py" "$work" 2>/dev/null)
echo "$seen"
grep -qx "missing: dropped" <<<"$seen"
grep -qx "null: DatasetGenerationError: Couldn't cast array of type double to null" <<<"$seen"
grep -qx "card: 0.5" <<<"$seen"
