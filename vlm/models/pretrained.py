"""Pretrained models of others: open_clip's names and folders, and repositories of the Hugging Face Hub."""

import logging
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from vlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer, open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.models.factory import ModelConfig, allow_logit_bias, enable_padding_trim
from vlm.models.model import VisionLanguageModel

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf-hub:"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# configurations and vocabularies, before weights
_SMALL_FILES = ("*.json", "*.txt", "*.model")
# the first that are there: a repository often holds the same weights in several formats
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_HUGGINGFACE_WEIGHTS = ("*model*.safetensors", "*pytorch_model*.bin")


def is_hub_name(spec: str) -> bool:
    """Whether it is `hf-hub:…`, or has the form ORGANISATION/NAME."""
    return spec.startswith(HUB_PREFIX) or _HUB_NAME.fullmatch(spec) is not None


def download_from_hub(spec: str) -> Path:
    """The folder of a repository of the Hugging Face Hub, from the cache where it is there.

    Raises:
        UsageError: it is neither cached nor within reach, or holds no weights.
    """
    from huggingface_hub import snapshot_download

    name = spec.removeprefix(HUB_PREFIX)
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_SMALL_FILES)))
        is_open_clip = (folder / "open_clip_config.json").is_file()
        for pattern in _OPEN_CLIP_WEIGHTS if is_open_clip else _HUGGINGFACE_WEIGHTS:
            other = None if is_open_clip else ["open_clip*", "onnx/*", "openvino/*"]
            snapshot_download(name, allow_patterns=[pattern], ignore_patterns=other)
            if any(folder.rglob(pattern)):
                return folder
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"There is no model {spec!r}: no folder has this name, and on the Hugging Face Hub it is neither cached "
            f"nor within reach ({reason})."
        ) from error
    raise UsageError(f"There is no model {spec!r}: this repository of the Hugging Face Hub holds no weights.")


def load_open_clip(spec: str, device: torch.device, precision: torch.dtype) -> VisionLanguageModel:
    """A model of open_clip by its name and weights: a tag of open_clip, or a file.

    Raises:
        UsageError: open_clip has no such model or weights, or the name alone leaves a choice.
        VlmError: the weights are neither cached nor within reach, or the file does not hold them.
    """
    import open_clip

    name, _, tag = spec.partition(":")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tag and len(tags) == 1:
        tag = tags[0]
    config = open_clip.get_model_config(name)
    if config is None or not tag or not (tag in tags or Path(tag).is_file()):
        raise UsageError(_no_such_model(spec, name, has_config=config is not None))
    logger.info(f"Loading the model {spec} ({device})")
    config = _with_activation_of(config, name, tag)
    try:
        # output_dict, so that its forward pass gives names as ours do
        network: Any = open_clip.create_model(
            name,
            pretrained=tag,
            device=device,
            output_dict=True,
            require_pretrained=True,
            force_quick_gelu=bool(config.get("quick_gelu")),
        )
    except Exception as error:  # torch, pickle, safetensors and open_clip raise some ten kinds for one bad file
        raise VlmError(_unloadable(spec, name, tag, error)) from error
    _warn_of_activation(config, name, tag)
    try:
        return _loaded(spec, network, config, _tokenizer_of(config), device, precision)
    except (OSError, RuntimeError) as error:
        raise VlmError(f"The tokenizer of {spec} is neither cached nor within reach of the network: {error}") from error


def _with_activation_of(config: ModelConfig, name: str, tag: str) -> ModelConfig:
    """The configuration with the activation that the weights were trained with.

    Many of open_clip's weights (OpenAI's, MetaCLIP's, DFN's) were trained with QuickGELU, and are listed under names
    without it as well; open_clip only warns, and the embeddings are off. A file does not say which it needs.
    """
    import open_clip

    is_quick = (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False)
    return {**config, "quick_gelu": True} if is_quick else config


