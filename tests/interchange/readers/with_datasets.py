"""Samples of shards as Hugging Face datasets gives them, as JSON lines: SHARDS…"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import datasets

with tempfile.TemporaryDirectory() as cache:
    # the card beside the shards tells the types
    table = datasets.load_dataset(str(Path(sys.argv[1]).parent), split="train", cache_dir=cache)
    table = table.cast_column("jpg", datasets.Image(decode=False))
    for sample in table:
        row = {"key": sample["__key__"], "endings": sorted(name for name in sample if not name.startswith("__"))}
        row["image"] = hashlib.sha256(sample["jpg"]["bytes"]).hexdigest()
        row["json"], row["txt"] = sample["json"], sample["txt"]
        print(json.dumps(row))
