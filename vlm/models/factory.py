"""Networks from configurations: our small architectures, those of open_clip, and networks of our own towers.

A configuration is open_clip's `model_cfg`, which a model folder stores. A text tower that needs no padding can be fed
rows cut to the longest caption of a batch (`enable_padding_trim`), which saves most of its work on short captions.
"""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from vlm.config import suggest
from vlm.data.tokenizers import Tokenizer
from vlm.errors import UsageError
from vlm.models.low_rank import LORA, LowRank, add_adapters
from vlm.models.network import Network

# sine positions, because learned ones start too weak to be used in a short run; 16 patches see a drawn scene well
# enough; batch normalisation is avoided throughout, since a split batch must equal the whole one
_TINY_VISION: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "width": 192,
    "head_width": 32,
    "layers": 2,
    "pos_embed_type": "sin_cos_2d",
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 128,
        "vision_cfg": _TINY_VISION,
        "text_cfg": {"context_length": 16, "vocab_size": 258, "width": 96, "heads": 3, "layers": 1},
        "custom_text": True,
    },
    "tiny-coca": {
        "embed_dim": 128,
        "vision_cfg": _TINY_VISION
        | {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 16, "output_tokens": True},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 258,
            "width": 128,
            "heads": 4,
            "layers": 1,
            "embed_cls": True,
            "output_tokens": True,
        },
        "multimodal_cfg": {"context_length": 16, "vocab_size": 258, "width": 128, "heads": 4, "layers": 1},
        "custom_text": True,
    },
    "small": {
        "embed_dim": 192,
        "vision_cfg": {
            "timm_model_name": "test_convnext3",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 2050, "width": 192, "heads": 3, "layers": 1},
        "custom_text": True,
    },
}
"""Sizes of towers in open_clip's format; vocabulary and context length follow the tokenizer of the run."""


ModelConfig = dict[str, Any]
"""The `model_cfg` of a model folder: open_clip's format, or with towers of ours (`vlm.models.towers`)."""


def model_config(name: str) -> ModelConfig:
    """The configuration of one of our architectures, of open_clip's, or of IMAGE_TOWER+TEXT_TOWER[@EMBED_DIM].

    Raises:
        UsageError: the name is known to none; the nearest one is named.
    """
    # a copy, since callers fill in the tokenizer's sizes
    if name in ARCHITECTURES:
        return deepcopy(ARCHITECTURES[name])
    if "+" in name:
        # imported late: transformers and timm take seconds
        from vlm.models.towers.tower_registry import parse_towers

        return parse_towers(name)
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise UsageError(f"Unknown architecture {name!r}; {suggest(name, [*ARCHITECTURES, *open_clip.list_models()])}")
    return config


