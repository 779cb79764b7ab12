"""Throughput of a model alone: copying a batch to the device, forward, forward and backward."""

from collections.abc import Callable

import torch
from torch import nn

from vlm.data.profiling import Stage, StageName, seconds_of
from vlm.errors import VlmError
from vlm.models.model import VisionLanguageModel, autocast_to, normalise
from vlm.tensor_types import Int64, Tensor, UInt8

# the first calls choose kernels and allocate memory
_WARM_UP = 2


def accelerator_name(device: torch.device) -> str:
    """What the device is called, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no accelerator"


def measure_copy(images: UInt8[Tensor, "B 3 H W"], device: torch.device) -> list[Stage]:
    """Copying a batch from page-locked memory, with the rate from ordinary memory as a note; nothing on a CPU."""
    if device.type != "cuda":
        return []
    # copies from page-locked memory run at the bus's speed and in the background
    pinned = images.pin_memory()
    seconds = _device_seconds(lambda: pinned.to(device, non_blocking=True), device)
    plain = _device_seconds(lambda: images.to(device), device)
    size = images.numel()
    return [
        Stage(
            name="copy to device",
            rate=len(images) / seconds,
            cores=0,
            each="machine",
            bytes_rate=size / seconds,
            note=f"pinned; {size / plain / 1e9:.1f} GB/s from ordinary memory",
        )
    ]


def measure_model(
    model: VisionLanguageModel, images: UInt8[Tensor, "B 3 H W"], tokens: Int64[Tensor, "B L"]
) -> list[Stage]:
    """Forward with and without the backward pass, on a batch that is on the device already; no weight changes.

    Raises:
        VlmError: the batch does not fit into memory.
    """
    images = images.to(model.device)
    tokens = tokens.to(model.device)
    cores = torch.get_num_threads() if model.device.type == "cpu" else 0

    def stage(name: StageName, work: Callable[[], object]) -> Stage:
        seconds = _device_seconds(work, model.device)
        return Stage(name=name, rate=len(images) / seconds, cores=cores, each="machine")

    try:
        forward = stage("model, forward", lambda: _forward(model, images, tokens))
        # dropout and batch norm cost time in training only
        model.network.train()
        try:
            step = stage("model, forward and backward", lambda: _forward_backward(model, images, tokens))
        finally:
            model.network.zero_grad(set_to_none=True)
            model.network.eval()
    except torch.OutOfMemoryError as error:
        raise VlmError(
            f"A batch of {len(images)} does not fit into the memory of {model.device}; give a smaller --batch-size."
        ) from error
    return [forward, step]


@torch.inference_mode()
def _forward(model: VisionLanguageModel, images: Tensor, tokens: Tensor) -> None:
    with autocast_to(model.precision, model.device):
        model.network(normalise(images, model.view), tokens)


def _forward_backward(model: VisionLanguageModel, images: Tensor, tokens: Tensor) -> None:
    """One pass of CLIP's loss (Radford et al. 2021, figure 3), with that of the captions for a model that writes."""
    with autocast_to(model.precision, model.device):
        outputs = model.network(normalise(images, model.view), tokens)
        logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
        matching = torch.arange(len(images), device=logits.device)
        loss = nn.functional.cross_entropy(logits, matching) + nn.functional.cross_entropy(logits.T, matching)
        if "logits" in outputs:
            loss = loss + nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), outputs["labels"].flatten())
    loss.backward()


def _device_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has finished the work, which it runs asynchronously."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(_WARM_UP):
        finished()
    return seconds_of(finished)
