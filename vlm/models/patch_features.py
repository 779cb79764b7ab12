"""What image towers give beside embeddings of images: embeddings of patches and of small crops, features before the
projection into the joint space.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.models.network import Network
from vlm.tensor_types import Float, Tensor


@dataclass(frozen=True, kw_only=True)
class ImageTowerOutput:
    """One pass of the image tower.

    image: the embedding, not normalised. memory: what a caption decoder attends to, where the tower gives it.
    patches: the patches in the joint space, if requested; not normalised.
    """

    image: Float[Tensor, "B D"]
    memory: Float[Tensor, "B M W"] | None = None
    patches: Float[Tensor, "B P D"] | None = None


def run_image_tower(
    network: Network, pixels: Float[Tensor, "B 3 H W"], *, with_patches: bool = False
) -> ImageTowerOutput:
    """Run the image tower once.

    The features of a patch are what the tower's own head makes of an image that is this patch everywhere, so they lie
    in the space of the image's embedding and need no weights of their own. Class and register tokens are left out. A
    tower that is neither open_clip's ViT nor its timm adapter needs a method
    `forward_with_patches(pixels) -> (image, patches)`.

    Raises:
        UsageError: patches are requested from a tower that has none.
    """
    visual = network.get_submodule("visual")
    # one pass for image and patches, since the tower dominates the cost of a step
    if with_patches:
        return _run_with_patches(visual, pixels)
    if getattr(visual, "output_tokens", False):
        image, memory = cast(tuple[Tensor, Tensor], visual(pixels))
        return ImageTowerOutput(image=image, memory=memory)
    return ImageTowerOutput(image=network.encode_image(pixels))


def supports_patch_features(network: nn.Module) -> bool:
    """Whether `run_image_tower` can give the patches of this network's image tower."""
    from vlm.data.open_clip_private import TimmModel, VisionTransformer

    visual = getattr(network, "visual", None)
    if isinstance(visual, VisionTransformer):
        # cascaded pooling attends to pooled queries, which no patch could stand for
        return getattr(visual, "attn_pool_contrastive", None) is None
    if isinstance(visual, TimmModel):
        # such a head pools over the tokens itself, with learned queries for a whole map
        return "pool" not in dict(visual.head.named_children())
    return hasattr(visual, "forward_with_patches")


