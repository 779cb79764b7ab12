"""A checkpoint on disk: a folder `step-N`, written whole or not at all, with the checksums by which damage is found.

On the way to it: `take_snapshot` copies the state of one step to host memory in one go, so that it can be written while
the next steps run; `write_checkpoint` writes it; `steps_to_remove` says which older ones may go.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vlm.data.sample_ledger import Ledger
from vlm.errors import UsageError, VlmError
from vlm.files import fsync_folder, write_text
from vlm.manifest import record_file
from vlm.models.load import WEIGHTS, save_model
from vlm.models.model import VisionLanguageModel
from vlm.train.distributed import to_full_tensor
from vlm.train.state import BestCheckpoint, TrainState

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
HEADS = "heads.safetensors"
EMA_WEIGHTS = "average.safetensors"
AVERAGES = "global-averages.safetensors"
BEST = "best.json"
FORMAT = 2
_METADATA_BYTES = 16 << 20
"""Room for what a checkpoint holds in addition to its tensors: tokenizer, configuration, ledger."""
_IDENTITY = ("step", "position", "sequence", "rewinds", "skipped")
"""Values in which two checkpoints of one step differ if the run took another course."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint records of itself.

    is_scheduled: it was due by its step, so an interrupted run has it too; a rollback goes to such a one.
    is_good: no step just before it was skipped.
    """

    step: int
    is_scheduled: bool
    is_good: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "CheckpointInfo":
        """From the content of `state.json`."""
        is_good = not values["guard"]["in_a_row"]
        return cls(step=values["step"], is_scheduled=values["is_regular"], is_good=is_good)


def steps_to_remove(
    checkpoints: Sequence[CheckpointInfo], *, keep: int, best: int | None = None, in_use: Collection[int] = ()
) -> list[int]:
    """The steps whose checkpoints may be removed, oldest first.

    Kept are the newest `keep`, the newest `keep` that a rollback may go to, the newest good one, the best, and those
    in use.

    >>> checkpoints = [CheckpointInfo(step=step, is_scheduled=True, is_good=step < 40) for step in (10, 20, 30, 40, 50)]
    >>> steps_to_remove(checkpoints, keep=1, best=10)
    [20, 40]
    """
    ordered = sorted(checkpoints, key=lambda info: info.step)
    newest = [info.step for info in ordered[-keep:]]
    good: list[int] = []
    # a rollback goes to a good scheduled one, which no signal and no trouble may push out
    rollback_targets: list[int] = []
    for info in ordered:
        if info.is_good:
            good.append(info.step)
            if info.is_scheduled:
                rollback_targets.append(info.step)
    kept = {*newest, *good[-1:], *rollback_targets[-keep:], *in_use, best}
    return [info.step for info in ordered if info.step not in kept]


def new_best(best: BestCheckpoint | None, metric: str, values: Mapping[str, Any], step: int) -> BestCheckpoint | None:
    """The new best where these values beat it, else None.

    Raises:
        UsageError: the metric is not measured.
    """
    if metric not in values:
        measured = ", ".join(name for name, value in values.items() if isinstance(value, float))
        raise UsageError(f"keep_best = {metric!r} is not measured on val; name one of {measured}.")
    value = float(values[metric])
    # negated, since NaN is no gain and compares false
    if best is not None and best.metric == metric and not value > best.value:
        return None
    return BestCheckpoint(metric=metric, value=value, step=step)


Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A checkpoint in host memory: tensors by file and name, plain values, and what a model folder needs."""

    step: int
    tensors: dict[str, Tensors]
    values: dict[str, Any]
    model: VisionLanguageModel
    best: BestCheckpoint | None

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        num_bytes = 0
        for tensors in self.tensors.values():
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        return num_bytes


