"""The `manifest.json` by which stages meet: what a folder holds, what made it, and from what."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlm import __version__
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint, sha256_file, write_text

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

    kind: shards, run, model, embeddings, index, upgrade (a head), reranker, or export (rows for other tools).
    fingerprint: identity of the content; readers compare it with what they were made from.
    inputs: fingerprint of each earlier stage, by name (`shards`, `model`, `embeddings`).
    configuration: the settings of the stage, plain values only.
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
    """Write `folder/manifest.json` atomically; from then on the folder counts as complete."""
    values = asdict(manifest)
    values["made_at"] = manifest.made_at or datetime.now(UTC).isoformat(timespec="seconds")
    values["command"] = manifest.command or " ".join(["vlm", *sys.argv[1:]])
    # in this order: a crash in between leaves both files, and the manifest counts
    write_text(folder / MANIFEST, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    (folder / PROGRESS).unlink(missing_ok=True)


def read_manifest(folder: Path, kind: str, *, name: str = MANIFEST) -> Manifest:
    """Read a folder's manifest, or a copy of an earlier one under another name.

    Raises:
        UsageError: no manifest, another kind of folder, or a format this version cannot read.
        VlmError: it is damaged.
    """
    path = folder / name
    if not path.is_file():
        unfinished = (folder / PROGRESS).is_file()
        why = "is unfinished: run the command that makes it again" if unfinished else f"has no {MANIFEST}"
        # as the folder that `vlm find --index` names, which holds one beside its record of files
        inner = folder / kind
        cure = f" There is one in it: {inner}." if (inner / MANIFEST).is_file() else ""
        raise UsageError(f"{folder} {why}; a finished {kind} folder was expected.{cure}")
    # kind and format first: the fields of another format would only look damaged
    values = _read_object(path)
    if values.get("kind") != kind:
        raise UsageError(f"{folder} holds {values.get('kind')!r}, but {kind!r} was expected.")
    if values.get("format") != FORMAT:
        raise UsageError(
            f"{folder} has format {values.get('format')}, this vlm {__version__} reads {FORMAT}: "
            "use the version that made it, or make it again."
        )
    with damage_as_error(path):
        values["files"] = {name: FileRecord(**record) for name, record in values["files"].items()}
        return Manifest(**values)


@contextlib.contextmanager
def damage_as_error(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged JSON file into one message.

    Raises:
        VlmError: the block failed to read it.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else error
        raise VlmError(f"{path} is damaged ({what}); restore a copy of it, or make the folder again.") from error


def _read_object(path: Path) -> dict[str, Any]:
    with damage_as_error(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it holds no JSON object")
    return values


def recorded_configuration(folder: Path) -> dict[str, Any]:
    """The settings of the work in a folder, finished or not; none where no work was begun.

    Raises:
        VlmError: what says so is damaged.
    """
    for name in (MANIFEST, PROGRESS):
        path = folder / name
        if path.is_file():
            values = _read_object(path)
            with damage_as_error(path):
                return dict(values["configuration"])
    return {}


def is_complete(folder: Path) -> bool:
    """Whether the folder carries a manifest."""
    return (folder / MANIFEST).is_file()


def record_file(path: Path) -> FileRecord:
    """Size and checksum of a file as it is on disk now."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))


def begin_or_resume_folder(folder: Path, *, kind: str, configuration: dict[str, Any]) -> bool:
    """Open an output folder; True if unfinished work of the same kind is resumed.

    Raises:
        UsageError: the folder is finished, holds something else, or was begun with another
            configuration; nothing in it is changed.
    """
    if is_complete(folder):
        raise UsageError(f"{folder} exists already and is complete; name another folder or remove it.")
    marker = folder / PROGRESS
    if marker.is_file():
        # compared as a whole: any other setting could give other bytes
        begun = _read_object(marker)
        if begun.get("identity") != _identity_of(kind, configuration):
            raise UsageError(
                f"{folder} holds unfinished work ({begun.get('kind')}) begun with another input or "
                "configuration; repeat that command, name another folder, or remove it."
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already and is not empty; name another folder or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    _write_progress(folder, kind, configuration)
    return False


def mark_unfinished(folder: Path, *, kind: str, configuration: dict[str, Any]) -> None:
    """Make a finished folder unfinished again, as if it had been begun with this configuration."""
    # in this order: a folder with neither file, even for a moment, could not be resumed
    _write_progress(folder, kind, configuration)
    (folder / MANIFEST).unlink(missing_ok=True)


def _write_progress(folder: Path, kind: str, configuration: dict[str, Any]) -> None:
    begun = {"kind": kind, "identity": _identity_of(kind, configuration), "configuration": configuration}
    # the configuration is there for people to read; only the identity is compared
    write_text(folder / PROGRESS, json.dumps(begun, default=str))


def _identity_of(kind: str, configuration: dict[str, Any]) -> str:
    return compute_fingerprint(kind, json.dumps(configuration, sort_keys=True, default=str))


def check_files(folder: Path, files: dict[str, FileRecord], *, verify: bool, cure: str) -> None:
    """Compare a folder's files with its manifest: sizes, and with `verify` checksums.

    Raises:
        VlmError: a file is missing or differs; the message ends with the cure.
    """
    if fault := first_mismatch(folder, files, verify=verify):
        raise VlmError(f"{fault}; {cure}.")


def first_mismatch(folder: Path, files: dict[str, FileRecord], *, verify: bool) -> str:
    """What is wrong with the first file that differs from its record in the manifest; empty if none does."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != record.bytes:
            return f"{path} is damaged: {size:,} bytes, {record.bytes:,} were written"
        # last: a checksum reads the whole file
        if verify and sha256_file(path) != record.sha256:
            return f"{path} is damaged: its checksum is not the one it was written with"
    return ""


def sorted_checksums(files: dict[str, FileRecord]) -> list[str]:
    """The checksums of files in the order of their names, as fingerprints are computed from them."""
    return [files[name].sha256 for name in sorted(files)]
