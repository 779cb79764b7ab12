"""Networks from the configuration of a model folder: open_clip's, and those of our towers."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from vlm.config import nearest
from vlm.data.tokenizers import Tokenizer
from vlm.errors import UsageError
from vlm.models.architectures import ARCHITECTURES
from vlm.models.towers.dropout import set_dropout

__all__ = ["ModelConfig", "build_network", "fit_to_tokenizer", "is_captioner", "model_config", "set_dropout"]

ModelConfig = dict[str, Any]
"""The `model_cfg` of a model folder: open_clip's format, or with towers of ours (`vlm.models.towers`)."""


def model_config(name: str) -> ModelConfig:
    """The configuration of one of our architectures, of open_clip's, or of IMAGE_TOWER+TEXT_TOWER[@EMBED_DIM].

    Raises:
        UsageError: the name is known to none; the nearest one is named.
    """
    if name in ARCHITECTURES:
        return deepcopy(ARCHITECTURES[name])
    if "+" in name:
        from vlm.models.towers.table import parse_towers

        return parse_towers(name)
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise UsageError(f"Unknown architecture {name!r}; {nearest(name, [*ARCHITECTURES, *open_clip.list_models()])}")
    return config


def fit_to_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The same architecture with the tokenizer's vocabulary, context length and special ids.

    Raises:
        UsageError: a tower cannot read that many tokens, or cannot tell where the captions of this tokenizer end.
    """
    fitted = deepcopy(config)
    text = fitted["text_cfg"]
    text["context_length"], text["vocab_size"] = tokenizer.context_length, tokenizer.vocab_size
    text["pad_id"], text["eos_id"] = tokenizer.pad_token, tokenizer.end_token
    if "multimodal_cfg" in fitted:
        fitted["multimodal_cfg"]["context_length"] = tokenizer.context_length
        fitted["multimodal_cfg"]["vocab_size"] = tokenizer.vocab_size
    if _names_towers(fitted):
        from vlm.models.towers.table import complete_towers

        fitted = complete_towers(fitted)
    _pool_at_the_end(fitted["text_cfg"], tokenizer)
    return fitted


def build_network(config: ModelConfig) -> nn.Module:
    """A CLIP, CustomTextCLIP or CoCa of open_clip, or a network of towers, with weights from torch's global generator.

    Its forward(images [B, 3, H, W], tokens [B, L]) gives a dict with `image_features` and `text_features` [B, D] of
    unit length, `logit_scale`, `logit_bias` if it has one, and for CoCa `logits` [B, L-1, V] with `labels` [B, L-1].
    """
    if _names_towers(config):
        from vlm.models.towers.network import TowerNetwork

        return TowerNetwork(config)
    network = _build_open_clip(deepcopy(config))
    if network.logit_bias is None:  # so that an objective can give it one
        del network.logit_bias
        network.register_parameter("logit_bias", None)
    return network


def _build_open_clip(values: ModelConfig) -> nn.Module:
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    is_custom = values.pop("custom_text", False) or "hf_model_name" in values["text_cfg"]
    if "multimodal_cfg" in values:
        network = CoCa(**values, pad_id=values["text_cfg"].get("pad_id", 0))
        _initialise_decoder(network)
        return network
    return (CustomTextCLIP if is_custom else CLIP)(**values, output_dict=True)


def _pool_at_the_end(text: ModelConfig, tokenizer: Tokenizer) -> None:
    """Make open_clip's transformer look for the end token by its id where that is not the largest (`argmax`)."""
    is_by_largest = text.get("pool_type", "argmax") == "argmax" and not text.get("embed_cls")
    is_other = "tower" in text or "hf_model_name" in text
    if is_other or not is_by_largest or tokenizer.end_token == tokenizer.vocab_size - 1:
        return
    if tokenizer.end_token not in tokenizer.encode(["a " * tokenizer.context_length])[0]:
        raise UsageError(
            "This tokenizer puts no end token after a caption, which open_clip's transformer reads its vector from; "
            "choose a text tower that needs none (hf:, bag, ngram), or another tokenizer."
        )
    text["pool_type"] = "eos"


def _names_towers(config: ModelConfig) -> bool:
    return any("tower" in config[part] for part in ("vision_cfg", "text_cfg"))


def is_captioner(network: nn.Module) -> bool:
    """Whether the network has a decoder that writes captions."""
    return hasattr(network, "text_decoder")


def _initialise_decoder(network: nn.Module) -> None:
    """Give CoCa's output projection its weights: open_clip 3.3 leaves them as uninitialised memory."""
    projection = network.get_parameter("text_decoder.text_projection")
    with torch.no_grad():
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