def pool_images(network: Network, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
    """What the image tower gives before its projection: pooled and normed, as probes of frozen towers read it.

    SigLIP's towers have no projection; theirs are the embeddings, not normalised.

    Raises:
        UsageError: the tower's pooling and projection are one.
    """
    from vlm.data.open_clip_private import VisionTransformer

    pool = getattr(network, "pool_image", None)
    if pool is not None:
        return pool(pixels)
    visual: Any = network.get_submodule("visual")
    if isinstance(visual, VisionTransformer):
        pooled, _ = visual._pool(visual.transformer(visual._embeds(pixels)))
        return pooled
    head = dict(visual.named_children()).get("head")
    # heads that pool over the tokens are not read apart, as little as open_clip's ResNets, which attend and project
    layers = dict(head.named_children()) if isinstance(head, nn.Sequential) else {}
    if head is None or "pool" in layers or not {"proj", "mlp"} & set(layers):
        raise UsageError(
            f"{type(visual).__name__} pools and projects in one layer, so there are no features before the "
            "projection; use those after it (layer = 'projected')."
        )
    inputs: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    try:
        visual(pixels)
    finally:
        handle.remove()
    return inputs[0]


def encode_crops(network: Network, crops: Float[Tensor, "B 3 h w"], size: int) -> Float[Tensor, "B D"]:
    """Embeddings, of any length, of square crops whose side need not be `size`, the one the network was built for.

    open_clip's ViTs read a crop at its own size, with their position embeddings interpolated (as Caron et al. 2021
    do); other towers see it enlarged to `size`, unless they have `takes_any_size`.

    Raises:
        UsageError: the crop is not a whole number of patches.
    """
    from vlm.data.open_clip_private import VisionTransformer

    visual = network.get_submodule("visual")
    if crops.shape[-1] == size or getattr(visual, "takes_any_size", False):
        return run_image_tower(network, crops).image
    if isinstance(visual, VisionTransformer):
        return _encode_at_crop_size(visual, crops)
    # towers with fixed positions or windows run at their own size only
    enlarged = F.interpolate(crops, size=(size, size), mode="bilinear", align_corners=False)
    return run_image_tower(network, enlarged).image


def _run_with_patches(visual: Any, pixels: Float[Tensor, "B 3 H W"]) -> ImageTowerOutput:
    from vlm.data.open_clip_private import TimmModel, VisionTransformer

    if isinstance(visual, VisionTransformer):
        tokens = visual.transformer(visual._embeds(pixels))
        pooled, memory = visual._pool(tokens)
        projection = visual.get_parameter("proj")
        patches = _pool_each_patch(visual, tokens[:, 1:]) @ projection
        return ImageTowerOutput(image=pooled @ projection, memory=memory, patches=patches)
    if isinstance(visual, TimmModel):
        trunk: Any = visual.trunk
        features = trunk.forward_features(pixels)
        image = visual.head(trunk.forward_head(features))
        return ImageTowerOutput(image=image, patches=_project_each_patch(visual, features))
    if hasattr(visual, "forward_with_patches"):
        image, patches = visual.forward_with_patches(pixels)
        return ImageTowerOutput(image=image, patches=patches)
    raise UsageError(f"{type(visual).__name__} gives no features of patches; train a ViT or a timm tower.")


def _pool_each_patch(visual: Any, patches: Float[Tensor, "B P W"]) -> Float[Tensor, "B P E"]:
    """Pooling and last norm of open_clip's ViT, for each patch as if it were the only one."""
    pool = getattr(visual, "attn_pool", None)
    if pool is not None:
        patches = _attend_to_single_key(pool.attn, pool.ln_k(patches))
    return visual.get_submodule("ln_post")(patches)


def _attend_to_single_key(attention: nn.MultiheadAttention, keys: Float[Tensor, "B P W"]) -> Float[Tensor, "B P E"]:
    """What any query gets from a sequence of one: its value, whatever the query."""
    width = attention.embed_dim
    # packed in_proj_weight holds query, key and value one after the other
    weight = attention.v_proj_weight if attention.v_proj_weight is not None else attention.in_proj_weight[2 * width :]
    bias = attention.in_proj_bias[2 * width :] if attention.in_proj_bias is not None else None
    return attention.out_proj(F.linear(keys, weight, bias))


def _project_each_patch(visual: Any, features: Tensor) -> Float[Tensor, "B P D"]:
    """Pooling, norm and projection of a timm tower, for each place of its tokens or of its map."""
    trunk = visual.get_submodule("trunk")
    prefix = int(getattr(trunk, "num_prefix_tokens", 0) or 0)
    if features.ndim == 3:
        places = features[:, prefix:]
        # repeated, so that a head that reads the class token finds the patch there too
        alone = places.flatten(0, 1)[:, None].expand(-1, prefix + 1, -1)
    elif getattr(trunk, "output_fmt", "NCHW") == "NHWC":
        places = features.flatten(1, 2)
        alone = places.flatten(0, 1)[:, None, None]
    else:
        places = features.flatten(2).transpose(1, 2)
        alone = places.flatten(0, 1)[:, :, None, None]
    projected = visual.get_submodule("head")(trunk.forward_head(alone))
    return projected.unflatten(0, places.shape[:2])


def _encode_at_crop_size(visual: Any, crops: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B D"]:
    patch = visual.patch_size[0]
    if crops.shape[-1] % patch:
        raise UsageError(f"Crops of {crops.shape[-1]} pixels are not a whole number of patches of {patch}.")
    grid = visual.get_submodule("conv1")(crops)
    positions = resize_positions(visual.get_parameter("positional_embedding"), visual.grid_size, grid.shape[-2:])
    first = visual.get_parameter("class_embedding").to(grid.dtype).expand(len(crops), 1, -1)
    tokens = torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1) + positions.to(grid.dtype)
    tokens = visual.get_submodule("ln_pre")(visual.get_submodule("patch_dropout")(tokens))
    pooled, _ = visual._pool(visual.get_submodule("transformer")(tokens))
    return pooled @ visual.get_parameter("proj")


def resize_positions(
    positions: Float[Tensor, "L W"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "M W"]:
    """Position embeddings of a ViT interpolated from one grid of patches to another; the class token's stays."""
    grid = positions[1:].T.reshape(1, -1, *old)
    # bicubic, as DINO resamples positions
    resized = F.interpolate(grid, size=tuple(new), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([positions[:1], resized.flatten(2)[0].T])