@dataclass
class PinnedBuffers:
    """Page-locked memory for the tensors of a GPU, reused for each snapshot; tensors of the CPU are just copied."""

    _buffers: Tensors = field(default_factory=dict)

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy on the host; from a GPU it is complete once the device is synchronised."""
        if tensor.device.type != "cuda":
            return tensor.detach().to("cpu", copy=True).contiguous()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._buffers[name] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)


def take_snapshot(
    state: TrainState, host: PinnedBuffers, *, ledger: Ledger, is_scheduled: bool, is_main: bool = True
) -> Snapshot | None:
    """Copy the state; all processes call it, and only the main one gets a snapshot.

    ledger: that of all processes together.
    """
    tensors: dict[str, Tensors] = {}
    for file, held in state_tensors(state).items():
        copies: Tensors = {}
        for name, tensor in held.items():
            full_tensor = to_full_tensor(tensor)  # an exchange that every process must take part in
            if is_main:
                copies[name] = host.copy(f"{file}/{name}", full_tensor)
        # the optimizer's file is always read, also where it holds nothing before the first step
        if copies or file == OPTIMIZER:
            tensors[file] = copies
    if not is_main:
        return None
    # copies to pinned memory are asynchronous
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    values = state.to_values() | {"is_regular": is_scheduled, "ledger": ledger.to_values()}
    return Snapshot(step=state.step, tensors=tensors, values=values, model=state.model, best=state.best)


def state_tensors(state: TrainState) -> dict[str, Mapping[str, Tensor]]:
    """The tensors of a state as it holds them, by file and name."""
    optimizer_tensors: Tensors = {}
    # by the name of the weight, where the optimizer itself has numbers that depend on its groups
    for name, parameter in state.task.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            optimizer_tensors[f"{name}/{key}"] = value
    return {
        WEIGHTS: state.network.state_dict(),
        HEADS: state.task.heads.state_dict(),
        EMA_WEIGHTS: state.ema_weights or {},
        AVERAGES: state.averages.tensors() if state.averages else {},
        OPTIMIZER: optimizer_tensors,
    }


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/step-N`; a checkpoint is itself a model folder, and holds no pickled code.

    One that exists already, whole and of the same course of the run, is kept.

    Raises:
        VlmError: it cannot be written; the checkpoints before it are unchanged.
    """
    final = folder / checkpoint_name(snapshot.step)
    partial = folder / f".{checkpoint_name(snapshot.step)}.part"
    try:
        folder.mkdir(exist_ok=True)
        # the same step after a resume; writing it again would risk the one that is known to be good
        if final.exists() and _is_same_state(final, snapshot.values):
            return final
        shutil.rmtree(partial, ignore_errors=True)
        # asked before writing: a disk that is filled up fails other programs too
        free = shutil.disk_usage(folder).free
        if free < snapshot.num_bytes + _METADATA_BYTES:
            raise OSError("too little space")
        _write_files(partial, snapshot)
        if final.exists():
            remove_checkpoint(final)
        # the rename is what makes it a checkpoint
        partial.rename(final)
        fsync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise VlmError(_save_error_message(folder, snapshot, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _write_files(partial: Path, snapshot: Snapshot) -> None:
    model = snapshot.model
    weights = snapshot.tensors[WEIGHTS]
    save_model(partial, weights=weights, config=model.config, view=model.view, tokenizer=model.tokenizer)
    for file, tensors in snapshot.tensors.items():
        if file != WEIGHTS:
            save_file(tensors, partial / file)
    files = sorted(path for path in partial.iterdir() if path.is_file())
    for path in files:
        # a checksum of what only the page cache holds would promise too much
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    records = {path.name: asdict(record_file(path)) for path in files}
    # last: a folder without it does not count as a checkpoint
    write_text(partial / STATE, json.dumps({"format": FORMAT, **snapshot.values, "files": records}))


def _save_error_message(folder: Path, snapshot: Snapshot, error: Exception) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free:,} are free"
    except OSError:
        free = "the free space is unknown"
    return (
        f"Step {snapshot.step:,} cannot be saved in {folder}: {error}. It takes "
        f"{snapshot.num_bytes + _METADATA_BYTES:,} bytes, {free}. Free some space or make the folder writable (or keep "
        f"fewer by --keep-checkpoints), then resume with: vlm train {folder.parent} --resume. Checkpoints before it "
        "are kept."
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def read_checkpoint_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        VlmError: they cannot be read, or are of another format.
    """
    try:
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
        format_number = values["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VlmError(f"{path / STATE} cannot be read: {error!r}") from error
    if format_number != FORMAT:
        raise VlmError(f"{path} has format {format_number}, this version reads {FORMAT}")
    return values


def find_damage(path: Path) -> str:
    """What is damaged in a checkpoint; empty if every file has its checksum."""
    try:
        for name, record in read_checkpoint_values(path)["files"].items():
            if asdict(record_file(path / name)) != record:
                return f"{name} does not have its checksum"
    except (OSError, KeyError, AttributeError, VlmError) as error:
        return str(error)
    return ""


def list_checkpoint_infos(folder: Path) -> list[CheckpointInfo]:
    """What the checkpoints of a folder record of themselves, oldest first; an unreadable one is left out."""
    infos: list[CheckpointInfo] = []
    for path in list_checkpoints(folder):
        with contextlib.suppress(VlmError, KeyError):
            infos.append(CheckpointInfo.of(read_checkpoint_values(path)))
    return infos


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint."""
    # renamed first, so that one removed by half never counts as a checkpoint
    aside = path.with_name(f".{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for pattern in (".step-*.part", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def write_best(folder: Path, best: BestCheckpoint | None) -> None:
    """Write `best.json`, which names the step of the best checkpoint, or remove it."""
    path = folder / BEST
    if best is None:
        path.unlink(missing_ok=True)
        return
    content = json.dumps({**asdict(best), "checkpoint": checkpoint_name(best.step)}) + "\n"
    # unchanged content is not written again, so that its time says when the best was found
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        write_text(path, content)


def _is_same_state(path: Path, values: dict[str, Any]) -> bool:
    if find_damage(path):
        return False
    before = read_checkpoint_values(path)
    return all(before[name] == values[name] for name in _IDENTITY)
