"""What trunks give (maps in NCHW or NHWC, or tokens; one or several), read as tokens, and pooled to one vector."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import torch
from torch import nn

from vlm.errors import UsageError
from vlm.tensor_types import Float, Tensor

Features = Tensor | list[Tensor] | tuple[Tensor, ...]
"""What a trunk gives: one map or token sequence, or several (CrossViT)."""


@dataclass(frozen=True, kw_only=True)
class MapLayout:
    """The memory layout of one map: its width C, prefix tokens before its patches, and number of patches."""

    kind: Literal["NCHW", "NHWC", "tokens"]
    width: int
    prefix: int
    patches: int

    def __str__(self) -> str:
        """As the table of towers shows it."""
        if self.kind == "tokens":
            return f"{self.kind} {self.prefix}+{self.patches}×{self.width}"
        return f"{self.kind} {isqrt(self.patches)}²×{self.width}"


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """Prefix tokens (class token, registers) and patches of one map, of width C."""

    prefix: Float[Tensor, "B T C"]
    patches: Float[Tensor, "B P C"]


@dataclass(frozen=True, kw_only=True)
class TrunkInfo:
    """What a trial pass through a trunk has shown.

    layouts: of its maps. native_width: of the vector its own pooling gives. unused, unused_native: parameters that have
    no part in the maps, or in that vector.
    """

    layouts: tuple[MapLayout, ...]
    native_width: int
    unused: frozenset[str]
    unused_native: frozenset[str]


def read_layout(output: Tensor, trunk: nn.Module) -> MapLayout:
    """The layout of a map [1, …], by its shape and the trunk's attributes."""
    if output.ndim == 3:
        prefix = _prefix_tokens(trunk, output.shape[1])
        return MapLayout(kind="tokens", width=output.shape[2], prefix=prefix, patches=output.shape[1] - prefix)
    width = getattr(trunk, "num_features", getattr(getattr(trunk, "config", None), "hidden_size", None))
    # a map as high as it has channels could be either; then the trunk's own word counts
    declares_nhwc = str(getattr(trunk, "output_fmt", "")).endswith("NHWC")
    is_nhwc = output.shape[3] == width and (declares_nhwc or output.shape[1] != width)
    if is_nhwc:
        return MapLayout(kind="NHWC", width=output.shape[3], prefix=0, patches=output.shape[1] * output.shape[2])
    return MapLayout(kind="NCHW", width=output.shape[1], prefix=0, patches=output.shape[2] * output.shape[3])


def _prefix_tokens(trunk: nn.Module, number: int) -> int:
    declared = getattr(trunk, "num_prefix_tokens", None)
    if isinstance(declared, int):
        return declared
    class_token = getattr(trunk, "cls_token", None)
    if isinstance(class_token, torch.Tensor) and class_token.ndim == 3 and class_token.shape[1] == number:
        return number  # PiT gives its class token alone
    return number - isqrt(number) ** 2  # VOLO, CrossViT and PVT have a class token and do not declare it


def as_tokens(features: Features, layouts: Sequence[MapLayout]) -> list[TokenMap]:
    """The maps as prefix tokens and patches, row by row."""
    maps = [features] if isinstance(features, torch.Tensor) else list(features)
    return [_tokens_of(output, layout) for output, layout in zip(maps, layouts, strict=True)]


def _tokens_of(output: Tensor, layout: MapLayout) -> TokenMap:
    if layout.kind == "NCHW":
        output = output.flatten(2).transpose(1, 2)
    elif layout.kind == "NHWC":
        output = output.flatten(1, 2)
    return TokenMap(prefix=output[:, : layout.prefix], patches=output[:, layout.prefix :])


def as_features(patches: Float[Tensor, "N C"], layout: MapLayout) -> Tensor:
    """Maps of one patch each, as a trunk of that layout would give them; prefix tokens are the patch too."""
    if layout.kind == "tokens":
        return patches[:, None].expand(-1, layout.prefix + 1, -1)
    return patches[:, None, None] if layout.kind == "NHWC" else patches[:, :, None, None]


