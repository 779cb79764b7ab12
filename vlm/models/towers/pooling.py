"""From the patches of a map to one vector."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from vlm.errors import UsageError
from vlm.models.towers.features import MapLayout, TokenMap
from vlm.tensors import Float, Tensor

_ROWS = 4
_BLOCKS = 2
_HEAD_WIDTH = 64


class Pool(nn.Module, ABC):
    """A way from a map to one vector of `width`."""

    width: int

    @abstractmethod
    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """One vector a picture."""


class AveragePool(Pool):
    """The mean of the patches; prefix tokens are left out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The mean."""
        return tokens.patches.mean(dim=1)


class ClassToken(Pool):
    """The first prefix token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The class token."""
        return tokens.prefix[:, 0]


class SimPool(Pool):
    """SimPool (Psomas et al. 2023, §3.3): one attention head whose query is the mean patch.

    timm's module; its gamma, the exponent of the mean over values, is left at 1, as the paper does for ViTs.
    """

    def __init__(self, width: int) -> None:
        from timm.layers.other_pool import SimPool1d

        super().__init__()
        self.width = width
        self.attention = SimPool1d(width)

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The attended values."""
        return self.attention(tokens.patches)


class LatentPool(Pool):
    """Attention of one learned query, then a feed-forward layer (Zhai et al. 2022 §3, SigLIP's MAP head)."""

    def __init__(self, width: int) -> None:
        from timm.layers.attention_pool import AttentionPoolLatent

        super().__init__()
        self.width = width
        self.attention = AttentionPoolLatent(width, num_heads=heads_of(width), norm_layer=nn.LayerNorm)

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The latent after attention."""
        return self.attention(tokens.patches)


class QueryBlock(nn.Module):
    """A block of BoQ: patches are encoded, queries see each other, then the patches (Ali-bey et al. 2024, §3.2)."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        heads = heads_of(width)
        self.encoder = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, queries, width))
        self.among = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_queries = nn.LayerNorm(width)
        self.across = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, patches: Float[Tensor, "B P C"]) -> tuple[Float[Tensor, "B P C"], Float[Tensor, "B Q C"]]:
        """The encoded patches, for the next block, and what each query found."""
        patches = self.encoder(patches)
        queries = self.queries.expand(len(patches), -1, -1)
        queries = self.norm_queries(queries + self.among(queries, queries, queries, need_weights=False)[0])
        return patches, self.norm_out(self.across(queries, patches, patches, need_weights=False)[0])


class BagOfQueries(Pool):
    """BoQ (Ali-bey et al. 2024): learned queries of several blocks; a linear layer over the queries makes few rows.

    Two blocks as in the paper; its 64 queries and 16,384 outputs are fewer here, since the projection to the joint
    space follows.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.width = _ROWS * width
        self.blocks = nn.ModuleList(QueryBlock(width, queries) for _ in range(_BLOCKS))
        self.rows = nn.Linear(_BLOCKS * queries, _ROWS)

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The rows, one after the other."""
        patches, found = tokens.patches, []
        for block in self.blocks:
            patches, outputs = block(patches)
            found.append(outputs)
        return self.rows(torch.cat(found, dim=1).transpose(1, 2)).transpose(1, 2).flatten(1)


POOLS: dict[str, Callable[[int, int], Pool]] = {
    "avg": lambda width, _: AveragePool(width),
    "token": lambda width, _: ClassToken(width),
    "simpool": lambda width, _: SimPool(width),
    "queries": BagOfQueries,
    "map": lambda width, _: LatentPool(width),
}
"""Poolings besides the trunk's own, by name: (width, queries) → module."""


def heads_of(width: int) -> int:
    """Attention heads for a width: as near to 64 wide as divides it."""
    return next(heads for heads in range(max(1, width // _HEAD_WIDTH), 0, -1) if width % heads == 0)


def make_pool(pooling: str, layout: MapLayout, *, queries: int, has_class_token: bool, name: str) -> Pool:
    """The pool for a map.

    Raises:
        UsageError: the map has not what the pooling reads.
    """
    if pooling == "token" and not (layout.prefix and has_class_token):
        raise UsageError(f"{name} has no class token to pool by; give pooling=avg, native or simpool.")
    if pooling != "token" and not layout.patches:
        raise UsageError(f"{name} gives its class token alone, so pooling={pooling} cannot work; give native or token.")
    return POOLS[pooling](layout.width, queries)
