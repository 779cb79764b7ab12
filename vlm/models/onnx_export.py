"""Export of both towers to ONNX, compared with torch before anything is kept.

Pixels are normalised inside the image tower and embeddings inside both, so that each graph gives unit vectors of bytes
of colour or of tokens. `onnx_encoder` says what lies where, and runs it.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.data.tokenizers import VOCABULARY, ClipTokenizer, open_tokenizer, save_without_torch, shipped_vocabulary
from vlm.errors import UsageError, VlmError
from vlm.files import atomic_folder
from vlm.manifest import Manifest, record_file, write_manifest
from vlm.model_spec import ONNX, ONNX_TEXT_TOWER
from vlm.models.model import VisionLanguageModel, normalise
from vlm.models.onnx_encoder import (
    EMBEDDINGS,
    IMAGE_TOWER,
    PIXELS,
    TOKENS,
    OnnxDetails,
    OnnxEncoder,
    OnnxFolder,
    OnnxPrecision,
    read_onnx_folder,
    record_sources,
)
from vlm.tensor_types import Float32, Int64, Tensor, UInt8

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""The largest difference of an entry of a unit vector from torch's, in float32."""

# an example of one row is fixed as one in places of the graph, one of two is not; 33 is a batch and one more
_EXAMPLE_ROWS = 2
_TRIED_ROWS = (1, 2, 33)
_TEXTS = ("a small red circle", "two large blue stars on a white background " * 9, "Ein Hund läuft.", "", "x")
_INSTALL = "Exporting to ONNX needs onnx, onnxscript and onnxruntime: pip install 'vlm-pipeline[onnx]'."


class _ImageTower(nn.Module):
    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.network = model.network
        self.view = model.view

    def forward(self, pixels: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors."""
        return nn.functional.normalize(self.network.encode_image(normalise(pixels, self.view)).float(), dim=-1)


class _TextTower(nn.Module):
    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.network = model.network

    def forward(self, tokens: Int64[Tensor, "T L"]) -> Float32[Tensor, "T D"]:
        """Unit vectors."""
        return nn.functional.normalize(self.network.encode_text(tokens).float(), dim=-1)


def export_onnx(model: VisionLanguageModel, out: Path, *, spec: str, source: Path | None) -> OnnxFolder:
    """Write an export of a model on the CPU, whole or not at all, in float32.

    spec: MODEL as it was named. source: the folder with its files, by which a change of the model is noticed later;
        None for a name of open_clip or the Hub, whose weights never change.

    Raises:
        UsageError: `out` exists, or the libraries are not installed.
        VlmError: torch cannot export the network, or the result differs by more than `TOLERANCE`.
    """
    _require_libraries()
    if model.view.grid:
        raise VlmError(f"{model.name} gives each image a grid of its own, which has no ONNX form; use it by torch.")
    sources = {} if source is None else record_sources(source)
    # what a tower loads with its first text must be there before: the exporter would give it tensors without values,
    # and it would keep them
    model.embed_texts(_TEXTS[:1])
    with atomic_folder(out) as folder:
        _export_tower(_ImageTower(model), _example_pixels(model), folder / IMAGE_TOWER, model.name)
        has_any_length = _export_text_tower(model, folder / ONNX_TEXT_TOWER)
        is_free_of_torch = save_without_torch(model.tokenizer, folder, open_tokenizer)
        if not is_free_of_torch:
            logger.warning(
                f"The tokenizer of {model.name} gives other ids without transformers, so queries go on loading it."
            )
        if isinstance(model.tokenizer, ClipTokenizer):
            (folder / VOCABULARY).write_bytes(shipped_vocabulary())
        details = OnnxDetails(
            model=spec,
            source="" if source is None else str(source.resolve()),
            source_files=sources,
            view=model.view.to_preprocess(),
            embedding_size=model.embedding_size,
            context_length=model.tokenizer.context_length,
            text_length="any" if has_any_length else "context",
            logit_scale=model.logit_scale,
            precision="float32",
            largest_difference=0.0,
            quality={},
            made_with={name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript")},
        )
        difference = largest_difference(model, OnnxFolder(path=folder, fingerprint="", details=details))
        # "not at most" instead of "greater", so that NaN is refused as well
        if not difference <= TOLERANCE:
            raise VlmError(
                f"The ONNX export of {model.name} differs from torch: an entry of a unit vector by {difference:.1e}, "
                f"more than {TOLERANCE:.0e}; nothing was written."
            )
        write_onnx_manifest(folder, model.fingerprint, details, difference)
    return read_onnx_folder(out)


def write_onnx_manifest(
    folder: Path,
    fingerprint: str,
    details: OnnxDetails,
    difference: float,
    *,
    precision: OnnxPrecision = "float32",
    quality: dict[str, Any] | None = None,
) -> None:
    """Write the manifest of a folder whose other files are complete."""
    measured = replace(details, largest_difference=difference, precision=precision, quality=quality or {})
    files = {path.name: record_file(path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
    write_manifest(
        folder,
        Manifest(
            kind=ONNX,
            fingerprint=fingerprint,
            counts={"embedding_size": details.embedding_size, "context_length": details.context_length},
            configuration={"precision": precision, "view": details.view},
            inputs={"model": fingerprint},
            files=files,
            details=asdict(measured),
        ),
    )


def largest_difference(model: VisionLanguageModel, export: OnnxFolder) -> float:
    """Of an entry of a unit vector by ONNX Runtime and by torch, over batches of 1, 2 and 33 images and texts."""
    encoder = OnnxEncoder(name=model.name, export=export)
    generator = torch.Generator().manual_seed(0)
    differences: list[float] = []
    for number in _TRIED_ROWS:
        pixels = torch.randint(256, (number, *_image_shape(model)), generator=generator, dtype=torch.uint8)
        images = torch.from_numpy(encoder.embed_images(pixels.numpy()))
        differences.append(float((images - model.embed_images(pixels)).abs().max()))
        texts = [_TEXTS[row % len(_TEXTS)] for row in range(number)]
        differences.append(float((torch.from_numpy(encoder.embed_texts(texts)) - model.embed_texts(texts)).abs().max()))
    return max(differences) if not any(map(_is_nan, differences)) else float("nan")


def _is_nan(number: float) -> bool:
    return number != number


def _image_shape(model: VisionLanguageModel) -> tuple[int, int, int]:
    return (3, model.view.size, model.view.size)


def _example_pixels(model: VisionLanguageModel) -> UInt8[Tensor, "2 3 H W"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (_EXAMPLE_ROWS, *_image_shape(model)), generator=generator, dtype=torch.uint8)


def _export_text_tower(model: VisionLanguageModel, path: Path) -> bool:
    """Export the text tower; whether its rows of tokens may have any length, which makes short queries fast."""
    tokens = torch.from_numpy(model.tokenizer.encode(["a red star", "two blue squares on white"]))
    tower = _TextTower(model)
    if model.trims_padding:
        try:
            length = torch.export.Dim("length", min=1, max=tokens.shape[1])
            _export_tower(tower, tokens, path, model.name, length=length)
            return True
        except VlmError as error:  # some networks of others have the context length in their graph
            logger.debug(f"Exported with whole rows of tokens: {error}")
    _export_tower(tower, tokens, path, model.name)
    return False


def _export_tower(tower: nn.Module, example: Tensor, path: Path, name: str, *, length: Any = None) -> None:
    input_name = PIXELS if path.name == IMAGE_TOWER else TOKENS
    axes = {0: torch.export.Dim("batch", min=1)} | ({} if length is None else {1: length})
    try:
        with torch.no_grad(), quiet():
            torch.onnx.export(
                tower.eval(),
                (example,),
                str(path),
                input_names=[input_name],
                output_names=[EMBEDDINGS],
                dynamic_shapes=(axes,),
                dynamo=True,
                # weights in a file of their own are mapped, not read: a query touches few pages of them
                external_data=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises anything
        shutil.rmtree(path, ignore_errors=True)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise VlmError(f"torch cannot export {name} to ONNX: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the talk of exporters and quantisers on stdout, in logs and in warnings, of which users have no use."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def _require_libraries() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UsageError(_INSTALL)
