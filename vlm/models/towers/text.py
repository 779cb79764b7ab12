"""Text towers: token rows to vectors of the joint space."""

from abc import ABC, abstractmethod

from torch import nn

from vlm.models.towers.image import group_by_layer
from vlm.tensors import Bool, Float, Int64, Tensor


class TextTower(nn.Module, ABC):
    """Token rows to vectors of the joint space.

    takes_embeddings: whether it reads embeddings made beforehand, by `project`.
    """

    takes_embeddings = False

    @abstractmethod
    def forward(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Vectors of the joint space, not normalised."""

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        """What pretraining may have given; locking keeps it. Here everything."""
        return dict(self.named_parameters())

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Keep the trunk as it is, but for its last layers."""
        parameters = self.trunk_parameters()
        groups = group_by_layer(parameters)
        for group in groups[: max(0, len(groups) - unlocked_layers)]:
            for name in group:
                is_norm = "norm" in name.lower() or "ln_" in name
                parameters[name].requires_grad_(is_norm and not freeze_layer_norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass; nothing to do where there are hardly any."""


def real_tokens(tokens: Int64[Tensor, "B L"], pad_id: int) -> Bool[Tensor, "B L"]:
    """Which places hold text: from the first to the last that is not padding.

    CLIP's padding is also its piece "!", so padding between other tokens is text.
    """
    there = (tokens != pad_id).long()
    return (there.cumsum(dim=1) > 0) & (there.flip(1).cumsum(dim=1).flip(1) > 0)


def pool_states(states: Float[Tensor, "B L C"], mask: Bool[Tensor, "B L"], pooling: str) -> Float[Tensor, "B C"]:
    """The mean of the states of text, the last of them, or the first (cls)."""
    if pooling == "mean":
        weights = mask.to(states.dtype)[:, :, None]
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    places = mask.long()
    first = places.argmax(dim=1)
    index = first if pooling == "cls" else first + (places.sum(dim=1) - 1).clamp(min=0)
    return states.gather(1, index[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]


def projection(width: int, hidden: int, embed_dim: int, dropout: float = 0.0) -> nn.Sequential:
    """A linear layer to the joint space, or two with GELU between them where `hidden` is a width."""
    if not hidden:
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, embed_dim, bias=False))
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, embed_dim, bias=False)
    )
