"""Everything that changes while training, as one thing that is saved whole and read back exactly."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from vlm.data.sample_ledger import Ledger
from vlm.files import compute_fingerprint
from vlm.models.model import VisionLanguageModel
from vlm.train.metrics import WindowMean
from vlm.train.objectives.global_contrastive import GlobalAverages
from vlm.train.task import TrainingTask

# long enough for a stable median, short enough to follow the falling loss of an early run
LOSS_HISTORY_LENGTH = 100


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The best value of a metric so far, higher being better, and the step it was measured at."""

    metric: str
    value: float
    step: int


@dataclass
class LossSpikeGuard:
    """The losses of the last good steps, oldest first, and how many steps in a row have just been skipped."""

    losses: list[float] = field(default_factory=list)
    in_a_row: int = 0

    def accept(self, loss: float) -> None:
        """A step was good."""
        self.losses = [*self.losses[1 - LOSS_HISTORY_LENGTH :], loss]
        self.in_a_row = 0

    def reject(self) -> None:
        """A step was skipped."""
        self.in_a_row += 1


@dataclass
class TrainState:
    """What a checkpoint holds.

    step: batches trained on, those whose update was skipped included. position: samples drawn so far, over all
        processes and epochs; after a rollback it is ahead of step times batch by what was passed over.
    sequence: fingerprint of the sequence of samples the position is in.
    ema_weights: EMA of the network's weights, by their names, where one is kept.
    averages: of the samples, where a term keeps a state for each of them.
    spike_guard: what a loss is compared with. skipped: every skipped step and range of samples passed over, plain
        values. num_rollbacks: how often the run rolled back. best: the best value so far of the metric whose checkpoint
        is kept. window: what the next line of metrics is the mean of.

    Random generators are not part of it: each step seeds them from (seed, step, process), see `seed_step`.
    """

    task: TrainingTask
    model: VisionLanguageModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    position: int = 0
    sequence: str = ""
    elapsed_seconds: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)
    ema_weights: dict[str, torch.Tensor] | None = None
    averages: GlobalAverages | None = None
    spike_guard: LossSpikeGuard = field(default_factory=LossSpikeGuard)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    num_rollbacks: int = 0
    best: BestCheckpoint | None = None
    window: WindowMean = field(default_factory=WindowMean)

    @property
    def network(self) -> nn.Module:
        """The network being trained, without any wrapper for several processes."""
        return self.model.network

    @property
    def skipped_steps(self) -> list[dict[str, Any]]:
        """The skipped steps among `skipped`, without the ranges that rollbacks passed over."""
        return [entry for entry in self.skipped if "to_step" not in entry]

    def to_values(self) -> dict[str, Any]:
        """Everything but tensors and the ledger, which only all processes together know."""
        return {
            "step": self.step,
            "position": self.position,
            "sequence": self.sequence,
            "elapsed_seconds": self.elapsed_seconds,
            # names on disk are older than those of the attributes
            "guard": asdict(self.spike_guard),
            # copies, since a thread writes them while training goes on
            "skipped": [dict(entry) for entry in self.skipped],
            "rewinds": self.num_rollbacks,
            "best": asdict(self.best) if self.best else None,
            "window": self.window.to_values(),
        }

    def load_values(self, values: dict[str, Any]) -> None:
        """Restore what `to_values` gave."""
        self.step = values["step"]
        self.position = values["position"]
        self.sequence = values["sequence"]
        self.elapsed_seconds = values["elapsed_seconds"]
        self.spike_guard = LossSpikeGuard(**values["guard"])
        self.skipped = list(values["skipped"])
        self.num_rollbacks = values["rewinds"]
        self.best = BestCheckpoint(**values["best"]) if values["best"] else None
        self.window.restore(values["window"], self.model.device)


def seed_step(seed: int, step: int, process: int, part: int = 0) -> None:
    """Seed what the network draws from in one micro-batch of a step, so that a resumed one draws the same."""
    # hashed, so that neighbouring steps have unrelated seeds; shifted, since torch takes 63 bits
    torch.manual_seed(int(compute_fingerprint(f"{seed}/{step}/{process}/{part}"), 16) >> 1)
