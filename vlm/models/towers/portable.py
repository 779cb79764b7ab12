"""Saying a model in open_clip's own format where that can say it."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from vlm.models.towers.config import SOURCE, TOWER, ImageTowerConfig, read_image_config
from vlm.models.towers.naming import split_tower
from vlm.tensors import Tensor


def config_to_save(config: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model_cfg to write beside weights: in open_clip's format where it builds a network of the same weights.

    open_clip can say: its own towers, and `timm:` towers pooled natively at the size timm made them for. It cannot say
    other poolings, other sizes of trunks with fixed positions, and hf:, lm:, bag and ngram; these keep our `tower` key,
    which open_clip refuses.
    """
    saved = deepcopy(config)
    if "logit_bias" in weights and saved.get("init_logit_bias") is None:
        saved["init_logit_bias"] = float(weights["logit_bias"])
    for part in ("vision_cfg", "text_cfg"):
        saved[part].pop(SOURCE, None)
    if TOWER in saved["text_cfg"] or TOWER not in saved["vision_cfg"]:
        return saved
    vision = _in_open_clip(read_image_config(saved["vision_cfg"]))
    if vision is None:
        return saved
    said = saved | {"vision_cfg": vision, "custom_text": True}
    return (
        said if _shapes_of_open_clip(said) == {name: tuple(value.shape) for name, value in weights.items()} else saved
    )


def _in_open_clip(config: ImageTowerConfig) -> dict[str, Any] | None:
    from vlm.models.towers.timm_tower import timm_size

    prefix, name = split_tower(config.tower)
    is_plain = prefix == "timm" and config.pooling == "native" and not (config.registers or config.overrides)
    if not is_plain or config.image_size != timm_size(name):
        return None
    return {
        "timm_model_name": name,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_drop": config.dropout,
        **({"timm_drop_path": config.drop_path} if config.drop_path else {}),
        "patch_dropout": config.patch_dropout,
        "image_size": config.image_size,
    }


def _shapes_of_open_clip(config: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    from open_clip.model import CustomTextCLIP

    values = {key: value for key, value in config.items() if key != "custom_text"}
    try:
        with torch.device("meta"):
            twin = CustomTextCLIP(**values, output_dict=True)
    except (TypeError, RuntimeError, AssertionError):
        return None
    return {name: tuple(value.shape) for name, value in twin.state_dict().items()}
