"""Base classes of our towers: an image tower is a trunk with pooling and projection; a text tower embeds tokens.

Also batch normalisation: which layers use statistics of the batch, and how to freeze them.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.errors import UsageError
from vlm.models.towers.initial_weights import LoadedWeights
from vlm.models.towers.pooling import Features, Pooling, TokenMap, TrunkInfo, as_features, as_tokens, build_pooling
from vlm.models.towers.tower_config import ImageTowerConfig
from vlm.tensor_types import Bool, Float, Int64, Tensor


def batch_norm_layers(network: nn.Module) -> list[str]:
    """Names of the layers that use statistics of the batch while training, as batch normalisation does.

    With them micro-batches differ from the whole batch. Frozen ones are not among them.
    """
    names: list[str] = []
    for name, module in network.named_modules():
        if _uses_batch_statistics(module) and keep_in_eval_mode not in module._forward_pre_hooks.values():
            names.append(name)
    return names


def freeze_batch_norm(network: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Make these layers (all if none are named) normalise by their running statistics from now on.

    Gains and biases are still trained. In a fresh network the statistics are mean 0 and variance 1, so its layers
    become plain gains; this is meant for trained towers. Returns the names of the layers that were frozen.
    """
    frozen = [name for name in batch_norm_layers(network) if names is None or name in names]
    for name in frozen:
        module = network.get_submodule(name)
        module.eval()
        # network.train() would undo eval() alone
        module.register_forward_pre_hook(keep_in_eval_mode)
    return frozen


