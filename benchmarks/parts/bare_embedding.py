"""The parts of vlm embed in isolation: the model on one batch repeatedly, by torch and by its ONNX export, and the
reading of its images."""

import time
from collections.abc import Callable
from typing import Any

import torch
from measure_server import serve

from vlm.data.tar import ShardReader
from vlm.data.tokenizers import trim_tokens
from vlm.index.embed import embed_by_length
from vlm.models.load import load_model
from vlm.models.model import VisionLanguageModel, enable_padding_trim
from vlm.service.query import open_bulk_export

loaded: dict[str, VisionLanguageModel] = {}
_WARM_UP = 2


@torch.inference_mode()
def answer(request: dict[str, Any]) -> dict[str, float]:
    """Pairs per second of the model with texts at full context length (`whole`) and trimmed to the longest (`cut`),
    of its export with texts of like length together (`export`), and of one reader (`reading`)."""
    if not loaded:
        loaded["model"] = load_model(request["model"], device="cpu")
        enable_padding_trim(loaded["model"].network)
    model, captions, seconds = loaded["model"], request["captions"], request["seconds"]
    network: Any = model.network
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(len(captions), 3, model.view.size, model.view.size, generator=drawn)
    whole = model.tokenizer.encode(captions)
    found = {}
    for name, tokens in (("whole", whole), ("cut", trim_tokens(whole, model.tokenizer))):
        rows = torch.from_numpy(tokens)

        def both_towers(rows: torch.Tensor = rows) -> None:
            network.encode_image(images, normalize=True)
            network.encode_text(rows, normalize=True)

        found[name] = _rate(both_towers, seconds) * len(captions)
    export = open_bulk_export(request["model"])
    pixels = images.to(torch.uint8).numpy()

    def both_exported() -> None:
        export.embed_images(pixels)
        embed_by_length(export, captions)

    found["export"] = _rate(both_exported, seconds) * len(captions)
    reader = ShardReader(request["shard"])
    numbers = range(min(len(captions), len(reader.index)))
    found["reading"] = _rate(lambda: [model.view(reader.read(number).image) for number in numbers], seconds)
    reader.close()
    return found | {"reading": found["reading"] * len(numbers)}


def _rate(work: Callable[[], object], seconds: float) -> float:
    """Calls per second, measured for some seconds."""
    for _ in range(_WARM_UP):
        work()
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        times += 1
    return times / (time.perf_counter() - began)


if __name__ == "__main__":
    serve(answer)
