"""`vlm.export`: a model for another tool, or as ONNX, by which it embeds and is evaluated without torch."""

import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm.errors import UsageError, os_errors_explained
from vlm.files import check_not_exists
from vlm.model_spec import export_folder, is_onnx_folder, source_folder
from vlm.models.onnx_encoder import (
    OnnxFolder,
    OnnxPrecision,
    read_onnx_folder,
    stale_reason,
)
from vlm.results import Result

if TYPE_CHECKING:
    from vlm.models.export import Export

MAX_RECALL_LOSS = 0.01


@dataclass(frozen=True, kw_only=True)
class OnnxExport(Result):
    """What was written for onnxruntime.

    largest_difference: between an entry of a unit vector there and here, over some test images and texts, in float32.
    quality: what int8 costs on the shards it was measured with; empty for float32.
    """

    out: str
    fingerprint: str
    precision: OnnxPrecision
    largest_difference: float
    bytes: int
    quality: dict[str, Any] = field(default_factory=dict)


@os_errors_explained()
def export(
    model: str | Path,
    out: str | Path | None = None,
    *,
    to: Literal["open-clip", "onnx"] = "open-clip",
    precision: OnnxPrecision = "float32",
    evaluate: str = "",
    max_recall_loss: float = MAX_RECALL_LOSS,
) -> "Export | OnnxExport":
    """Export a model and verify that its embeddings are the same.

    Args:
        model: a MODEL as of `vlm.load`.
        out: a new folder. An ONNX export needs none: it lies beside the model, where `vlm embed`, `index add`,
            `search`, `classify` and `eval` find it, and takes the place of an older one there.
        to: `open-clip`, a folder for `open_clip.create_model_and_transforms("local-dir:OUT")`, or `onnx`, both towers
            for onnxruntime.
        precision: of an ONNX export. int8 makes it smaller and faster, for some loss.
        evaluate: shards with captions, on which the loss of int8 is measured.
        max_recall_loss: an int8 export whose recall falls by more than this fraction is refused.

    Raises:
        UsageError: there is no such model, it cannot be exported, or the options do not fit together.
        VlmError: the embeddings differ, or recall falls too far; nothing is written.
    """
    if to not in ("open-clip", "onnx"):
        raise UsageError(f"to = {to!r} is unknown; give open-clip or onnx.")
    spec = str(model)
    if to == "open-clip":
        if out is None or precision != "float32" or evaluate:
            raise UsageError("An export to open-clip needs OUT, and knows neither --precision nor --evaluate.")
        return _export_open_clip(spec, Path(out))
    if (precision == "int8") != bool(evaluate):
        raise UsageError("int8 needs shards to measure its loss (--evaluate SHARDS), float32 none.")
    if not 0 <= max_recall_loss <= 1:
        raise UsageError(f"max_recall_loss = {max_recall_loss}: a fraction from 0 to 1 was expected.")
    return _result(_export_onnx(spec, None if out is None else Path(out), precision, evaluate, max_recall_loss))


def _export_open_clip(spec: str, out: Path) -> "Export":
    from vlm.models.export import export_open_clip
    from vlm.models.load import load_network

    # before a model is loaded, which may take a minute
    check_not_exists(out)
    return export_open_clip(load_network(spec, device="cpu"), out)


def _export_onnx(
    spec: str, out: Path | None, precision: OnnxPrecision, shards: str, max_recall_loss: float
) -> OnnxFolder:
    beside = export_folder(spec)
    target = beside if out is None else out
    if out is not None:
        check_not_exists(out)
    elif beside == Path(spec):
        raise UsageError(f"{spec} is an ONNX export already; name the model it was made from.")
    # next to the target, so that they can take its place by a rename
    target.parent.mkdir(parents=True, exist_ok=True)
    workplace = target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
    try:
        made = _made_in(workplace, spec, precision, shards, max_recall_loss)
        _put_in_place(made.path, target)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return read_onnx_folder(target)


def _made_in(workplace: Path, spec: str, precision: OnnxPrecision, shards: str, max_recall_loss: float) -> OnnxFolder:
    from vlm.evaluation.onnx_int8 import quantize_export
    from vlm.models.load import load_network
    from vlm.models.onnx_export import export_onnx

    path = Path(spec.removeprefix("local-dir:"))
    source = source_folder(path) if path.is_dir() else None
    float32 = _up_to_date(spec) if precision == "int8" else None
    if float32 is None:
        model = load_network(spec, device="cpu")
        float32 = export_onnx(model, workplace / "float32", spec=spec, source=source)
    if precision == "float32":
        return float32
    return quantize_export(float32, workplace / "int8", shards, max_recall_loss=max_recall_loss)


def _up_to_date(spec: str) -> OnnxFolder | None:
    """The float32 export beside a model, which int8 can be made from."""
    folder = export_folder(spec)
    if not is_onnx_folder(folder):
        return None
    existing = read_onnx_folder(folder)
    return existing if existing.details.precision == "float32" and not stale_reason(existing) else None


def _put_in_place(folder: Path, target: Path) -> None:
    old = folder.parent / "old"
    if target.exists():
        target.rename(old)
    folder.rename(target)


def _result(written: OnnxFolder) -> OnnxExport:
    details = written.details
    return OnnxExport(
        out=str(written.path),
        fingerprint=written.fingerprint,
        largest_difference=details.largest_difference,
        precision=details.precision,
        bytes=sum(path.stat().st_size for path in written.path.iterdir()),
        quality=details.quality,
    )