def keep_in_eval_mode(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook: whatever mode the network is in, this layer normalises by its running statistics."""
    module.training = False


def _uses_batch_statistics(module: nn.Module) -> bool:
    # timm's evolved normalisation (EvoNorm B) keeps running statistics without being a batch norm
    return isinstance(module, _BatchNorm) or isinstance(getattr(module, "running_var", None), Tensor)


class ImageTower(nn.Module, ABC):
    """Images to vectors of the joint space, through any trunk; subclasses know how to run their trunks.

    The names of its parts are those of open_clip's TimmModel (trunk, head.proj), so that it can be saved as one.

    image_size: the size it is built for. trunk_info: layouts and widths. width: of the pooled vector. loaded_weights:
    what the trunk started from; None if its weights are random.
    memory: from the trunk's tokens to those that a caption decoder attends to; None where there is no decoder.

    Raises:
        UsageError: a decoder is to attend to the tokens of a trunk with several maps.
    """

    loaded_weights: LoadedWeights | None = None

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
            # several maps (CrossViT) are pooled apart and concatenated
            for layout in trunk_info.layouts:
                pools.append(build_pooling(config, layout, has_class_token=has_class_token))
        self.pools = nn.ModuleList(pools)
        self.width = sum(pool.width for pool in pools) or trunk_info.native_width
        # the trunk's last norm often stands in the head that is left out
        self.norm = nn.LayerNorm(self.width) if pools else nn.Identity()
        dropout = nn.Dropout(config.dropout)
        linear = nn.Linear(self.width, embed_dim, bias=False)
        self.head = nn.Sequential(OrderedDict(drop=dropout, proj=linear))
        if config.residual:
            self.head = residual_head(self.width, config.residual, embed_dim, config.head_dropout)
        self.memory = _memory_projection(config, trunk_info, type(trunk).__name__) if config.decoder_width else None
        # parameters without a part in the output get no gradient, which DDP would wait for
        for name in trunk_info.unused_native if self.is_native and not self.memory else trunk_info.unused:
            trunk.get_parameter(name).requires_grad_(False)

    @abstractmethod
    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Features:
        """The trunk's maps, as it gives them."""

    @abstractmethod
    def native(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """One vector per image, by the trunk's own pooling."""

    @abstractmethod
    def native_of(self, features: Features) -> Float[Tensor, "B F"]:
        """The same of the trunk's maps."""

    def parameter_groups(self) -> list[list[str]]:
        """Names of the trunk's parameters, a group per layer, from the first to the last."""
        return group_by_layer(dict(self.trunk.named_parameters()))

    def tokens(self, pixels: Float[Tensor, "B 3 H W"]) -> list[TokenMap]:
        """Prefix tokens and patches of each map (most trunks give one), of the trunk's width."""
        return as_tokens(self.features(pixels), self.trunk_info.layouts)

    @property
    def output_tokens(self) -> bool:
        """Whether it gives the tokens that a caption decoder attends to, as open_clip's towers say it."""
        return self.memory is not None

    def forward(
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B D"] | tuple[Float[Tensor, "B D"], Float[Tensor, "B M C"]]:
        """Vectors of the joint space, not normalised; with a caption decoder, the tokens it attends to as well."""
        if self.memory is not None:
            # one pass of the trunk for both
            features = self.features(pixels)
            tokens = as_tokens(features, self.trunk_info.layouts)[0]
            memory = self.memory(torch.cat([tokens.prefix, tokens.patches], dim=1))
            return self.project(self.pool_features(features)), memory
        return self.project(self.embed(pixels))

    def forward_with_patches(
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B P D"]]:
        """Vectors of the images and of their patches, not normalised.

        The vector of a patch is what pooling and projection make of an image that is this patch everywhere.

        Raises:
            UsageError: the tower has no single map with patches.
        """
        layouts = self.trunk_info.layouts
        if len(layouts) != 1 or not layouts[0].patches:
            raise UsageError(
                f"{type(self.trunk).__name__} gives {', '.join(map(str, layouts))}, so there is no one set of patches; "
                "choose another image tower."
            )
        features = self.features(pixels)
        image = self.head(self.pool_features(features))
        patches = as_tokens(features, layouts)[0].patches
        # each patch as a map of its own, so that one pass pools all of them
        single_patch_maps = as_features(patches.flatten(0, 1), layouts[0])
        embedded = self.head(self.pool_features(single_patch_maps))
        return image, embedded.unflatten(0, patches.shape[:2])

    def embed(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """What the trunk makes of images, pooled: all that a frozen trunk is run for."""
        return self.native(pixels) if self.is_native else self._pool(self.tokens(pixels))

    def project(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """Pooled features to vectors of the joint space, not normalised."""
        return self.head(features)

    def pool_features(self, features: Features) -> Float[Tensor, "B F"]:
        """One vector per image, from the trunk's maps."""
        if self.is_native:
            return self.native_of(features)
        return self._pool(as_tokens(features, self.trunk_info.layouts))

    def _pool(self, maps: list[TokenMap]) -> Float[Tensor, "B F"]:
        pooled = [pool(tokens) for pool, tokens in zip(self.pools, maps, strict=True)]
        return self.norm(torch.cat(pooled, dim=-1))

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the trunk but for its last groups of layers (LiT, Zhai et al. 2022).

        Our own pooling and the projection are always trained, since no pretraining gave them.
        """
        groups = self.parameter_groups()
        locked: set[str] = set()
        for group in groups[: max(0, len(groups) - unlocked_groups)]:
            locked.update(group)
        for name in locked:
            self.trunk.get_parameter(name).requires_grad_(False)
        if freeze_bn_stats:
            frozen = [name for name in batch_norm_layers(self.trunk) if _is_fully_locked(self.trunk, name, locked)]
            freeze_batch_norm(self.trunk, frozen)

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's activations in the backward pass."""


def _memory_projection(config: ImageTowerConfig, trunk_info: TrunkInfo, trunk: str) -> nn.Sequential:
    if len(trunk_info.layouts) != 1:
        raise UsageError(
            f"{trunk} gives {', '.join(map(str, trunk_info.layouts))}, so there is no one set of tokens for a caption "
            "decoder; choose another image tower."
        )
    width = trunk_info.layouts[0].width
    # features of convolutions have a scale of their own, which attention would have to learn
    norm = nn.LayerNorm(width) if config.decoder_norm else nn.Identity()
    return nn.Sequential(OrderedDict(norm=norm, proj=nn.Linear(width, config.decoder_width)))


def group_by_layer(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    """Names grouped up to their first number: `encoder.layer.0.…` is a group, `embeddings.…` is one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in parameters:
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
        groups.setdefault(tuple(parts[: number + 1]), []).append(name)
    return list(groups.values())


def _is_fully_locked(trunk: nn.Module, name: str, locked: set[str]) -> bool:
    parameters = trunk.get_submodule(name).named_parameters()
    return all(f"{name}.{parameter_name}" in locked for parameter_name, _ in parameters)


class TextTower(nn.Module, ABC):
    """Token rows to vectors of the joint space.

    takes_embeddings: whether it reads precomputed embeddings, by `project`.
    """

    takes_embeddings = False

    @abstractmethod
    def forward(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Vectors of the joint space, not normalised."""

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        """The pretrained parameters, which locking freezes; here all."""
        return dict(self.named_parameters())

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the trunk but for its last layers."""
        parameters = self.trunk_parameters()
        groups = group_by_layer(parameters)
        for group in groups[: max(0, len(groups) - unlocked_layers)]:
            for name in group:
                # LiT leaves layer norms trainable on request, as open_clip does
                is_norm = "norm" in name.lower() or "ln_" in name
                parameters[name].requires_grad_(is_norm and not freeze_layer_norm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass; nothing to do for towers with hardly any."""


def text_mask(tokens: Int64[Tensor, "B L"], pad_id: int) -> Bool[Tensor, "B L"]:
    """Which positions hold text: from the first to the last token that is not padding.

    CLIP's padding is also its token "!", so padding between other tokens is text.
    """
    is_token = (tokens != pad_id).long()
    has_token_before = is_token.cumsum(dim=1) > 0
    has_token_after = is_token.flip(1).cumsum(dim=1).flip(1) > 0
    return has_token_before & has_token_after


def pool_states(states: Float[Tensor, "B L C"], mask: Bool[Tensor, "B L"], pooling: str) -> Float[Tensor, "B C"]:
    """The mean of the states of text, the last of them, or the first (cls)."""
    if pooling == "mean":
        weights = mask.to(states.dtype)[:, :, None]
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    is_text = mask.long()
    first = is_text.argmax(dim=1)  # argmax gives the first of equal values
    index = first if pooling == "cls" else first + (is_text.sum(dim=1) - 1).clamp(min=0)
    return states.gather(1, index[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]


def projection(width: int, hidden: int, embed_dim: int, dropout: float = 0.0) -> nn.Sequential:
    """A linear layer to the joint space, or two with a GELU between them if `hidden` is a width."""
    if not hidden:
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, embed_dim, bias=False))
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, embed_dim, bias=False)
    )


class ResidualProjection(nn.Module):
    """A linear layer, plus a perceptron with one hidden layer that corrects it.

    On frozen features the linear part learns in few steps, and what is not linear is left to the perceptron.
    """

    def __init__(self, width: int, hidden: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embed_dim)
        self.hidden = projection(width, hidden, embed_dim, dropout)

    def forward(self, features: Float[Tensor, "... F"]) -> Float[Tensor, "... D"]:
        """Vectors of the joint space, not normalised."""
        return self.linear(features) + self.hidden(features)


def residual_head(width: int, hidden: int, embed_dim: int, dropout: float) -> nn.Sequential:
    """Norm, dropout and a `ResidualProjection`: a head for features of a frozen trunk."""
    layers: dict[str, nn.Module] = {
        "norm": nn.LayerNorm(width),
        "drop": nn.Dropout(dropout),
        "proj": ResidualProjection(width, hidden, embed_dim, dropout),
    }
    return nn.Sequential(OrderedDict(layers))
