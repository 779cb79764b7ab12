"""An ONNX export with matrices of 8 bits, and what it costs: cosines with the float32 export, recall on shards.

onnxruntime's `quantize_dynamic` is not used: it measures one scale for the activations of the whole batch, so that the
embedding of a row depends on its neighbours. Here each block of 32 weights has a scale, and within a product each block
of 32 numbers of a row (`MatMulNBits`); convolutions and everything else stay in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.collate import iter_sample_batches
from vlm.data.shards import expand_shards
from vlm.errors import UsageError, VlmError
from vlm.evaluation.retrieval_metrics import RetrievalResult, measure_retrieval
from vlm.files import atomic_folder
from vlm.model_spec import ONNX_TEXT_TOWER
from vlm.models.onnx_encoder import IMAGE_TOWER, OnnxEncoder, OnnxFolder, read_onnx_folder
from vlm.models.onnx_export import quiet, write_onnx_manifest
from vlm.results import Result
from vlm.tensor_types import Array, Float32

MAX_RECALL_LOSS = 0.01
_BLOCK = 32
_BITS = 8
# the products are computed in int8; 0 would compute them in float32, slower than without any quantisation
_ACCURACY_LEVEL = 4
_LARGEST_DIFFERENCE_ALONE = 1e-6


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss(Result):
    """What 8 bits cost on some shards: queries by the int8 export against rows by the float32 one, as in an index.

    image_cosine, text_cosine: the smallest and the mean cosine of an embedding with its float32 one.
    float32, int8: recall by name and cut-off, as fractions. recall_loss: the largest fall of any of them.
    """

    shards: str
    images: int
    texts: int
    image_cosine: dict[str, float]
    text_cosine: dict[str, float]
    float32: dict[str, float]
    int8: dict[str, float]
    recall_loss: float


def quantize_export(
    export: OnnxFolder, out: Path, shards: str, *, max_recall_loss: float = MAX_RECALL_LOSS
) -> OnnxFolder:
    """Write the int8 copy of a float32 export, with its loss on the shards in the manifest; whole or not at all.

    Raises:
        UsageError: `out` exists, the towers have no matrix product to quantise, or the shards have no captions.
        VlmError: recall falls by more than the bound.
    """
    expanded = expand_shards(shards)
    with atomic_folder(out) as folder:
        num_quantized = sum(
            quantize_tower(export.path / name, folder / name) for name in (IMAGE_TOWER, ONNX_TEXT_TOWER)
        )
        if not num_quantized:
            raise UsageError(f"{export.details.model} has no matrix products: int8 would save nothing.")
        for path in export.path.iterdir():
            if path.suffix not in (".onnx", ".data") and path.name != "manifest.json":
                (folder / path.name).write_bytes(path.read_bytes())
        written = OnnxFolder(path=folder, fingerprint=export.fingerprint, details=export.details)
        int8 = OnnxEncoder(name=export.details.model, export=written)
        float32 = OnnxEncoder(name=export.details.model, export=export)
        _check_rows_are_apart(int8)
        loss = measure_loss(float32, int8, expanded, shards)
        # "not at most" instead of "greater", so that NaN is refused as well
        if not loss.recall_loss <= max_recall_loss:
            raise VlmError(
                f"In int8 recall falls by {100 * loss.recall_loss:.1f} points on {shards}, more than the bound of "
                f"{100 * max_recall_loss:.1f} (--max-recall-loss); nothing was written."
            )
        write_onnx_manifest(
            folder,
            export.fingerprint,
            export.details,
            export.details.largest_difference,
            precision="int8",
            quality=loss.to_json(),
        )
    return read_onnx_folder(out)


def quantize_tower(source: Path, target: Path) -> int:
    """Write a tower with its matrices in int8; the number of products that use them."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=_BLOCK, is_symmetric=True, accuracy_level=_ACCURACY_LEVEL, bits=_BITS
    )
    with quiet():
        quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=config)
        quantizer.process()
        model: Any = quantizer.model
        model.save_model_to_file(str(target), True)
    return sum(node.op_type == "MatMulNBits" for node in model.model.graph.node)


def _check_rows_are_apart(encoder: OnnxEncoder) -> None:
    """An image alone and beside a loud one, a text alone and beside a long one, must be embedded alike."""
    side = encoder.view.size
    grey = np.full((1, 3, side, side), 128, np.uint8)
    checkered = np.indices((1, 3, side, side)).sum(axis=0).astype(np.uint8) % 2 * 255
    alone = encoder.embed_images(grey)[0]
    together = encoder.embed_images(np.concatenate([grey, checkered]))[0]
    texts = ["a small red circle", "two LARGE blue stars! " * 20]
    differences = [
        np.abs(alone - together).max(),
        np.abs(encoder.embed_texts(texts[:1])[0] - encoder.embed_texts(texts)[0]).max(),
    ]
    if not max(differences) <= _LARGEST_DIFFERENCE_ALONE:
        raise VlmError(
            f"In int8 an embedding depends on its batch here (by {max(differences):.1e}), so an image embedded twice "
            "would not be found again; nothing was written."
        )


def measure_loss(float32: OnnxEncoder, int8: OnnxEncoder, shards: Sequence[str], name: str) -> QuantizationLoss:
    """Compare two exports of a model on the images and captions of shards.

    Raises:
        UsageError: no image with a caption can be used.
    """
    exact_images: list[Float32[Array, "N D"]] = []
    coarse_images: list[Float32[Array, "N D"]] = []
    captions: list[tuple[str, ...]] = []
    for batch in iter_sample_batches(shards, float32.view, workers=0):
        if batch.decoded:
            pixels = batch.images.numpy()
            exact_images.append(float32.embed_images(pixels))
            coarse_images.append(int8.embed_images(pixels))
            captions += [next(iter(sample.captions.values()), ())[:1] for sample in batch.decoded]
    texts = list(chain.from_iterable(captions))
    if not texts:
        raise UsageError(f"No image of {name} has a caption to measure recall with.")
    images = np.concatenate(exact_images)
    query_images = np.concatenate(coarse_images)
    vectors = float32.embed_texts(texts)
    query_texts = int8.embed_texts(texts)
    exact = measure_retrieval(images, vectors, captions)
    recall = _recall(exact, exact)
    coarse = _recall(
        measure_retrieval(images, query_texts, captions), measure_retrieval(query_images, vectors, captions)
    )
    return QuantizationLoss(
        shards=name,
        images=len(images),
        texts=len(texts),
        image_cosine=_cosines(images, query_images),
        text_cosine=_cosines(vectors, query_texts),
        float32=recall,
        int8=coarse,
        recall_loss=max(recall[cutoff] - coarse[cutoff] for cutoff in recall),
    )


def _recall(by_text: RetrievalResult, by_image: RetrievalResult) -> dict[str, float]:
    named: dict[str, float] = {}
    for direction, recall in (
        ("text_to_image", by_text.text_to_image.recall),
        ("image_to_text", by_image.image_to_text.recall),
    ):
        for k, value in recall.items():
            named[f"{direction}_recall@{k}"] = value
    return named


def _cosines(first: Float32[Array, "N D"], second: Float32[Array, "N D"]) -> dict[str, float]:
    cosines = np.vecdot(first, second)
    return {"smallest": float(cosines.min()), "mean": float(cosines.mean())}
