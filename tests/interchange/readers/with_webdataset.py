"""Samples of shards as webdataset gives them, as JSON lines: SHARDS…"""

import hashlib
import json
import sys

import webdataset

samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False)
for sample in samples:
    image = next(name for name in sample if name in ("jpg", "png", "webp"))
    row = {"key": sample["__key__"], "endings": sorted(name for name in sample if not name.startswith("__"))}
    row["image"] = hashlib.sha256(sample[image]).hexdigest()
    row["json"], row["txt"] = json.loads(sample["json"]), sample["txt"].decode()
    print(json.dumps(row))
