"""What trunks give: maps in NCHW or NHWC, or tokens with prefix tokens, one or several; read as tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import torch
from torch import nn

from vlm.errors import UsageError
from vlm.tensors import Float, Tensor

Features = Tensor | list[Tensor] | tuple[Tensor, ...]
"""What a trunk gives: one map or token sequence, or several (CrossViT)."""


@dataclass(frozen=True, kw_only=True)
class MapLayout:
    """How one map lies in memory: its width C, prefix tokens before its patches, and number of patches."""

    kind: Literal["NCHW", "NHWC", "tokens"]
    width: int
    prefix: int
    patches: int

    def __str__(self) -> str:
        """As the table of towers says it."""
        return (
            f"{self.kind} {self.prefix}+{self.patches}×{self.width}"
            if self.kind == "tokens"
            else (f"{self.kind} {isqrt(self.patches)}²×{self.width}")
        )


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """Prefix tokens (class token, registers) and patches of one map, of width C."""

    prefix: Float[Tensor, "B T C"]
    patches: Float[Tensor, "B P C"]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a trial pass through a trunk told.

    layouts: of its maps. native_width: of the vector its own pooling gives. idle, idle_native: parameters that have no
    part in the maps, or in that vector.
    """

    layouts: tuple[MapLayout, ...]
    native_width: int
    idle: frozenset[str]
    idle_native: frozenset[str]


def read_layout(output: Tensor, trunk: nn.Module) -> MapLayout:
    """The layout of a map [1, …], by its shape and what the trunk says of itself."""
    if output.ndim == 3:
        prefix = _prefix_tokens(trunk, output.shape[1])
        return MapLayout(kind="tokens", width=output.shape[2], prefix=prefix, patches=output.shape[1] - prefix)
    width = getattr(trunk, "num_features", getattr(getattr(trunk, "config", None), "hidden_size", None))
    says_last = str(getattr(trunk, "output_fmt", "")).endswith("NHWC")
    is_last = output.shape[3] == width and (says_last or output.shape[1] != width)
    height_axis, width_axis = (1, 3) if is_last else (2, 1)
    patches = output.shape[height_axis] * output.shape[height_axis + 1]
    return MapLayout(kind="NHWC" if is_last else "NCHW", width=output.shape[width_axis], prefix=0, patches=patches)


def _prefix_tokens(trunk: nn.Module, number: int) -> int:
    said = getattr(trunk, "num_prefix_tokens", None)
    if isinstance(said, int):
        return said
    class_token = getattr(trunk, "cls_token", None)
    if isinstance(class_token, Tensor) and class_token.ndim == 3 and class_token.shape[1] == number:
        return number  # PiT gives its class token alone
    return number - isqrt(number) ** 2  # VOLO, CrossViT and PVT have a class token and say nothing of it


def as_tokens(features: Features, layouts: Sequence[MapLayout]) -> list[TokenMap]:
    """The maps as prefix tokens and patches, row by row."""
    maps = [features] if isinstance(features, Tensor) else list(features)
    return [_tokens_of(each, layout) for each, layout in zip(maps, layouts, strict=True)]


def _tokens_of(output: Tensor, layout: MapLayout) -> TokenMap:
    if layout.kind == "NCHW":
        output = output.flatten(2).transpose(1, 2)
    elif layout.kind == "NHWC":
        output = output.flatten(1, 2)
    return TokenMap(prefix=output[:, : layout.prefix], patches=output[:, layout.prefix :])


def as_features(places: Float[Tensor, "N C"], layout: MapLayout) -> Tensor:
    """Maps of one patch each, as a trunk of that layout would give them; prefix tokens are the patch too."""
    if layout.kind == "tokens":
        return places[:, None].expand(-1, layout.prefix + 1, -1)
    return places[:, None, None] if layout.kind == "NHWC" else places[:, :, None, None]


def measure(
    build: Callable[[], nn.Module],
    features: Callable[[Any, Tensor], Features],
    native: Callable[[Any, Tensor], Tensor],
    *,
    name: str,
    image_size: int,
    own_size: int,
) -> Measured:
    """What a trunk gives for pictures of a size, found on a twin without memory (torch's meta device).

    Raises:
        UsageError: the trunk does not run at that size.
    """
    with torch.device("meta"):
        twin = build().eval()
    pixels = torch.zeros(1, 3, image_size, image_size, device="meta")
    try:
        with torch.enable_grad():
            maps = features(twin, pixels)
            maps = [maps] if isinstance(maps, Tensor) else list(maps)
            layouts = tuple(read_layout(each, twin) for each in maps)
            idle = _idle(twin, maps)
            pooled = native(twin, pixels)
            idle_native = _idle(twin, [pooled])
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise UsageError(
            f"{name} does not run at {image_size} pixels ({error}); its own size is --image-size {own_size}."
        ) from error
    return Measured(layouts=layouts, native_width=pooled.shape[-1], idle=idle, idle_native=idle_native)


def _idle(twin: nn.Module, outputs: Sequence[Tensor]) -> frozenset[str]:
    twin.zero_grad(set_to_none=True)
    # LeViT and TinyViT keep their attention biases, and so their graph, from one pass to the next while evaluating
    torch.stack([output.sum() for output in outputs]).sum().backward(retain_graph=True)
    return frozenset(name for name, parameter in twin.named_parameters() if parameter.grad is None)
