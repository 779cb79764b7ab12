"""open_clip's networks from its own configuration format."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from vlm.config import nearest
from vlm.data.tokenizers import Tokenizer
from vlm.errors import UsageError
from vlm.models.architectures import ARCHITECTURES

ModelConfig = dict[str, Any]
"""The `model_cfg` of an open_clip model folder."""


def model_config(name: str) -> ModelConfig:
    """The configuration of one of our architectures or of open_clip's.

    Raises:
        UsageError: the name is known to neither; the nearest one is named.
    """
    if name in ARCHITECTURES:
        return deepcopy(ARCHITECTURES[name])
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise UsageError(f"Unknown architecture {name!r}; {nearest(name, [*ARCHITECTURES, *open_clip.list_models()])}")
    return config


def fit_to_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The same architecture with the tokenizer's vocabulary, context length and special ids."""
    fitted = deepcopy(config)
    text = fitted["text_cfg"]
    text["context_length"], text["vocab_size"] = tokenizer.context_length, tokenizer.vocab_size
    text["pad_id"], text["eos_id"] = tokenizer.pad_token, tokenizer.end_token
    if "multimodal_cfg" in fitted:
        fitted["multimodal_cfg"]["context_length"] = tokenizer.context_length
        fitted["multimodal_cfg"]["vocab_size"] = tokenizer.vocab_size
    return fitted


def build_network(config: ModelConfig) -> nn.Module:
    """An open_clip CLIP, CustomTextCLIP or CoCa with fresh weights, drawn from torch's global generator.

    Its forward(images [B, 3, H, W], tokens [B, L]) gives a dict with `image_features` and `text_features` [B, D] of
    unit length, `logit_scale`, and for CoCa `logits` [B, L-1, V] with `labels` [B, L-1].
    """
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    values = deepcopy(config)
    is_custom = values.pop("custom_text", False) or "hf_model_name" in values["text_cfg"]
    if "multimodal_cfg" in values:
        network: nn.Module = CoCa(**values, pad_id=values["text_cfg"].get("pad_id", 0))
        _initialise_decoder(network)
        return network
    return (CustomTextCLIP if is_custom else CLIP)(**values, output_dict=True)


def is_captioner(network: nn.Module) -> bool:
    """Whether the network has a decoder that writes captions."""
    return hasattr(network, "text_decoder")


def _initialise_decoder(network: nn.Module) -> None:
    """Give CoCa's output projection its weights: open_clip 3.3 leaves them as uninitialised memory."""
    projection = network.get_parameter("text_decoder.text_projection")
    with torch.no_grad():
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
