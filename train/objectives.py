"""What can be minimised, by name: each objective turns the network's outputs into weighted parts."""

from collections.abc import Callable

from vlm.config import choose
from vlm.errors import UsageError
from vlm.tensors import Tensor
from vlm.train.config import ObjectiveConfig
from vlm.train.losses import caption_loss, softmax_contrastive_loss

Outputs = dict[str, Tensor]
"""What the network's forward gives, see `vlm.models.network.build_network`."""

LossParts = dict[str, Tensor]
"""Weighted parts by name; their sum is minimised."""

Objective = Callable[[Outputs, ObjectiveConfig, int], LossParts]
"""From outputs, weights and the padding token to loss parts."""


def contrastive(outputs: Outputs, config: ObjectiveConfig, pad_token: int) -> LossParts:
    """Softmax contrastive learning (CLIP, Radford et al. 2021, §2.3)."""
    images, texts = outputs["image_features"].float(), outputs["text_features"].float()
    return {"contrastive": softmax_contrastive_loss(images, texts, outputs["logit_scale"].float())}


def contrastive_captioning(outputs: Outputs, config: ObjectiveConfig, pad_token: int) -> LossParts:
    """Contrastive captioners (CoCa, Yu et al. 2022, equation 4): both losses share one forward pass."""
    if "logits" not in outputs:
        raise UsageError("The objective coca needs a network with a decoder, e.g. --architecture tiny-coca.")
    captioning = caption_loss(outputs["logits"].float(), outputs["labels"], pad_token=pad_token)
    alignment = contrastive(outputs, config, pad_token)["contrastive"]
    return {"contrastive": config.contrastive_weight * alignment, "caption": config.caption_weight * captioning}


OBJECTIVES: dict[str, Objective] = {
    "clip": contrastive,
    "coca": contrastive_captioning,
}


def choose_objective(config: ObjectiveConfig) -> Objective:
    """The objective a configuration names."""
    return choose(OBJECTIVES, config.objective, "objective")
