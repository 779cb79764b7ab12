"""What trunks give (maps in NCHW or NHWC, or tokens; one or several), read as tokens, and pooled to one vector."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import torch
from torch import nn

from vlm.errors import UsageError
from vlm.models.towers.tower_config import ImageTowerConfig
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
    # autograd shows which parameters have a part in the output, also where the caller has switched it off
    with torch.inference_mode(False), torch.enable_grad():
        # a trial pass costs no memory or time there, whatever the trunk's size
        with torch.device("meta"):
            meta_trunk = build().eval()
        pixels = torch.zeros(1, 3, image_size, image_size, device="meta")
        try:
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


_BLOCKS = 2
# of SimPool's authors, and timm's: keeps what is raised to a power above 0
_LEAST_VALUE = 1e-6
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
    """SimPool (Psomas et al. 2023, §3.3, equations 10–13): one attention head whose query is the mean patch.

    With values v (patches after a layer norm), weights a = softmax(q·k/√C) and m the least value of the image,
    z = (Σ a (v - m + ε)^γ)^(1/γ) + m - ε. γ = 1 is the plain mean; the authors take 1.25 for transformers and 2 for
    convolutional trunks. Their code has the least value of the whole batch for m and does not put it back: here it is
    the image's, so that an embedding does not depend on its batch, and is put back, so that a single patch stays what
    it is. The weights are timm's module's, whose own γ takes the least value of each channel, and leaves it out.
    """

    def __init__(self, width: int, gamma: float) -> None:
        from timm.layers.other_pool import SimPool1d

        super().__init__()
        self.width = width
        self.gamma = gamma
        self.attention = SimPool1d(width)

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The attended values."""
        if self.gamma == 1:
            return self.attention(tokens.patches)
        attention = self.attention
        values = attention.norm(tokens.patches)
        query = attention.q(tokens.patches.mean(dim=1, keepdim=True))
        keys = attention.k(values)
        least = values.amin(dim=(1, 2), keepdim=True) - _LEAST_VALUE
        raised = nn.functional.scaled_dot_product_attention(query, keys, (values - least).pow(self.gamma))
        return (raised.pow(1 / self.gamma) + least)[:, 0]


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

    def forward(
        self, patches: Float[Tensor, "B P C"], *, with_maps: bool = False
    ) -> tuple[Float[Tensor, "B P C"], Float[Tensor, "B Q C"], Float[Tensor, "B Q P"] | None]:
        """The encoded patches, for the next block, what each query found, and on request the patches it looked at."""
        patches = self.encoder(patches)
        queries = self.queries.expand(len(patches), -1, -1)
        # a residual connection, then the norm
        queries = self.norm_queries(queries + self.among(queries, queries, queries, need_weights=False)[0])
        found, maps = self.across(queries, patches, patches, need_weights=with_maps)
        return patches, self.norm_out(found), maps


class BagOfQueries(Pooling):
    """BoQ (Ali-bey et al. 2024, §3): learned queries of several blocks; a linear layer over the queries makes few rows.

    Two blocks as in the paper. The authors' own sizes are queries=64, rows=32, pool_width=512 (16,384 outputs); fewer
    rows are the default here, since the projection to the joint space follows, which they do not have. pool_width: of
    a 3×3 convolution and a layer norm before the blocks; 0 has neither.
    """

    def __init__(self, width: int, queries: int, rows: int, pool_width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, pool_width, 3, padding=1) if pool_width else None
        self.norm_input = nn.LayerNorm(pool_width) if pool_width else None
        width = pool_width or width
        self.width = rows * width
        self.blocks = nn.ModuleList(QueryBlock(width, queries) for _ in range(_BLOCKS))
        self.rows = nn.Linear(_BLOCKS * queries, rows)

    def forward(self, tokens: TokenMap) -> Float[Tensor, "B F"]:
        """The rows, one after the other."""
        patches = self._reduce(tokens.patches)
        outputs: list[Tensor] = []
        for block in self.blocks:
            patches, queries, _ = block(patches)
            outputs.append(queries)
        # the linear layer mixes queries, so they must be the last dimension
        by_channel = torch.cat(outputs, dim=1).transpose(1, 2)
        return self.rows(by_channel).transpose(1, 2).flatten(1)

    def query_maps(self, tokens: TokenMap) -> Float[Tensor, "B N P"]:
        """How much each query of each block, one after the other, attends to each patch; rows sum to 1 (§4.6)."""
        patches = self._reduce(tokens.patches)
        all_maps: list[Tensor] = []
        for block in self.blocks:
            patches, _, maps = block(patches, with_maps=True)
            all_maps.append(maps)
        return torch.cat(all_maps, dim=1)

    def _reduce(self, patches: Float[Tensor, "B P C"]) -> Float[Tensor, "B P W"]:
        if self.reduce is None or self.norm_input is None:
            return patches
        side = isqrt(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        return self.norm_input(self.reduce(grid).flatten(2).transpose(1, 2))


POOLINGS: dict[str, Callable[[int, ImageTowerConfig], Pooling]] = {
    "avg": lambda width, _: AveragePool(width),
    "token": lambda width, _: ClassToken(width),
    "simpool": lambda width, config: SimPool(width, config.gamma),
    "queries": lambda width, config: BagOfQueries(width, config.queries, config.rows, config.pool_width),
    "map": lambda width, _: LatentQueryPool(width),
}
"""Poolings in addition to the trunk's own, by name: from the width of the patches and the tower's settings."""


def num_heads_for(width: int) -> int:
    """Attention heads for a width: the most heads at least 64 wide that divide it."""
    return next(heads for heads in range(max(1, width // _HEAD_WIDTH), 0, -1) if width % heads == 0)


def build_pooling(config: ImageTowerConfig, layout: MapLayout, *, has_class_token: bool) -> Pooling:
    """The pool for a map.

    Raises:
        UsageError: the map lacks what the pooling reads, or a setting is out of range.
    """
    name = config.tower
    pooling = config.pooling
    if pooling == "token" and not (layout.prefix and has_class_token):
        raise UsageError(f"{name} has no class token to pool by; give pooling=avg, native or simpool.")
    if pooling != "token" and not layout.patches:
        raise UsageError(f"{name} gives its class token alone, so pooling={pooling} cannot work; give native or token.")
    if config.gamma <= 0 or config.rows < 1 or config.pool_width < 0:
        raise UsageError(
            f"gamma = {config.gamma:g}, rows = {config.rows}, pool_width = {config.pool_width}: give a gamma above 0, "
            "at least one row, and a width of at least 0."
        )
    if config.pool_width and isqrt(layout.patches) ** 2 != layout.patches:
        raise UsageError(f"{name} gives {layout.patches} patches, no square for a convolution; leave out pool_width.")
    return POOLINGS[pooling](layout.width, config)


AUTHORS_GAMMA = {"transformer": 1.25, "convolutional": 2.0}
"""SimPool's γ in its authors' training recipes."""


def authors_gamma(layouts: Sequence[MapLayout]) -> float:
    """γ for a trunk: convolutional ones give maps in NCHW, transformers tokens or NHWC."""
    return AUTHORS_GAMMA["convolutional" if layouts[0].kind == "NCHW" else "transformer"]
