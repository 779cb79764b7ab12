"""An image tower: a trunk, its patches pooled, and a projection to the joint space."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from vlm.errors import UsageError
from vlm.models.towers.batch_norm import batch_norm_layers, freeze_batch_norm
from vlm.models.towers.config import ImageTowerConfig
from vlm.models.towers.features import Features, Measured, TokenMap, as_features, as_tokens
from vlm.models.towers.pooling import Pool, make_pool
from vlm.tensors import Float, Tensor


class ImageTower(nn.Module, ABC):
    """Pictures to vectors of the joint space, through any trunk; subclasses say how a trunk is asked.

    The names of its parts are those of open_clip's TimmModel (trunk, head.proj), so that it can be saved as one.

    image_size: the size it is built for. measured: layouts and widths. width: of the pooled vector.
    """

    def __init__(
        self, trunk: nn.Module, config: ImageTowerConfig, measured: Measured, embed_dim: int, *, has_class_token: bool
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.measured = measured
        self.image_size = (config.image_size, config.image_size)
        self.is_native = config.pooling == "native"
        pools: list[Pool] = []
        if not self.is_native:
            pools = [
                make_pool(
                    config.pooling,
                    layout,
                    queries=config.queries,
                    has_class_token=has_class_token,
                    name=config.tower,
                )
                for layout in measured.layouts
            ]
        self.pools = nn.ModuleList(pools)
        self.width = sum(pool.width for pool in pools) or measured.native_width
        # the trunk's last norm often stands in the head that is left out
        self.norm = nn.LayerNorm(self.width) if pools else nn.Identity()
        drop, projection = nn.Dropout(config.dropout), nn.Linear(self.width, embed_dim, bias=False)
        self.head = nn.Sequential(OrderedDict(drop=drop, proj=projection))
        for name in measured.idle_native if self.is_native else measured.idle:
            trunk.get_parameter(name).requires_grad_(False)  # they have no gradient, which DDP would wait for

    @abstractmethod
    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Features:
        """The trunk's maps, as it gives them."""

    @abstractmethod
    def native(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """One vector a picture, by the trunk's own pooling."""

    @abstractmethod
    def native_of(self, features: Features) -> Float[Tensor, "B F"]:
        """The same of the trunk's maps."""

    def parameter_groups(self) -> list[list[str]]:
        """Names of the trunk's parameters, a group a layer, from the first to the last."""
        return group_by_layer(dict(self.trunk.named_parameters()))

    def tokens(self, pixels: Float[Tensor, "B 3 H W"]) -> list[TokenMap]:
        """Prefix tokens and patches of each map (most trunks give one), of the trunk's width."""
        return as_tokens(self.features(pixels), self.measured.layouts)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Vectors of the joint space, not normalised."""
        if self.is_native:
            return self.head(self.native(pixels))
        return self.head(self._pool(self.tokens(pixels)))

    def forward_with_patches(
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B P D"]]:
        """Vectors of the pictures and of their patches, not normalised.

        The vector of a patch is what pooling and projection make of a picture all of whose places are that patch.

        Raises:
            UsageError: the tower has no single map with patches.
        """
        layouts = self.measured.layouts
        if len(layouts) != 1 or not layouts[0].patches:
            raise UsageError(
                f"{type(self.trunk).__name__} gives {', '.join(map(str, layouts))} and so no one set of patches; "
                "choose another image tower."
            )
        features = self.features(pixels)
        patches = as_tokens(features, layouts)[0].patches
        alone = as_features(patches.flatten(0, 1), layouts[0])
        return self.head(self._vector(features)), self.head(self._vector(alone)).unflatten(0, patches.shape[:2])

    def _vector(self, features: Features) -> Float[Tensor, "B F"]:
        if self.is_native:
            return self.native_of(features)
        return self._pool(as_tokens(features, self.measured.layouts))

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
            still = [name for name in batch_norm_layers(self.trunk) if _owner_is_locked(self.trunk, name, locked)]
            freeze_batch_norm(self.trunk, still)

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


def _owner_is_locked(trunk: nn.Module, name: str, locked: set[str]) -> bool:
    own = [f"{name}.{each}" for each, _ in trunk.get_submodule(name).named_parameters()]
    return all(each in locked for each in own)