def probe_trunk(
    build: Callable[[], nn.Module],
    features: Callable[[Any, Tensor], Features],
    native: Callable[[Any, Tensor], Tensor],
    *,
    name: str,
    image_size: int,
    own_size: int,
) -> TrunkInfo:
    """What a trunk gives for images of a size, found on a copy without memory (torch's meta device).

    Raises:
        UsageError: the trunk does not run at that size.
    """
    # a trial pass costs no memory or time there, whatever the trunk's size
    with torch.device("meta"):
        meta_trunk = build().eval()
    pixels = torch.zeros(1, 3, image_size, image_size, device="meta")
    try:
        # autograd shows which parameters have a part in the output
        with torch.enable_grad():
            maps = features(meta_trunk, pixels)
            maps = [maps] if isinstance(maps, torch.Tensor) else list(maps)
            layouts = tuple(read_layout(output, meta_trunk) for output in maps)
            unused = _unused_parameters(meta_trunk, maps)
            pooled = native(meta_trunk, pixels)
            unused_native = _unused_parameters(meta_trunk, [pooled])
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise UsageError(
            f"{name} does not run at {image_size} pixels ({error}); its own size is --image-size {own_size}."
        ) from error
    return TrunkInfo(layouts=layouts, native_width=pooled.shape[-1], unused=unused, unused_native=unused_native)


def _unused_parameters(meta_trunk: nn.Module, outputs: Sequence[Tensor]) -> frozenset[str]:
    meta_trunk.zero_grad(set_to_none=True)
    # LeViT and TinyViT keep their attention biases, and so their graph, from one pass to the next while evaluating
    torch.stack([output.sum() for output in outputs]).sum().backward(retain_graph=True)
    return frozenset(name for name, parameter in meta_trunk.named_parameters() if parameter.grad is None)


_ROWS = 4
_BLOCKS = 2
_HEAD_WIDTH = 64


class Pooling(nn.Module, ABC):
    """From a map to one vector of `width`."""

    width: int

    @abstractmethod
    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """One vector per image."""


class AveragePool(Pooling):
    """The mean of the patches; prefix tokens are left out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The mean."""
        return tokens.patches.mean(dim=1)


class ClassToken(Pooling):
    """The first prefix token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The class token."""
        return tokens.prefix[:, 0]


class SimPool(Pooling):
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


class LatentQueryPool(Pooling):
    """Attention of one learned query, then a feed-forward layer (Zhai et al. 2022 §3, SigLIP's MAP head)."""

    def __init__(self, width: int) -> None:
        from timm.layers.attention_pool import AttentionPoolLatent

        super().__init__()
        self.width = width
        self.attention = AttentionPoolLatent(width, num_heads=num_heads_for(width), norm_layer=nn.LayerNorm)

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The latent after attention."""
        return self.attention(tokens.patches)


class QueryBlock(nn.Module):
    """A block of BoQ: patches are encoded, queries see each other, then the patches (Ali-bey et al. 2024, §3.2)."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        heads = num_heads_for(width)
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
        # a residual connection, then the norm
        queries = self.norm_queries(queries + self.among(queries, queries, queries, need_weights=False)[0])
        return patches, self.norm_out(self.across(queries, patches, patches, need_weights=False)[0])


class BagOfQueries(Pooling):
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
        patches = tokens.patches
        outputs: list[Tensor] = []
        for block in self.blocks:
            patches, queries = block(patches)
            outputs.append(queries)
        # the linear layer mixes queries, so they must be the last dimension
        by_channel = torch.cat(outputs, dim=1).transpose(1, 2)
        return self.rows(by_channel).transpose(1, 2).flatten(1)


POOLINGS: dict[str, Callable[[int, int], Pooling]] = {
    "avg": lambda width, _: AveragePool(width),
    "token": lambda width, _: ClassToken(width),
    "simpool": lambda width, _: SimPool(width),
    "queries": BagOfQueries,
    "map": lambda width, _: LatentQueryPool(width),
}
"""Poolings in addition to the trunk's own, by name: (width, queries) → module."""


def num_heads_for(width: int) -> int:
    """Attention heads for a width: the most heads at least 64 wide that divide it."""
    return next(heads for heads in range(max(1, width // _HEAD_WIDTH), 0, -1) if width % heads == 0)


def build_pooling(pooling: str, layout: MapLayout, *, queries: int, has_class_token: bool, name: str) -> Pooling:
    """The pool for a map.

    Raises:
        UsageError: the map lacks what the pooling reads.
    """
    if pooling == "token" and not (layout.prefix and has_class_token):
        raise UsageError(f"{name} has no class token to pool by; give pooling=avg, native or simpool.")
    if pooling != "token" and not layout.patches:
        raise UsageError(f"{name} gives its class token alone, so pooling={pooling} cannot work; give native or token.")
    return POOLINGS[pooling](layout.width, queries)
