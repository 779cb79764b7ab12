"""A dual encoder of towers, with the interface of open_clip's CLIP."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlm.config import nearest
from vlm.errors import UsageError
from vlm.models.towers.table import build_image_tower, build_text_tower, complete_towers
from vlm.tensors import Float, Int64, Tensor

_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "init_logit_scale", "init_logit_bias", "custom_text")
INITIAL_SCALE = math.log(1 / 0.07)  # CLIP §2.5


class TowerNetwork(nn.Module):
    """An image tower and a text tower with a learned temperature; its parts have the names of CustomTextCLIP's.

    logit_bias is there where init_logit_bias is a number (SigLIP, Zhai et al. 2023).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        for key in config:
            if key not in _KEYS:
                raise UsageError(f"model_cfg: unknown key {key!r} for towers; {nearest(key, list(_KEYS))}")
        values = complete_towers(config)
        self.visual = build_image_tower(values["vision_cfg"], values["embed_dim"])
        self.text = build_text_tower(values["text_cfg"], values["embed_dim"])
        self.logit_scale = nn.Parameter(torch.tensor(float(values.get("init_logit_scale", INITIAL_SCALE))))
        bias = values.get("init_logit_bias")
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(torch.tensor(float(bias))))

    def encode_image(self, image: Float[Tensor, "B 3 H W"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Vectors of pictures."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Int64[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B D"]:
        """Vectors of texts."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Float[Tensor, "B 3 H W"], text: Int64[Tensor, "B L"]) -> dict[str, Tensor]:
        """`image_features` and `text_features` [B, D] of unit length, `logit_scale`, and `logit_bias` if any."""
        outputs = {
            "image_features": self.encode_image(image, normalize=True),
            "text_features": self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        bias = self.logit_bias
        return outputs | {"logit_bias": bias} if isinstance(bias, Tensor) else outputs

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Keep the image trunk as it is, but for its last groups of layers."""
        self.visual.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)  # pyright: ignore[reportCallIssue]

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Keep the text trunk as it is, but for its last layers."""
        self.text.lock(unlocked_layers, freeze_layer_norm)  # pyright: ignore[reportCallIssue]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations again in the backward pass instead of keeping them.

        Raises:
            UsageError: the trunk of a tower cannot.
        """
        for tower in (self.visual, self.text):
            tower.set_grad_checkpointing(enable)  # pyright: ignore[reportCallIssue]
