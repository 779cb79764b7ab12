"""A trained model for images of another size: the same weights, with position embeddings interpolated to the new grid.

Dosovitskiy et al. 2021 (§3.2) fine-tune ViT so at a higher resolution.
"""

import dataclasses
from copy import deepcopy
from math import isqrt

import torch

from vlm.errors import UsageError
from vlm.models.factory import build_network
from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Float, Tensor

# tokens before the patches: none, a class token, or that with registers
_PREFIX_TOKENS = (0, 1, 2, 4, 5)


def with_image_size(model: VisionLanguageModel, size: int) -> VisionLanguageModel:
    """The model for images of size × size pixels.

    Raises:
        UsageError: one of its weights depends on the size of the image and is not a grid of position embeddings.
    """
    if size == model.view.size:
        return model
    config = deepcopy(model.config)
    # networks of other libraries keep their size elsewhere
    if not isinstance(config.get("vision_cfg", {}).get("image_size"), int):
        raise UsageError(f"{model.name} takes images of {model.view.size} px only; leave out --image-size.")
    config["vision_cfg"]["image_size"] = size
    network = build_network(config).to(model.device)
    weights = network.state_dict()
    # sine positions are computed for their grid, not learned
    is_fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    for name, tensor in model.network.state_dict().items():
        if name not in weights or name in is_fixed:
            continue
        if weights[name].shape != tensor.shape:
            tensor = _interpolated(tensor, weights[name].shape, f"{model.name} takes {model.view.size} px: {name}")
        weights[name] = tensor
    network.load_state_dict(weights)
    view = dataclasses.replace(model.view, size=size)
    return dataclasses.replace(model, network=network.eval(), config=config, view=view)


def _interpolated(positions: Float[Tensor, "*B N C"], shape: torch.Size, name: str) -> Float[Tensor, "*B M C"]:
    from timm.layers.pos_embed import resample_abs_pos_embed

    is_grid = positions.ndim in (2, 3) and len(shape) == positions.ndim and shape[-1] == positions.shape[-1]
    old_length, new_length = positions.shape[-2:][0], shape[-2:][0]
    for num_prefix in _PREFIX_TOKENS if is_grid else ():
        old_side, new_side = (isqrt(max(length - num_prefix, 0)) for length in (old_length, new_length))
        if (old_side**2 + num_prefix, new_side**2 + num_prefix) == (old_length, new_length):
            rows = positions.reshape(1, old_length, -1)
            resampled = resample_abs_pos_embed(
                rows, [new_side, new_side], [old_side, old_side], num_prefix_tokens=num_prefix
            )
            return resampled.reshape(shape)
    raise UsageError(f"{name} depends on the image size in a way that cannot be interpolated; leave out --image-size.")
