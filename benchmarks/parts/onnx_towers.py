"""Pairs of towers with random weights, exported to ONNX and compared with torch; the speed of int8."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.messages import say

from vlm.data.tokenizers import ClipTokenizer, SentencePieceTokenizer, Tokenizer
from vlm.data.transforms import EvalTransform
from vlm.evaluation.onnx_int8 import quantize_tower
from vlm.model_spec import ONNX_TEXT_TOWER
from vlm.models.model import VisionLanguageModel, build_network, enable_padding_trim, fit_to_tokenizer, model_config
from vlm.models.onnx_encoder import EMBEDDINGS, IMAGE_TOWER, PIXELS, TOKENS, OnnxFolder, open_session
from vlm.models.onnx_export import export_onnx

TOWERS = {
    "ViT with CLIP's text transformer": "ViT-S-32-alt",
    "tiny": "tiny",
    "tiny-coca": "tiny-coca",
    "small (ConvNeXt)": "small",
    "timm ViT, bag of words": "timm:vit_tiny_patch16_224+bag@128",
    "timm EfficientNet-Lite, n-grams": "timm:efficientnet_lite0+ngram@128",
    "timm ConvNeXt, BERT": "timm:test_convnext+hf:{folder}/bert@128",
    "timm ViT, frozen Llama": "timm:test_vit+lm:{folder}/llama@128",
}
"""Architectures by what they are; {folder} has tiny models of transformers."""

_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an export is from torch."""

    name: str
    largest_difference: float
    text_length: str
    seconds: float


def measure_parity(name: str, quickstart: Path) -> Parity:
    """Export a pair of towers and compare it in batches of 1, 2 and 33. quickstart: has a tokenizer."""
    say(f"exporting {name} …")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_language_models(folder)
        pieces = SentencePieceTokenizer((quickstart / "tokenizer.model").read_bytes(), 24)
        architecture = TOWERS[name].format(folder=folder)
        model = _model(architecture, ClipTokenizer() if architecture.startswith("ViT") else pieces)
        started = time.perf_counter()
        export = export_onnx(model, folder / "onnx", spec=name, source=None)
        return Parity(
            name=name,
            largest_difference=export.details.largest_difference,
            text_length=export.details.text_length,
            seconds=round(time.perf_counter() - started, 1),
        )


def _model(architecture: str, tokenizer: Tokenizer) -> VisionLanguageModel:
    torch.manual_seed(0)
    config = fit_to_tokenizer(model_config(architecture), tokenizer)
    network = build_network(config).eval()
    return VisionLanguageModel(
        name=architecture,
        network=network,
        config=config,
        view=EvalTransform(size=config["vision_cfg"]["image_size"]),
        tokenizer=tokenizer,
        trims_padding=enable_padding_trim(network),
    )


def _write_language_models(folder: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

    layers: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 300,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig(**layers)).save_pretrained(folder / "bert")
    AutoModelForCausalLM.from_config(LlamaConfig(**layers)).save_pretrained(folder / "llama")


def int8_speed(architecture: str) -> list[dict[str, Any]]:
    """CPU milliseconds of each tower for 1 and 8 rows in float32 and int8, in turn, and their sizes on disk."""
    say(f"int8 speed of {architecture} …")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        model = _model(architecture, ClipTokenizer())
        float32 = export_onnx(model, Path(temporary) / "float32", spec=architecture, source=None)
        (Path(temporary) / "int8").mkdir()
        int8 = OnnxFolder(path=Path(temporary) / "int8", fingerprint="", details=float32.details)
        rows: list[dict[str, Any]] = []
        for tower, name in ((IMAGE_TOWER, PIXELS), (ONNX_TEXT_TOWER, TOKENS)):
            quantize_tower(float32.path / tower, int8.path / tower)
            side = model.view.size
            for number in (1, 8):
                texts = [f"a photo of {word} dogs" for word in rng.integers(0, 1000, number)]
                pixels = rng.integers(0, 256, (number, 3, side, side), dtype=np.uint8)
                batch = pixels if tower == IMAGE_TOWER else model.tokenizer.encode(texts)
                runs: dict[str, Callable[[], Any]] = {}
                for precision, export in (("float32", float32), ("int8", int8)):
                    session = open_session(export, tower, threads=int(os.environ.get("OMP_NUM_THREADS", "0")))
                    runs[precision] = partial(session.run, [EMBEDDINGS], {name: batch})
                milliseconds = _in_turn(runs)
                row: dict[str, Any] = {"tower": tower.removesuffix(".onnx"), "rows": number}
                row |= {f"{precision}_ms": value for precision, value in milliseconds.items()}
                row["ratio"] = milliseconds["float32"] / milliseconds["int8"]
                row |= {"float32_mb": _megabytes(float32, tower), "int8_mb": _megabytes(int8, tower)}
                rows.append(row)
    return rows


def _in_turn(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(_ROUNDS + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if number:
                times[name].append((time.process_time() - started) * 1000)
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


def _megabytes(export: OnnxFolder, tower: str) -> float:
    return round(sum(path.stat().st_size for path in export.path.glob(f"{tower}*")) / 1e6, 1)
