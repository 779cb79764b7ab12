"""A model with the calls of transformers' dual encoders: `get_image_features` and `get_text_features`, and a processor.

For code that is written for `CLIPModel`: both calls take what the processor gives, have gradients, and give embeddings
that are not normalised, as there.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vlm.api.image_batches import Images, name_images, read_batches
from vlm.api.inference import Model
from vlm.data.tokenizers import trim_tokens
from vlm.errors import UsageError
from vlm.models.model import normalise
from vlm.tensor_types import Float, Int64, Tensor


class HuggingFaceStyle(nn.Module):
    """A module over the network of one of our models, whose weights it shares.

    processor: texts and images to its inputs, as `AutoProcessor` does it.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        encoder = model.encoder
        if encoder.derived_from:
            raise UsageError(f"{model.name} has no network of its own: it is derived from {encoder.derived_from}.")
        self.network = encoder.network
        self.processor = Processor(model)

    def get_image_features(self, pixel_values: Float[Tensor, "B 3 H W"], **_: Any) -> Float[Tensor, "B D"]:
        """Embeddings of images, not normalised."""
        return self.network.encode_image(pixel_values)

    def get_text_features(self, input_ids: Int64[Tensor, "B L"], **_: Any) -> Float[Tensor, "B D"]:
        """Embeddings of texts, not normalised."""
        return self.network.encode_text(input_ids)

    def forward(self, input_ids: Int64[Tensor, "T L"], pixel_values: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """`image_embeds` and `text_embeds` of unit length, and `logits_per_image` [B, T] and `logits_per_text`."""
        image = nn.functional.normalize(self.get_image_features(pixel_values), dim=-1)
        text = nn.functional.normalize(self.get_text_features(input_ids), dim=-1)
        # the scale is stored as its logarithm (CLIP, Radford et al. 2021)
        logits = image @ text.T * self.network.get_parameter("logit_scale").exp()
        # sigmoid models (SigLIP)
        bias = getattr(self.network, "logit_bias", None)
        if bias is not None:
            logits = logits + bias
        return {"image_embeds": image, "text_embeds": text, "logits_per_image": logits, "logits_per_text": logits.T}


class Processor:
    """Images and texts to the inputs of `HuggingFaceStyle`, on the device of its weights."""

    def __init__(self, model: Model) -> None:
        self._encoder = model.encoder

    def __call__(self, text: str | Iterable[str] | None = None, images: Images | None = None) -> dict[str, Tensor]:
        """`input_ids` [T, L] of texts and `pixel_values` [B, 3, S, S] of images, as far as they are given.

        Raises:
            UsageError: neither is given, or an image cannot be used.
        """
        inputs: dict[str, Tensor] = {}
        if text is not None:
            tokens = self._encoder.tokenizer.encode([text] if isinstance(text, str) else list(text))
            if self._encoder.trims_padding:
                tokens = trim_tokens(tokens, self._encoder.tokenizer)
            inputs["input_ids"] = torch.from_numpy(tokens).to(self._encoder.device)
        if images is not None:
            named = name_images(images)
            view = self._encoder.view
            batches = read_batches(named, view, batch_size=max(len(named), 1), on_error="raise")
            # the first is empty, so that an empty list of images gives a batch of none
            parts = [torch.zeros(0, 3, view.size, view.size, dtype=torch.uint8)]
            parts += [torch.from_numpy(batch.pixels) for batch in batches]
            inputs["pixel_values"] = normalise(torch.cat(parts).to(self._encoder.device), view)
        if not inputs:
            raise UsageError("Give text, images, or both.")
        return inputs
