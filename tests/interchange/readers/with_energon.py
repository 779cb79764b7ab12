"""Samples of shards as Megatron Energon gives them, as JSON lines: SHARDS… (a copy of their folder is prepared)"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset, stateless


@stateless
def as_it_is(sample: dict) -> dict:
    return sample


class Plain(DefaultTaskEncoder):
    cookers = (Cooker(as_it_is),)

    def batch(self, samples: list) -> list:
        return samples


with tempfile.TemporaryDirectory() as folder:
    for shard in sys.argv[1:]:
        shutil.copy(shard, folder)
    prepare = [str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive", "--split-ratio", "1,0,0"]
    subprocess.run([*prepare, "--sample-type", "CrudeWebdataset", folder], check=True, stdout=sys.stderr)
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    samples = get_val_dataset(
        folder, split_part="train", worker_config=workers, batch_size=1, task_encoder=Plain(), auto_decode=False
    )
    for (sample,) in get_loader(samples):
        row = {"key": sample["__key__"].rpartition("/")[2]}
        row["endings"] = sorted(name for name in sample if not name.startswith("__"))
        row["image"] = hashlib.sha256(sample["jpg"]).hexdigest()
        row["json"], row["txt"] = json.loads(sample["json"]), sample["txt"].decode()
        print(json.dumps(row))
