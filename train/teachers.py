"""Models that say, while training, what the student is to learn from: a teacher, or its own average."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.models.encoder import VisionLanguageModel, normalise
from vlm.tensors import Float, Tensor, UInt8
from vlm.train.objectives.term import Inputs


class LiveTeacher:
    """Another model, run on what the student is shown: gives `teacher_image` and `teacher_text`, of unit length.

    Pictures come in the student's view and are brought to the size and the statistics of the teacher's; captions go
    through the teacher's own tokenizer. The teacher is frozen and runs in its own precision.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self.model = model
        model.network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"], captions: Sequence[str]) -> Inputs:
        """Embeddings of pictures and captions, on the teacher's device."""
        model = self.model
        pixels = normalise(resize(images.to(model.device), model.view.size, model.view.interpolation), model.view)
        tokens = torch.from_numpy(model.tokenizer.encode(list(captions))).to(model.device)
        is_lower = model.precision != torch.float32
        with torch.autocast(model.device.type, dtype=model.precision if is_lower else None, enabled=is_lower):
            image = model.network.encode_image(pixels)  # pyright: ignore[reportCallIssue]
            text = model.network.encode_text(tokens)  # pyright: ignore[reportCallIssue]
        return {
            "teacher_image": F.normalize(image.float(), dim=-1),
            "teacher_text": F.normalize(text.float(), dim=-1),
        }


class AverageTeacher:
    """The student's own image tower with the running mean of its weights (EMA): gives `global_target`.

    weights: by the names they have in the network; read anew in each call, so they may be updated in place. What is
    not among them (buffers) is the student's own. The tower runs as in evaluation, so it neither drops anything nor
    touches statistics.

    Raises:
        UsageError: the weights are not the network's.
    """

    def __init__(self, weights: dict[str, Tensor], model: VisionLanguageModel) -> None:
        unknown = weights.keys() - model.network.state_dict().keys()
        if unknown:
            raise UsageError(f"The averaged weights are of another network: it has no {min(unknown)}.")
        self.model = model
        self.weights = weights
        self._encoder = _ImageEncoder(model.network)

    @torch.no_grad()
    def __call__(self, images: UInt8[Tensor, "B 3 H W"], captions: Sequence[str]) -> Inputs:
        """Unit vectors of the whole view; captions are not read."""
        pixels = normalise(images.to(self.model.device), self.model.view)
        modes = {module: module.training for module in self._encoder.modules()}
        self._encoder.eval()
        try:
            named = {f"network.{name}": tensor for name, tensor in self.weights.items()}
            image: Tensor = functional_call(self._encoder, named, (pixels,))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return {"global_target": F.normalize(image.float(), dim=-1)}


def resize(images: UInt8[Tensor, "B 3 H W"], size: int, interpolation: str) -> UInt8[Tensor, "B 3 S S"]:
    """Square pictures at another size, antialiased; as they are where the size is theirs."""
    if images.shape[-2:] == (size, size):
        return images
    resized = F.interpolate(images.float(), size=(size, size), mode=interpolation, antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


class _ImageEncoder(nn.Module):
    """`encode_image` as the forward pass, since that is what `functional_call` calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.network.encode_image(pixels)  # pyright: ignore[reportCallIssue]
