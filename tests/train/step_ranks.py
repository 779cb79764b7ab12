"""One process of several: the gradients of its share of a batch, for each case on the command line, to a JSON file.

python -m tests.train.step_ranks OUT.json CASES PARTS: CASES is a JSON list of [objective, trims]; PARTS an object, for
each sharding (none, fsdp) the numbers of parts that a share is cut into.
"""

import json
import os
import sys
from pathlib import Path

import torch

from tests.leaving import leave_group
from tests.train.step_case import Case


def main(out: str, cases: list[tuple[str, bool]], parts: dict[str, list[int]]) -> None:
    """The first process writes what all have found together."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results = []
    for objective, trims in cases:
        for sharding, splits in parts.items():
            case = Case(objective, trims=trims, samples=16)
            if sharding == "fsdp":
                case.shard()
            for split in splits:
                losses, gradients = case.gradients(split=split, process=rank, processes=world)
                total = torch.stack(list(losses.values())).sum() / world
                torch.distributed.all_reduce(total)
                found = {name: value.tolist() for name, value in gradients.items()}
                told = {"case": [objective, trims], "sharding": sharding, "split": split}
                results.append(told | {"loss": float(total), "gradients": found})
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]))
