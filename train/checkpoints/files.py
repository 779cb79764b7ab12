"""Checkpoints as folders: written whole or not at all, each with the checksums by which damage is found."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from vlm.errors import VlmError
from vlm.files import sync_folder, write_text
from vlm.manifest import record_file
from vlm.models.folder import WEIGHTS, save_model
from vlm.train.checkpoints.retention import Best, Facts
from vlm.train.checkpoints.snapshot import Snapshot

STATE = "state.json"
BEST = "best.json"
FORMAT = 2
_BESIDES_BYTES = 16 << 20
_IDENTITY = ("step", "position", "sequence", "rewinds", "skipped")


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/step-N`; a checkpoint is itself a model folder, and holds no pickled code.

    One that is there already, whole and of the same course of the run, is left as it is.

    Raises:
        VlmError: it cannot be written; the checkpoints before it are as they were.
    """
    final, beside = folder / name_of(snapshot.step), folder / f".{name_of(snapshot.step)}.part"
    try:
        folder.mkdir(exist_ok=True)
        if final.exists() and _is_same(final, snapshot.values):
            return final
        shutil.rmtree(beside, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        if free < snapshot.num_bytes + _BESIDES_BYTES:
            raise OSError("too little space")
        _write_files(beside, snapshot)
        if final.exists():
            remove_checkpoint(final)
        beside.rename(final)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise VlmError(_cannot_save(folder, snapshot, error)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def _write_files(beside: Path, snapshot: Snapshot) -> None:
    model = snapshot.model
    weights = snapshot.tensors[WEIGHTS]
    save_model(beside, weights=weights, config=model.config, view=model.view, tokenizer=model.tokenizer)
    for file, tensors in snapshot.tensors.items():
        if file != WEIGHTS:
            save_file(tensors, beside / file)
    files = sorted(path for path in beside.iterdir() if path.is_file())
    for path in files:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    records = {path.name: asdict(record_file(path)) for path in files}
    write_text(beside / STATE, json.dumps({"format": FORMAT, **snapshot.values, "files": records}))


def _cannot_save(folder: Path, snapshot: Snapshot, error: Exception) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free:,} are free"
    except OSError:
        free = "the free space cannot be asked"
    return (
        f"Step {snapshot.step:,} cannot be saved in {folder}: {error}. It takes "
        f"{snapshot.num_bytes + _BESIDES_BYTES:,} bytes, {free}. Make room or make the folder writable (or keep fewer "
        f"by --keep-checkpoints), then go on with: vlm train {folder.parent} --resume. Checkpoints before it are kept."
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def read_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint.

    Raises:
        VlmError: they cannot be read, or are of another format.
    """
    try:
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
        found = values["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VlmError(f"{path / STATE} cannot be read: {error!r}") from error
    if found != FORMAT:
        raise VlmError(f"{path} has format {found}, this version reads {FORMAT}")
    return values


def damage_of(path: Path) -> str:
    """What is wrong with a checkpoint; empty if every file has its checksum."""
    try:
        for name, record in read_values(path)["files"].items():
            if asdict(record_file(path / name)) != record:
                return f"{name} does not have its checksum"
    except (OSError, KeyError, AttributeError, VlmError) as error:
        return str(error)
    return ""


def facts_of(folder: Path) -> list[Facts]:
    """What the checkpoints of a folder say of themselves, oldest first; one that says nothing is left out."""
    found: list[Facts] = []
    for path in list_checkpoints(folder):
        try:
            found.append(Facts.of(read_values(path)))
        except (VlmError, KeyError):
            continue
    return found


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; from the first moment it counts as none."""
    aside = path.with_name(f".{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def remove_leavings(folder: Path) -> None:
    """Remove what a kill left half-written or half-removed."""
    for pattern in (".step-*.part", ".step-*.removed"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def write_best(folder: Path, best: Best | None) -> None:
    """Write `best.json`, which names the step of the best checkpoint, or remove it."""
    path = folder / BEST
    if best is None:
        path.unlink(missing_ok=True)
        return
    content = json.dumps({**asdict(best), "checkpoint": name_of(best.step)}) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        write_text(path, content)


def _is_same(path: Path, values: dict[str, Any]) -> bool:
    if damage_of(path):
        return False
    before = read_values(path)
    return all(before[name] == values[name] for name in _IDENTITY)
