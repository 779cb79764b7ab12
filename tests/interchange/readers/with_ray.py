"""Samples of shards as Ray Data gives them, as JSON lines: SHARDS…"""

import hashlib
import json
import sys

import ray


def decoded(sample: dict) -> dict:
    """Its images stay bytes; the rest as Ray's own decoder has it."""
    return {name: json.loads(value) if name == "json" else value for name, value in sample.items()}


ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
samples = ray.data.read_webdataset(sys.argv[1:], decoder=decoded, override_num_blocks=1)
for sample in samples.take_all():
    row = {"key": sample["__key__"], "endings": sorted(name for name in sample if not name.startswith("__"))}
    row["image"] = hashlib.sha256(sample["jpg"]).hexdigest()
    txt = sample["txt"]
    row["json"], row["txt"] = sample["json"], txt.decode() if isinstance(txt, bytes) else txt
    print(json.dumps(row))