def _warn_of_activation(config: ModelConfig, name: str, tag: str) -> None:
    import open_clip

    twin = f"{name}-quickgelu"
    if Path(tag).is_file() and not config.get("quick_gelu") and twin in open_clip.list_models():
        logger.warning(
            f"{tag} does not say which activation it was trained with, and {name} has GELU: if it was fine-tuned from "
            f"weights of OpenAI, MetaCLIP or DFN, give {twin}:{tag}, or its embeddings are wrong."
        )


def _unloadable(spec: str, name: str, tag: str, error: Exception) -> str:
    reason = shorten(" ".join(str(error).split()) or type(error).__name__, 300, placeholder=" …")
    if not Path(tag).is_file():
        return f"The weights of {spec} are neither cached nor within reach of the network: {reason}"
    if "text_model." in str(error):
        return (
            f"{tag} holds weights of Hugging Face's transformers, not of open_clip: give the folder that it is in, "
            "with its config.json, as MODEL."
        )
    if "TorchScript" in str(error):
        return f"{tag} is a TorchScript archive; of OpenAI's models give {name}-quickgelu:openai, else a state dict."
    if "loading state_dict" in str(error):
        return f"{tag} does not hold the weights of {name}: {reason}"
    return f"{tag} cannot be read as a checkpoint of open_clip (tensors only, no other Python objects): {reason}"


def _no_such_model(spec: str, name: str, *, has_config: bool) -> str:
    import open_clip

    known = [f"{model}:{weights}" for model, weights in open_clip.list_pretrained()]
    if has_config and ":" not in spec:
        of_name = [entry for entry in known if entry.startswith(f"{name}:")]
        choice = f"one of {', '.join(of_name)}" if of_name else f"{name}:FILE, since open_clip has none"
        return f"{spec!r} leaves open which weights: give {choice}."
    if ":" not in spec:
        return (
            f"There is no model {spec!r}: give the folder of a run or of a model, NAME:WEIGHTS of open_clip, or "
            "ORGANISATION/NAME of the Hugging Face Hub."
        )
    near = [entry for entry in known if entry.startswith(name)][:5] or known[:5]
    return f"open_clip has no {spec!r}; it has for example {', '.join(near)}."


def load_open_clip_folder(folder: Path, device: torch.device, precision: torch.dtype) -> VisionLanguageModel:
    """A folder that open_clip wrote, or its users: configuration, weights, and for some models a tokenizer.

    Raises:
        UsageError: it needs a tokenizer that is not there. VlmError: it cannot be read, or has no weights.
    """
    import open_clip

    name = f"local-dir:{folder}"
    try:
        config: Any = open_clip.get_model_config(name)
        # without weights open_clip would go on with random ones
        network: Any = open_clip.create_model(name, device=device, output_dict=True, require_pretrained=True)
    # open_clip has no error of its own for what it cannot read
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VlmError(f"The weights of {folder} cannot be read: {error}") from error
    return _loaded(str(folder), network, config, _tokenizer_of(config, folder), device, precision)


def _loaded(
    name: str, network: Any, config: ModelConfig, tokenizer: Tokenizer, device: torch.device, precision: torch.dtype
) -> VisionLanguageModel:
    import open_clip

    allow_logit_bias(network)
    return VisionLanguageModel(
        name=name,
        network=network.eval(),
        config=config,
        view=EvalTransform.from_preprocess(open_clip.get_model_preprocess_cfg(network)),
        tokenizer=tokenizer,
        device=device,
        precision=precision,
        trims_padding=enable_padding_trim(network, is_trained=False),
    )


def _tokenizer_of(config: ModelConfig, folder: Path | None = None) -> Tokenizer:
    """CLIP's, or the one the configuration names, from the folder if it is there; with open_clip's cleaning."""
    text = config["text_cfg"]
    length = text.get("context_length", 77)
    name = text.get("hf_tokenizer_name", "")
    if not name:
        return open_tokenizer("clip", length)
    is_here = folder is not None and any(folder.glob("tokenizer*.json"))
    options = dict(text.get("tokenizer_kwargs", {}))
    if text.get("tokenizer_mode"):
        options["tokenizer_mode"] = text["tokenizer_mode"]
    return HuggingFaceTokenizer(str(folder) if is_here else name, length, options)
