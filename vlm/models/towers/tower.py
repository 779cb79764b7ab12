"""Batch normalisation: where it is, and how to hold its statistics still.

An image tower: a trunk, its patches pooled, and a projection to the joint space.

Text towers: token rows to vectors of the joint space.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.errors import UsageError
from vlm.models.towers.pooling import Features, Pooling, TokenMap, TrunkInfo, as_features, as_tokens, build_pooling
from vlm.models.towers.tower_config import ImageTowerConfig
from vlm.tensors import Bool, Float, Int64, Tensor


def batch_norm_layers(network: nn.Module) -> list[str]:
    """Names of the layers that use statistics of the batch while training, as batch normalisation does.

    With them a batch in parts differs from the whole one. Frozen ones are not among them.
    """
    return [
        name for name, module in network.named_modules() if _uses_batch_statistics(module) and not _is_frozen(module)
    ]


def freeze_batch_norm(network: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Make these layers (all of them when none are named) normalise by their running statistics for good.

    Gains and biases are trained as before. In a fresh network the statistics are mean 0 and variance 1, so its layers
    become plain gains; this is meant for trained towers. Returns the names of the layers that were frozen.
    """
    chosen = [name for name in batch_norm_layers(network) if names is None or name in names]
    for name in chosen:
        module = network.get_submodule(name)
        module.eval()
        module.register_forward_pre_hook(keep_in_eval_mode)
    return chosen


def keep_in_eval_mode(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook: whatever mode the network is in, this layer normalises by its running statistics."""
    module.training = False


def _uses_batch_statistics(module: nn.Module) -> bool:
    # timm's evolved normalisation (EvoNorm B) keeps running statistics without being a batch norm
    return isinstance(module, _BatchNorm) or isinstance(getattr(module, "running_var", None), Tensor)


def _is_frozen(module: nn.Module) -> bool:
    return keep_in_eval_mode in module._forward_pre_hooks.values()


class ImageTower(nn.Module, ABC):
    """Images to vectors of the joint space, through any trunk; subclasses say how a trunk is asked.

    The names of its parts are those of open_clip's TimmModel (trunk, head.proj), so that it can be saved as one.

    image_size: the size it is built for. measured: layouts and widths. width: of the pooled vector.
    """

    def __init__(
        self,
        trunk: nn.Module,
        config: ImageTowerConfig,
        trunk_info: TrunkInfo,
        embed_dim: int,
        *,
        has_class_token: bool,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.trunk_info = trunk_info
        self.image_size = (config.image_size, config.image_size)
        self.is_native = config.pooling == "native"
        pools: list[Pooling] = []
        if not self.is_native:
            pools = [
                build_pooling(
                    config.pooling,
                    layout,
                    queries=config.queries,
                    has_class_token=has_class_token,
                    name=config.tower,
                )
                for layout in trunk_info.layouts
            ]
        self.pools = nn.ModuleList(pools)
        self.width = sum(pool.width for pool in pools) or trunk_info.native_width
        # the trunk's last norm often stands in the head that is left out
        self.norm = nn.LayerNorm(self.width) if pools else nn.Identity()
        drop, projection = nn.Dropout(config.dropout), nn.Linear(self.width, embed_dim, bias=False)
        self.head = nn.Sequential(OrderedDict(drop=drop, proj=projection))
        for name in trunk_info.unused_native if self.is_native else trunk_info.unused:
            trunk.get_parameter(name).requires_grad_(False)  # they have no gradient, which DDP would wait for

    @abstractmethod
    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Features:
        """The trunk's maps, as it gives them."""

    @abstractmethod
    def native(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """One vector an image, by the trunk's own pooling."""

    @abstractmethod
    def native_of(self, features: Features) -> Float[Tensor, "B F"]:
        """The same of the trunk's maps."""

    def parameter_groups(self) -> list[list[str]]:
        """Names of the trunk's parameters, a group a layer, from the first to the last."""
        return group_by_layer(dict(self.trunk.named_parameters()))

    def tokens(self, pixels: Float[Tensor, "B 3 H W"]) -> list[TokenMap]:
        """Prefix tokens and patches of each map (most trunks give one), of the trunk's width."""
        return as_tokens(self.features(pixels), self.trunk_info.layouts)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Vectors of the joint space, not normalised."""
        if self.is_native:
            return self.head(self.native(pixels))
        return self.head(self._pool(self.tokens(pixels)))

    def forward_with_patches(
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B P D"]]:
        """Vectors of the images and of their patches, not normalised.

        The vector of a patch is what pooling and projection make of an image all of whose places are that patch.

        Raises:
            UsageError: the tower has no single map with patches.
        """
        layouts = self.trunk_info.layouts
        if len(layouts) != 1 or not layouts[0].patches:
            raise UsageError(
                f"{type(self.trunk).__name__} gives {', '.join(map(str, layouts))} and so no one set of patches; "
                "choose another image tower."
            )
        features = self.features(pixels)
        patches = as_tokens(features, layouts)[0].patches
        alone = as_features(patches.flatten(0, 1), layouts[0])
        return self.head(self.pool_features(features)), self.head(self.pool_features(alone)).unflatten(
            0, patches.shape[:2]
        )

    def pool_features(self, features: Features) -> Float[Tensor, "B F"]:
        """One vector an image, from the trunk's maps."""
        if self.is_native:
            return self.native_of(features)
        return self._pool(as_tokens(features, self.trunk_info.layouts))

    def _pool(self, maps: list[TokenMap]) -> Float[Tensor, "B F"]:
        return self.norm(torch.cat([pool(tokens) for pool, tokens in zip(self.pools, maps, strict=True)], dim=-1))

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Keep the trunk as it is, but for its last groups of layers (LiT, Zhai et al. 2022).

        Pools of ours and the projection are trained all the same, since no pretraining gave them.
        """
        groups = self.parameter_groups()
        locked = {name for group in groups[: max(0, len(groups) - unlocked_groups)] for name in group}
        for name in locked:
            self.trunk.get_parameter(name).requires_grad_(False)
        if freeze_bn_stats:
            frozen = [name for name in batch_norm_layers(self.trunk) if _is_fully_locked(self.trunk, name, locked)]
            freeze_batch_norm(self.trunk, frozen)

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the trunk's activations again in the backward pass."""


def group_by_layer(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names grouped up to their first number: `encoder.layer.0.…` is a group, `embeddings.…` is one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in parameters:
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
        groups.setdefault(tuple(parts[: number + 1]), []).append(name)
    return list(groups.values())


def _is_fully_locked(trunk: nn.Module, name: str, locked: set[str]) -> bool:
    own = [f"{name}.{each}" for each, _ in trunk.get_submodule(name).named_parameters()]
    return all(each in locked for each in own)


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


def text_mask(tokens: Int64[Tensor, "B L"], pad_id: int) -> Bool[Tensor, "B L"]:
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
