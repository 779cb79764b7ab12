"""The folder of an ONNX export: what it holds, where it lies for a MODEL, and whether the model is still the same.

    image.onnx, text.onnx (each with its weights in NAME.onnx.data), the tokenizer, manifest.json

Nothing here needs torch: a search reads this folder instead of loading the model.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vlm.errors import VlmError
from vlm.files import sha256_file, write_text
from vlm.manifest import MANIFEST, Manifest, damage_as_error, read_manifest
from vlm.models.model_spec import CHECKPOINTS, LOCAL_PREFIX, RUN_MODEL, model_folder

KIND = "onnx"
FOLDER = "onnx"
IMAGE_TOWER = "image.onnx"
TEXT_TOWER = "text.onnx"
PIXELS = "pixels"
TOKENS = "tokens"
EMBEDDINGS = "embeddings"

OnnxPrecision = Literal["float32", "int8"]


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of the model that was exported, as it was then."""

    bytes: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class OnnxDetails:
    """What an export's manifest says besides the fingerprint, which is that of the model.

    model: MODEL as it was named. source, source_files: its folder and the files there; empty for a name of open_clip.
    view: the fields of `EvalTransform`. text_length: "any" if rows of tokens may be cut to the longest text.
    logit_scale: turns cosines into logits. largest_difference: of an entry of a unit vector from torch's.
    quality: what int8 costs, measured; empty for float32.
    """

    model: str
    source: str
    source_files: dict[str, SourceFile]
    view: dict[str, Any]
    embedding_size: int
    context_length: int
    text_length: Literal["any", "context"]
    logit_scale: float
    precision: OnnxPrecision
    largest_difference: float
    quality: dict[str, Any]
    made_with: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class OnnxFolder:
    """A complete export."""

    path: Path
    fingerprint: str
    details: OnnxDetails


def export_folder(spec: str) -> Path:
    """Where the export of a MODEL lies: in its model folder, or for a name of open_clip or the Hub in the cache."""
    path = Path(spec.removeprefix(LOCAL_PREFIX))
    if not path.is_dir():
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return base / "vlm" / FOLDER / re.sub(r"[^\w.-]+", "--", spec)
    if is_onnx_folder(path):
        return path
    return source_folder(path) / FOLDER


def source_folder(folder: Path) -> Path:
    """The folder that holds the weights: of a run its final model or newest checkpoint, else the folder itself."""
    is_run = (folder / RUN_MODEL).is_dir() or (folder / CHECKPOINTS).is_dir()
    return model_folder(folder) if is_run else folder


def is_onnx_folder(folder: Path) -> bool:
    """Whether a folder holds a complete export."""
    path = folder / MANIFEST
    if not path.is_file() or not (folder / TEXT_TOWER).is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("kind") == KIND
    except (ValueError, AttributeError):
        return False


def read_onnx_folder(folder: Path) -> OnnxFolder:
    """An export's manifest; its files must have the recorded sizes.

    Raises:
        UsageError: it is not an export. VlmError: it is damaged.
    """
    manifest = read_manifest(folder, KIND)
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise VlmError(f"{path} is missing or damaged; export the model again (vlm export MODEL --to onnx).")
    return OnnxFolder(path=folder, fingerprint=manifest.fingerprint, details=_details(manifest, folder))


def _details(manifest: Manifest, folder: Path) -> OnnxDetails:
    with damage_as_error(folder / MANIFEST):
        values = dict(manifest.details)
        values["source_files"] = {name: SourceFile(**file) for name, file in values["source_files"].items()}
        return OnnxDetails(**values)


def record_sources(folder: Path) -> dict[str, SourceFile]:
    """The files of a model folder by their paths below it, without its exports and its manifest, which has the date."""
    sources: dict[str, SourceFile] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and name.parts[0] not in (FOLDER, MANIFEST):
            stat = path.stat()
            sources[str(name)] = SourceFile(bytes=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=sha256_file(path))
    return sources


def stale_reason(export: OnnxFolder) -> str:
    """Why an export is no longer that of the model beside it; empty if it is.

    Sizes and times are compared; a file with another time is read, and where it is the same after all (a copied
    folder), the new time is recorded. An export whose model is gone is good: it needs nothing else.
    """
    # beside its model it belongs to that one, also after both were moved
    beside = export.path.parent if export.path.name == FOLDER else None
    folder = beside if beside is not None and export.details.source else Path(export.details.source)
    touched: dict[str, SourceFile] = {}
    for name, recorded in export.details.source_files.items():
        try:
            stat = os.stat(folder / name)
        except OSError:
            if folder == beside:
                return f"{folder / name} is gone"
            continue
        if stat.st_size != recorded.bytes:
            return f"{folder / name} has changed"
        if stat.st_mtime_ns != recorded.mtime_ns:
            if sha256_file(folder / name) != recorded.sha256:
                return f"{folder / name} has changed"
            touched[name] = replace(recorded, mtime_ns=stat.st_mtime_ns)
    if touched:
        _record_times(export, touched)
    return ""


def _record_times(export: OnnxFolder, touched: dict[str, SourceFile]) -> None:
    path = export.path / MANIFEST
    values = json.loads(path.read_text(encoding="utf-8"))
    values["details"]["source_files"] |= {name: asdict(file) for name, file in touched.items()}
    try:
        write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    except OSError:
        return  # a folder that only others may write to: the files are read again next time
