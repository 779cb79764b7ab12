"""The state of one step, copied to host memory in one go, so that it can be written while the next steps run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm.data.ledger import Ledger
from vlm.models.encoder import VisionLanguageModel
from vlm.models.folder import WEIGHTS
from vlm.train.checkpoints.retention import Best
from vlm.train.checkpoints.sharded import whole
from vlm.train.state import TrainState

OPTIMIZER = "optimizer.safetensors"
HEADS = "heads.safetensors"
AVERAGE = "average.safetensors"

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A checkpoint in memory: tensors on the host by file and name, plain values, and what the model folder says."""

    step: int
    tensors: dict[str, Tensors]
    values: dict[str, Any]
    model: VisionLanguageModel
    best: Best | None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


@dataclass
class HostMemory:
    """Page-locked room for the tensors of a GPU, used again for each snapshot; tensors of the CPU are just copied."""

    _kept: Tensors = field(default_factory=dict)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy on the host; from a GPU it is there once the device is synchronised."""
        if tensor.device.type != "cuda":
            return tensor.detach().to("cpu", copy=True).contiguous()
        room = self._kept.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = self._kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return room.copy_(tensor.detach(), non_blocking=True)


def take_snapshot(
    state: TrainState, host: HostMemory, *, ledger: Ledger, is_regular: bool, is_main: bool = True
) -> Snapshot | None:
    """Copy the state; all processes call it, and only the main one gets a snapshot.

    ledger: that of all processes together.
    """
    tensors: dict[str, Tensors] = {}
    for file, held in tensors_of(state).items():
        gathered = ((name, whole(tensor)) for name, tensor in held.items())
        copies = {name: host.copy(f"{file}/{name}", tensor) for name, tensor in gathered if is_main}
        if copies or file == OPTIMIZER:
            tensors[file] = copies
    if not is_main:
        return None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    values = state.to_values() | {"is_regular": is_regular, "ledger": ledger.to_values()}
    return Snapshot(step=state.step, tensors=tensors, values=values, model=state.model, best=state.best)


def tensors_of(state: TrainState) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of a state as it holds them, by file and name."""
    return {
        WEIGHTS: state.network.state_dict(),
        HEADS: state.student.heads.state_dict(),
        AVERAGE: state.average or {},
        OPTIMIZER: {
            f"{name}/{key}": value
            for name, parameter in state.student.named_parameters()
            for key, value in state.optimizer.state.get(parameter, {}).items()
        },
    }
