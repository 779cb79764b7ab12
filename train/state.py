"""Everything that changes while training, as one thing that is saved whole and read back exactly."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vlm.console import say
from vlm.data.ledger import Ledger
from vlm.errors import VlmError
from vlm.files import fingerprint_of, sync_folder, write_text
from vlm.manifest import record_file
from vlm.models.encoder import VisionLanguageModel
from vlm.models.folder import WEIGHTS, save_model

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


@dataclass
class TrainState:
    """step: optimiser steps done. position: samples drawn so far, over all processes and epochs.
    sequence: fingerprint of the sequence of samples the position is in.

    Random generators are no part of it: each step seeds them from (seed, step, process), see `seed_step`.
    """

    model: VisionLanguageModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    position: int = 0
    sequence: str = ""
    elapsed_seconds: float = 0.0
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def network(self) -> nn.Module:
        """The network being trained, without any wrapper for several processes."""
        return self.model.network


def seed_step(seed: int, step: int, process: int) -> None:
    """Seed what the network draws from in one step (dropout), so that a resumed step draws the same."""
    torch.manual_seed(int(fingerprint_of(f"{seed}/{step}/{process}"), 16) >> 1)


def save_checkpoint(folder: Path, state: TrainState, *, keep: int) -> Path:
    """Write `folder/step-N`, whole or not at all, and remove all but the newest `keep`.

    A checkpoint is itself a model folder. It holds tensors (safetensors) and plain values (JSON), no pickled code.
    """
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{state.step:08d}"
    if final.exists():
        return final
    beside = folder / f".step-{state.step:08d}.part"
    shutil.rmtree(beside, ignore_errors=True)
    model = state.model
    try:
        save_model(
            beside,
            weights=model.network.state_dict(),
            config=model.config,
            view=model.view,
            tokenizer=model.tokenizer,
        )
        save_file(_optimizer_tensors(state), beside / OPTIMIZER)
        records = {name: asdict(record_file(beside / name)) for name in (WEIGHTS, OPTIMIZER)}
        plain = {
            "step": state.step,
            "position": state.position,
            "sequence": state.sequence,
            "elapsed_seconds": state.elapsed_seconds,
            "ledger": state.ledger.to_values(),
            "files": records,
        }
        write_text(beside / STATE, json.dumps(plain))
        for path in beside.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        beside.rename(final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def restore_newest(folder: Path, state: TrainState) -> bool:
    """Read the newest checkpoint that is undamaged into `state`; False if there is none.

    Raises:
        VlmError: there are checkpoints, but all are damaged.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        damage = _damage_of(path)
        if not damage:
            _restore(path, state)
            return True
        say(f"{path} is damaged ({damage}); trying the one before it.")
    if found:
        raise VlmError(f"All {len(found)} checkpoints in {folder} are damaged; start the run anew in another folder.")
    return False


def _restore(path: Path, state: TrainState) -> None:
    plain = json.loads((path / STATE).read_text(encoding="utf-8"))
    state.network.load_state_dict(load_file(path / WEIGHTS))
    tensors = load_file(path / OPTIMIZER)
    names = {parameter: name for name, parameter in state.network.named_parameters()}
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"{names[parameter]}/"
            values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if values:
                state.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}
    state.step, state.position, state.sequence = plain["step"], plain["position"], plain["sequence"]
    state.elapsed_seconds = plain["elapsed_seconds"]
    state.ledger = Ledger.from_values(plain["ledger"])


def _damage_of(path: Path) -> str:
    try:
        recorded: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
        for name, record in recorded.items():
            if asdict(record_file(path / name)) != record:
                return f"{name} does not have its checksum"
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return str(error)
    return ""


def _optimizer_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in state.network.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }
