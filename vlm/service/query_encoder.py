"""What embeds queries: a MODEL's ONNX export where there is one that is up to date, which needs no torch; else torch.

`VLM_BACKEND` says which of the two is meant: `onnx`, `torch`, or `auto`, the default.
"""

import importlib.util
import logging
import os
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np

from vlm.config import suggest
from vlm.errors import UsageError, VlmError
from vlm.index.encoder import Encoder
from vlm.model_spec import export_folder, is_onnx_folder, split_model_spec
from vlm.models.onnx_encoder import OnnxEncoder, read_onnx_folder, stale_reason
from vlm.tensor_types import Array, Float32, UInt8

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "onnx"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "onnx")
VARIABLE = "VLM_BACKEND"
QueryEncoder = Encoder | OnnxEncoder


def chosen_backend(option: str = "") -> Backend:
    """The backend of an option, else of the environment, else auto.

    Raises:
        UsageError: it is none of them.
    """
    name = option or os.environ.get(VARIABLE, "") or "auto"
    for backend in BACKENDS:
        if name == backend:
            return backend
    raise UsageError(f"There is no backend {name!r} ({VARIABLE}); {suggest(name, BACKENDS)}.")


def load_encoder(spec: str) -> Encoder:
    """The model a manifest names, by torch."""
    # here, since most searches need no torch, which takes seconds to load
    from vlm.models.load import load_model

    return cast(Encoder, load_model(spec))


def load_query_encoder(
    spec: str,
    *,
    backend: str = "",
    prefers_gpu: bool = False,
    load: Callable[[str], Encoder] = load_encoder,
) -> QueryEncoder:
    """What embeds the queries of a MODEL on this machine.

    prefers_gpu: torch is taken where there is a GPU: for many queries or images at once. load: the model by torch.

    Raises:
        UsageError: there is no such model, or the backend is `onnx` and there is no export that is up to date.
        VlmError: the model, or the export that was asked for, is damaged.
    """
    choice = chosen_backend(backend)
    if choice == "torch" or (choice == "auto" and prefers_gpu and _has_gpu()):
        return load(spec)
    reason = ""
    try:
        return open_export(spec)
    except VlmError as error:
        if choice == "onnx":
            raise
        reason = str(error)
    encoder = load(spec)
    # after the model: where there is none, that is all there is to say
    logger.info(reason)
    return encoder


def query_loader(*, backend: str = "", prefers_gpu: bool = False) -> "partial[QueryEncoder]":
    """`load_query_encoder` with its options set.

    Raises:
        UsageError: there is no such backend.
    """
    return partial(load_query_encoder, backend=chosen_backend(backend), prefers_gpu=prefers_gpu)


def open_export(spec: str) -> OnnxEncoder:
    """The ONNX export of a MODEL.

    Raises:
        UsageError: there is none, it is out of date, or onnxruntime is missing. VlmError: it is damaged.
    """
    model, dimensions = split_model_spec(spec)
    folder = export_folder(model)
    command = f"vlm export {shlex.quote(model)} --to onnx"
    if not is_onnx_folder(folder):
        raise UsageError(
            f"{model} has no ONNX export, with which searches and evaluations start without torch: {command}"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise UsageError(f"The ONNX export of {model} needs onnxruntime: pip install 'vlm-pipeline[onnx]'.")
    export = read_onnx_folder(folder)
    if reason := stale_reason(export):
        raise UsageError(
            f"The ONNX export of {model} is not used: {reason} since it was made. Make it again: {command}"
        )
    return OnnxEncoder(name=model, export=export, dimensions=dimensions)


def embed_pixels(encoder: QueryEncoder, pixels: UInt8[Array, "B 3 H W"]) -> Float32[Array, "B D"]:
    """Unit vectors of images as the encoder's `view` gives them."""
    if isinstance(encoder, OnnxEncoder):
        return encoder.embed_images(pixels)
    import torch

    return encoder.embed_images(torch.from_numpy(pixels)).numpy()


def embed_query_texts(encoder: QueryEncoder, texts: Sequence[str]) -> Float32[Array, "T D"]:
    """Unit vectors of texts."""
    return np.asarray(encoder.embed_texts(texts))


def _has_gpu() -> bool:
    # without torch, whose answer would cost more than the GPU saves
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and Path("/dev/nvidia0").exists()


class TextCache:
    """The vectors of the last texts that were embedded; the same text is embedded once. Several threads may share it.

    hits, misses: texts found and not found.
    """

    def __init__(self, size: int) -> None:
        self.hits = 0
        self.misses = 0
        self._size = size
        self._vectors: OrderedDict[str, Float32[Array, " D"]] = OrderedDict()
        self._lock = threading.Lock()

    def embed(self, encoder: QueryEncoder, texts: Sequence[str]) -> Float32[Array, "T D"]:
        """Unit vectors of texts; always of the same encoder."""
        with self._lock:
            known = {text: self._vectors[text] for text in texts if text in self._vectors}
            for text in known:
                self._vectors.move_to_end(text)
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        self.hits += len(texts) - len(missing)
        self.misses += len(missing)
        if missing:
            rows = embed_query_texts(encoder, missing)
            known |= zip(missing, rows, strict=True)
            self._remember(missing, rows)
        return np.stack([known[text] for text in texts])

    def _remember(self, texts: Sequence[str], rows: Float32[Array, "T D"]) -> None:
        with self._lock:
            for text, row in zip(texts, rows, strict=True):
                # a view would keep the vectors of its whole batch for as long
                self._vectors[text] = row.copy()
            while len(self._vectors) > self._size:
                self._vectors.popitem(last=False)
