"""When a checkpoint is due, and how several processes agree on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class Cadence:
    """Due by steps, by minutes, or both.

    every: steps between checkpoints. minutes: between checkpoints besides; 0 goes by steps alone.
    saved_seconds: when the last was taken, on the clock of `is_due`.
    """

    every: int
    minutes: float = 0.0
    saved_seconds: float = 0.0

    def is_regular(self, step: int) -> bool:
        """Whether one is due by its step: the same in every part of an interrupted run."""
        return step % self.every == 0

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether one is due. Clocks differ between processes, so these `agree` on it: that of any counts.

        seconds: time spent in the run so far.

        >>> cadence = Cadence(every=100, minutes=1)
        >>> [cadence.is_due(step, seconds) for step, seconds in ((99, 59), (99, 60), (100, 1))]
        [False, True, True]
        """
        is_late = self.minutes > 0 and seconds - self.saved_seconds >= 60 * self.minutes
        return self.is_regular(step) or is_late

    def saved(self, seconds: float) -> None:
        """One was taken now."""
        self.saved_seconds = seconds


def agree(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of the flags are set in any process, in one exchange."""
    if not dist.is_initialized():
        return list(flags)
    votes = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]
