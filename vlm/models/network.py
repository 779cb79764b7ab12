"""What the networks of models can do, for type checkers: open_clip's CLIP, CustomTextCLIP and CoCa, and `TowerNetwork`.

These are protocols in spirit, but nobody can say "a `nn.Module` that also has `encode_image`" with `Protocol`, which
must not inherit from a class. So type checkers see subclasses of `nn.Module`; at run time any module will do.
"""

from typing import TYPE_CHECKING

from torch import nn

from vlm.tensor_types import Float, Int64, Tensor

if TYPE_CHECKING:

    class Network(nn.Module):
        """A dual encoder: an image tower `visual` and a text tower with a learned temperature."""

        visual: nn.Module

        def encode_image(self, image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
            """Embeddings of images, not normalised."""
            ...

        def encode_text(self, text: Int64[Tensor, "B L"]) -> Float[Tensor, "B D"]:
            """Embeddings of rows of tokens, not normalised."""
            ...

        def set_grad_checkpointing(self, enable: bool = True) -> None:
            """Compute activations again in the backward pass instead of keeping them."""
            ...

    class Captioner(Network):
        """A dual encoder with a caption decoder, as open_clip's CoCa."""

        text: nn.Module
        text_decoder: nn.Module

        def _encode_image(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, Tensor]:
            """Embeddings of images, and the tokens the decoder attends to."""
            ...

        def _encode_text(self, text: Int64[Tensor, "B L"]) -> tuple[Tensor, Tensor]:
            """Embeddings of texts, and the states the decoder continues from."""
            ...

else:
    Network = Captioner = nn.Module
