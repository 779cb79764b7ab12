"""A model compiled by torch for batches of one size."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlm.data.views import FixedView
from vlm.errors import UsageError, VlmError
from vlm.index.encoder import Encoder
from vlm.models.encoder import VisionLanguageModel
from vlm.tensors import Float32, Tensor, UInt8


@dataclass(frozen=True)
class CompiledEncoder:
    """Shows the model pictures in batches of just `batch_size`, the last ones filled up with black."""

    model: VisionLanguageModel
    batch_size: int

    @property
    def view(self) -> FixedView:
        """Of the model."""
        return self.model.view

    @property
    def fingerprint(self) -> str:
        """Of the model: compiling changes no weight."""
        return self.model.fingerprint

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.model.embedding_size

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of pictures, as many at most as the batch size."""
        missing = self.batch_size - len(images)
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return self.model.embed_images(images)[: self.batch_size - missing]

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts."""
        return self.model.embed_texts(texts)


def compile_encoder(model: Encoder, batch_size: int) -> CompiledEncoder:
    """Compile the image tower of a model and try it.

    Raises:
        UsageError: it is no network. VlmError: torch cannot compile it here.
    """
    if not isinstance(model, VisionLanguageModel):
        raise UsageError(f"A {type(model).__name__} cannot be compiled; leave --compile out.")
    model.fingerprint  # noqa: B018  taken of the weights before anything is changed
    network, encoder, side = model.network, CompiledEncoder(model, batch_size), model.view.size
    network.encode_image = torch.compile(network.encode_image)  # pyright: ignore[reportCallIssue, reportArgumentType]
    try:
        encoder.embed_images(torch.zeros(batch_size, 3, side, side, dtype=torch.uint8))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers stumble over
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise VlmError(f"{model.name} cannot be compiled on {model.device}: {reason}. Leave --compile out.") from error
    return encoder
