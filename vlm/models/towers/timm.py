"""Image towers on timm: any of its models by name, and plain ViTs of any size."""

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import nn

from vlm.data.transforms import TokenGrid
from vlm.errors import UsageError
from vlm.models.towers.initial_weights import load_initial_weights
from vlm.models.towers.pooling import Features, probe_trunk
from vlm.models.towers.tower import ImageTower, group_by_layer
from vlm.models.towers.tower_config import ImageTowerConfig, suggest_names
from vlm.tensor_types import Bool, Float, Int64, Tensor

_ARGUMENTS = {"drop_path": "drop_path_rate", "patch_dropout": "patch_drop_rate", "registers": "reg_tokens"}
_VIT = re.compile(r"(\d+)x(\d+)/(\d+)")


class TimmTower(ImageTower):
    """A trunk of timm, without its classifier."""

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Features:
        """The maps of `forward_features`."""
        return _features(self.trunk, pixels)

    def native(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """The vector the trunk would classify."""
        return self.trunk(pixels)

    def native_of(self, features: Features) -> Float[Tensor, "B F"]:
        """What timm's `forward_head` makes of the maps."""
        trunk: Any = self.trunk
        return trunk.forward_head(features, pre_logits=True)

    def parameter_groups(self) -> list[list[str]]:
        """timm's own groups of layers where it has them."""
        from timm.models import group_parameters

        trunk: Any = self.trunk
        try:
            groups = group_parameters(trunk, trunk.group_matcher())
        except (AttributeError, TypeError):
            return group_by_layer(dict(self.trunk.named_parameters()))
        return [groups[number] for number in sorted(groups)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, as the trunk does it.

        Raises:
            UsageError: the trunk cannot.
        """
        trunk: Any = self.trunk
        try:
            trunk.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise UsageError(
                f"{type(self.trunk).__name__} has no gradient checkpointing; leave it out, or give a smaller "
                "--micro-batch."
            ) from error


class AspectTower(TimmTower):
    """A NaFlexVit that is shown images in their own shape, of at most `tokens` patches (timm's naflexvit).

    Pixels are canvases of a `TokenGrid`: the patches right of an image and below it never enter the trunk. Those of a
    batch are as many as its largest grid has; what is missing to that in other grids is masked.
    """

    grid: TokenGrid

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Features:
        """There are none of one shape.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{type(self.trunk).__name__} with tokens={self.grid.tokens} gives each image a grid of its own, so there "
            "is no one map of patches; leave tokens= out, or what asks for patches."
        )

    def native(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """The vector the trunk would classify."""
        if pixels.is_meta:
            # without data there is no shape to see: a square of as many patches takes as long
            side = self.grid.patch * isqrt(self.grid.tokens)
            return self.trunk(pixels[:, :, :side, :side])
        patches, coordinates, is_image = pack_patches(pixels, self.grid.patch)
        return self.trunk({"patches": patches, "patch_coord": coordinates, "patch_valid": is_image})


def pack_patches(
    pixels: Float[Tensor, "B 3 S S"], patch: int
) -> tuple[Float[Tensor, "B N P"], Int64[Tensor, "B N 2"], Bool[Tensor, "B N"]]:
    """The patches of images at the top left of canvases, row by row, with their rows and columns, padded to the most.

    Where an image ends is seen in the pixels: rows and columns of patches at the far edges that are all like the last
    pixel, which no image reaches, are no part of it. So a border of pure black is cut off too, which shows nothing.
    """
    from timm.models.naflexvit import batch_patchify

    cells = pixels.shape[-1] // patch
    is_drawn = (pixels != pixels[:, :, -1:, -1:]).any(dim=1)
    is_drawn = is_drawn.unflatten(2, (cells, patch)).unflatten(1, (cells, patch)).any(dim=4).any(dim=2)
    numbers = torch.arange(cells, device=pixels.device)
    # one patch at least, since attention over nothing is not a number
    rows = ((numbers + 1) * is_drawn.any(dim=2)).amax(dim=1).clamp(min=1)
    columns = ((numbers + 1) * is_drawn.any(dim=1)).amax(dim=1).clamp(min=1)
    is_image = (numbers[:, None] < rows[:, None, None]) & (numbers < columns[:, None, None])

    longest = int((rows * columns).max())
    is_image, places = is_image.flatten(1).to(torch.uint8).sort(dim=1, descending=True, stable=True)
    is_image, places = is_image[:, :longest].bool(), places[:, :longest]
    patches, _ = batch_patchify(pixels, (patch, patch))
    patches = patches.gather(1, places[:, :, None].expand(-1, -1, patches.shape[2]))
    # timm reads the size of a grid from its largest coordinates, padding included
    places = places * is_image
    return patches, torch.stack([places // cells, places % cells], dim=-1), is_image


_PATCH = re.compile(r"naflexvit_.*patch(\d+)")


def timm_grid(values: Mapping[str, Any], name: str) -> TokenGrid | None:
    """The grids that `tokens` asks for in a vision_cfg; None where images are squares.

    Raises:
        UsageError: the trunk is no naflexvit.
    """
    if not values.get("tokens"):
        return None
    match = _PATCH.match(name)
    if not match:
        raise UsageError(
            f"tokens = {values['tokens']}: timm:{name} takes squares; name one of timm's naflexvit, e.g. "
            "timm:naflexvit_base_patch16_gap, or leave tokens= out."
        )
    patch = values.get("overrides", {}).get("patch_size", match[1])
    return TokenGrid(patch=int(patch), tokens=int(values["tokens"]))


def build_timm(config: ImageTowerConfig, name: str, embed_dim: int) -> ImageTower:
    """`timm:NAME`, with the weights of `initial_weights` if that is given, else fresh ones.

    Raises:
        UsageError: timm has no such model, it does not take these options, or the weights are another's.
    """
    import timm

    # checks the name before anything is built
    own_size = timm_image_size(name)
    grid = timm_grid({"tokens": config.tokens, "overrides": config.overrides}, name)
    if grid:
        _check_grid(grid, config)
        own_size = grid.side
    # a mask of keys alone: what a padded query sees is never read
    arguments: dict[str, Any] = {"use_key_only_attn_mask": True} if grid else {}
    for key, argument in _ARGUMENTS.items():
        # left out where it is 0, since many trunks do not take the argument at all
        if getattr(config, key):
            arguments[argument] = getattr(config, key)
    # trunks without fixed positions take any size and no img_size argument
    if config.image_size != own_size and has_fixed_input_size(name):
        arguments["img_size"] = config.image_size

    def build() -> nn.Module:
        try:
            return timm.create_model(name, num_classes=0, **arguments, **config.overrides)
        except TypeError as error:
            raise UsageError(
                f"{name} does not take all of {', '.join([*arguments, *config.overrides])}: {error}."
            ) from error

    return _tower(build, config, embed_dim, own_size, grid)


def _check_grid(grid: TokenGrid, config: ImageTowerConfig) -> None:
    tokens = f"{config.tower}: tokens = {grid.tokens}"
    if config.image_size != grid.side:
        raise UsageError(
            f"{tokens} makes the canvas {grid.side} pixels, not {config.image_size}; give --image-size 0, or none."
        )
    if config.pooling != "native" or config.decoder_width:
        raise UsageError(f"{tokens} gives each image a grid of its own, for the trunk's own pooling and no decoder.")


def build_vit(config: ImageTowerConfig, name: str, embed_dim: int) -> ImageTower:
    """`vit:WIDTHxDEPTH/PATCH`: a plain ViT (Dosovitskiy et al. 2021) of timm's class.

    Its own pooling is the mean of the patches before the last norm; it has a class token with pooling=token only.
    Sine positions are fixed (Beyer et al. 2022, better plain ViT baselines).

    Raises:
        UsageError: the name is not such a size.
    """
    from timm.models import VisionTransformer

    width, depth, patch = parse_vit_size(name)
    if config.image_size % patch or (config.positions == "sine" and width % 4):
        raise UsageError(
            f"vit:{name} at {config.image_size} pixels: the size must be a multiple of the patch ({patch}), and the "
            "width one of 4 for sine positions."
        )
    has_class_token = config.pooling == "token"

    def build() -> nn.Module:
        vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=patch,
            num_classes=0,
            global_pool="token" if has_class_token else "avg",
            embed_dim=width,
            depth=depth,
            num_heads=max(1, width // config.head_width),
            class_token=has_class_token,
            no_embed_class=True,
            reg_tokens=config.registers,
            patch_drop_rate=config.patch_dropout,
            drop_path_rate=config.drop_path,
            **config.overrides,
        )
        if config.positions == "sine":
            _fix_positions(vit, config.image_size // patch, width)
        return vit

    return _tower(build, config, embed_dim, config.image_size)


def _tower(
    build: Callable[[], nn.Module],
    config: ImageTowerConfig,
    embed_dim: int,
    own_size: int,
    grid: TokenGrid | None = None,
) -> ImageTower:
    trunk_info = probe_trunk(
        build,
        _features,
        lambda trunk, pixels: trunk(pixels),
        name=config.tower,
        image_size=config.image_size,
        own_size=own_size,
    )
    # built again, since the trial copy has no data
    trunk = build()
    has_class_token = getattr(trunk, "has_class_token", None)
    kind = AspectTower if grid else TimmTower
    tower = kind(trunk, config, trunk_info, embed_dim, has_class_token=has_class_token is not False)
    if isinstance(tower, AspectTower) and grid:
        tower.grid = grid
    if config.initial_weights:
        tower.loaded_weights = load_initial_weights(trunk, config.initial_weights, config.tower)
    return tower


def _features(trunk: Any, pixels: Tensor) -> Features:
    return trunk.forward_features(pixels)


def _fix_positions(vit: nn.Module, side: int, width: int) -> None:
    from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

    positions = vit.get_parameter("pos_embed").requires_grad_(False)
    table = build_sincos2d_pos_embed([side, side], dim=width)
    with torch.no_grad():
        positions.copy_(table.to(positions))


def parse_vit_size(name: str) -> tuple[int, int, int]:
    """Width, depth and patch of `WIDTHxDEPTH/PATCH`.

    Raises:
        UsageError: it is written otherwise.
    """
    match = _VIT.fullmatch(name)
    if not match:
        raise UsageError(f"vit:{name} is not a size; write vit:WIDTHxDEPTH/PATCH, e.g. vit:192x12/16.")
    width, depth, patch = map(int, match.groups())
    return width, depth, patch


def timm_image_size(name: str) -> int:
    """The image size a timm model is made for.

    Raises:
        UsageError: timm has no such model; the nearest is named.
    """
    return int(_pretrained_config(name).input_size[-1])


def timm_preprocess(name: str) -> dict[str, Any]:
    """Channel statistics and filter that a timm model's weights were trained with, as keys of a `preprocess_cfg`."""
    config = _pretrained_config(name)
    filters = {"interpolation": config.interpolation} if config.interpolation in ("bicubic", "bilinear") else {}
    return {"mean": list(config.mean), "std": list(config.std), **filters}


def has_fixed_input_size(name: str) -> bool:
    """Whether a timm model must be built for a size other than its own."""
    return bool(_pretrained_config(name).fixed_input_size)


def _pretrained_config(name: str) -> Any:
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name.split(".")[0]):
        raise UsageError(f"timm has no model {name!r}; {suggest_names(name, timm.list_models())}")
    config = get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        raise UsageError(f"timm says nothing of the input of {name!r}; name one of its tags, or another model.")
    return config
