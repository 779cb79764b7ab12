"""Which of several processes this one is, and which shards are its own."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vlm.errors import UsageError

# torchrun and accelerate launch set the first; srun sets the second for each process of a step, and only then
_NAMES = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Share:
    """Process `rank` of `world`; `local_rank` is its number on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def of(self, count: int) -> range:
        """The numbers below `count` that are this process's: they are the same whatever is done already."""
        return range(self.rank, count, self.world)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Share":
        """As torchrun, accelerate launch or srun started this process; alone where none of them did.

        Raises:
            UsageError: the numbers do not fit together.
        """
        for names in _NAMES:
            if all(name in environment for name in names[:2]):
                told = {name: environment.get(name, environment[names[0]]) for name in names}
                if not all(value.isdecimal() for value in told.values()) or int(told[names[0]]) >= int(told[names[1]]):
                    raise UsageError(f"{told} name no process: {names[0]} counts from 0 to {names[1]} - 1.")
                return cls(*map(int, told.values()))
        return cls()


ALONE = Share()
