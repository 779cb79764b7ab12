"""The `manifest.json` by which stages meet: what a folder holds, what made it, and from what."""

import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm import __version__
from vlm.errors import UsageError, VlmError
from vlm.files import fingerprint_of, sha256_of, write_text

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of a folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds.

    kind: shards, run, model, embeddings, index, upgrade (a head), or export (rows for other tools).
    fingerprint: identity of the content; readers compare it with what they were made from.
    inputs: fingerprint of each earlier stage, by name (`shards`, `model`, `embeddings`).
    configuration: what the stage was told, plain values only.
    """

    kind: str
    fingerprint: str
    counts: dict[str, int]
    configuration: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    generation: int = 0
    format: int = FORMAT
    made_by: str = f"vlm {__version__}"
    made_at: str = ""
    command: str = ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json` atomically; from then on the folder counts as whole."""
    values = asdict(manifest)
    values["made_at"] = manifest.made_at or datetime.now(UTC).isoformat(timespec="seconds")
    values["command"] = manifest.command or " ".join(["vlm", *sys.argv[1:]])
    write_text(folder / MANIFEST, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    (folder / PROGRESS).unlink(missing_ok=True)


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Read a folder's manifest.

    Raises:
        UsageError: no manifest, another kind of folder, or a format this version cannot read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = (folder / PROGRESS).is_file()
        why = "is unfinished: run the command that makes it again" if unfinished else f"has no {MANIFEST}"
        raise UsageError(f"{folder} {why}; a finished {kind} folder was expected.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise VlmError(f"{path} is damaged ({error}); make the folder again.") from error
    if values.get("kind") != kind:
        raise UsageError(f"{folder} holds {values.get('kind')!r}, but {kind!r} was expected.")
    if values.get("format") != FORMAT:
        raise UsageError(
            f"{folder} has format {values.get('format')}, this vlm {__version__} reads {FORMAT}: "
            "use the version that made it, or make it again."
        )
    values["files"] = {name: FileRecord(**record) for name, record in values["files"].items()}
    return Manifest(**values)


def is_complete(folder: Path) -> bool:
    """Whether the folder carries a manifest."""
    return (folder / MANIFEST).is_file()


def record_file(path: Path) -> FileRecord:
    """Size and checksum of a file as it is on disk now."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))


def begin_folder(folder: Path, *, kind: str, configuration: dict[str, Any]) -> bool:
    """Open an output folder for work; True if earlier, unfinished work of the same kind goes on.

    Raises:
        UsageError: the folder is finished, holds something else, or was begun with another
            configuration; nothing in it is touched.
    """
    identity = fingerprint_of(kind, json.dumps(configuration, sort_keys=True, default=str))
    if is_complete(folder):
        raise UsageError(f"{folder} exists already and is complete; name another folder or remove it.")
    marker = folder / PROGRESS
    if marker.is_file():
        begun = json.loads(marker.read_text(encoding="utf-8"))
        if begun.get("identity") != identity:
            raise UsageError(
                f"{folder} holds unfinished work ({begun.get('kind')}) begun with another input or "
                "configuration; repeat that command, name another folder, or remove it."
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is not empty; name another folder or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(marker, json.dumps({"kind": kind, "identity": identity, "configuration": configuration}, default=str))
    return False