def fit_to_tokenizer(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The same architecture with the tokenizer's vocabulary, context length and special tokens.

    Raises:
        UsageError: a tower cannot read that many tokens, or cannot tell where the captions of this tokenizer end.
    """
    fitted = deepcopy(config)
    text = fitted["text_cfg"]
    text["context_length"] = tokenizer.context_length
    text["vocab_size"] = tokenizer.vocab_size
    text["pad_id"] = tokenizer.pad_token
    text["eos_id"] = tokenizer.end_token
    # the decoder reads the same tokens as the text tower
    if "multimodal_cfg" in fitted:
        fitted["multimodal_cfg"]["context_length"] = tokenizer.context_length
        fitted["multimodal_cfg"]["vocab_size"] = tokenizer.vocab_size
    if _uses_towers(fitted):
        from vlm.models.towers.tower_registry import resolve_tower_configs

        fitted = resolve_tower_configs(fitted)
    _pool_at_end_token(fitted["text_cfg"], tokenizer)
    return fitted


def build_network(config: ModelConfig) -> Network:
    """A CLIP, CustomTextCLIP or CoCa of open_clip, or a network of towers, with weights from torch's global generator.

    Its forward(images [B, 3, H, W], tokens [B, L]) gives a dict with `image_features` and `text_features` [B, D] of
    unit length, `logit_scale`, `logit_bias` if it has one, and for CoCa `logits` [B, L-1, V] with `labels` [B, L-1].
    With the key `lora` its matrices have adapters (`vlm.models.low_rank`).
    """
    if LORA in config:
        network = build_network({key: value for key, value in config.items() if key != LORA})
        add_adapters(network, LowRank.of(config))
        return network
    if _uses_towers(config):
        from vlm.models.towers.tower_registry import CaptionerNetwork, TowerNetwork

        if "multimodal_cfg" not in config:
            return cast(Network, TowerNetwork(config))
        captioner = cast(Network, CaptionerNetwork(config))
        # a language model's own projection is trained
        if hasattr(captioner.get_submodule("text_decoder"), "text_projection"):
            _initialise_decoder(captioner)
        return captioner
    if "huggingface" in config:
        from vlm.models.huggingface_clip import HuggingFaceDualEncoder

        return cast(Network, HuggingFaceDualEncoder(config))
    network = _build_open_clip(deepcopy(config))
    allow_logit_bias(network)
    return network


def allow_logit_bias(network: Any) -> None:
    """Let an objective register a bias of the logits where open_clip's network has none, only an attribute None."""
    if network.logit_bias is None:
        del network.logit_bias
        network.register_parameter("logit_bias", None)


def _build_open_clip(values: ModelConfig) -> Network:
    from open_clip import CLIP, CoCa, CustomTextCLIP

    # as open_clip.create_model decides it: a Hugging Face tower needs CustomTextCLIP
    is_custom = values.pop("custom_text", False) or "hf_model_name" in values["text_cfg"]
    if "multimodal_cfg" in values:
        network = CoCa(**values, pad_id=values["text_cfg"].get("pad_id", 0))
        _initialise_decoder(network)
        return cast(Network, network)
    return cast(Network, (CustomTextCLIP if is_custom else CLIP)(**values, output_dict=True))


def _pool_at_end_token(text: ModelConfig, tokenizer: Tokenizer) -> None:
    """Make open_clip's transformer look for the end token by its id where that is not the largest (`argmax`)."""
    is_by_largest = text.get("pool_type", "argmax") == "argmax" and not text.get("embed_cls")
    is_other = "tower" in text or "hf_model_name" in text
    if is_other or not is_by_largest or tokenizer.end_token == tokenizer.vocab_size - 1:
        return
    # a text that is too long shows whether the end token survives truncation
    if tokenizer.end_token not in tokenizer.encode(["a " * tokenizer.context_length])[0]:
        raise UsageError(
            "This tokenizer puts no end token after a caption, which open_clip's transformer reads its vector from; "
            "choose a text tower that needs none (hf:, bag, ngram), or another tokenizer."
        )
    text["pool_type"] = "eos"


def _uses_towers(config: ModelConfig) -> bool:
    return any("tower" in config[part] for part in ("vision_cfg", "text_cfg"))


def is_captioner(network: nn.Module) -> bool:
    """Whether the network has a decoder that writes captions."""
    return hasattr(network, "text_decoder")


def _initialise_decoder(network: nn.Module) -> None:
    """Give CoCa's output projection its weights: open_clip 3.3 leaves them as uninitialised memory."""
    projection = network.get_parameter("text_decoder.text_projection")
    with torch.no_grad():
        # as open_clip initialises the projection of its text tower
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


_POOLS_BY_TOKEN = frozenset({"argmax", "eos", "first"})


def enable_padding_trim(network: nn.Module, *, is_trained: bool = True) -> bool:
    """Let `encode_text` take rows cut to the batch's longest caption, if that gives the same embeddings.

    open_clip's transformer adds its mask of the whole context; here it is cut to the row. In a causal tower nothing
    after the end token has any influence before it, so nothing else changes.

    Returns False, and changes nothing, for captioners, whose class token is at the end of the row; for open_clip's CLIP
    without `custom_text`, which adds the positions of the whole context; for towers that pool a token counted from the
    row's end; and, if it is to be trained, where texts pass through dropout, since what it drops depends on the length
    of the row.
    """
    if hasattr(network, "can_trim_padding"):
        return bool(network.can_trim_padding)
    text = getattr(network, "text", None)
    if is_captioner(network) or text is None or (is_trained and _has_dropout(text)):
        return False
    if not hasattr(text, "attn_mask"):
        return True
    if getattr(text, "pool_type", "") not in _POOLS_BY_TOKEN:
        return False
    text.get_submodule("transformer").register_forward_pre_hook(_crop_attention_mask, with_kwargs=True)
    return True


def _has_dropout(text: nn.Module) -> bool:
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in text.modules())


def _crop_attention_mask(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    mask = named.get("attn_mask")
    length = arguments[0].shape[1]
    # without asking whether it is larger, which an exported graph would take for settled by its example
    if mask is not None:
        named = named | {"attn_mask": mask[..., :length, :length]}
    return arguments, named
