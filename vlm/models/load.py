"""A model folder on disk, and MODEL as people write it: a folder or name of ours, of open_clip or of Hugging Face.

A model folder is in open_clip's own format where that can express the towers, with tokenizer and manifest.
"""

import dataclasses
import json
import logging
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm.data.tokenizers import DESCRIPTION as TOKENIZER_DESCRIPTION
from vlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer, open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.files import write_text
from vlm.manifest import Manifest, is_complete, read_manifest, record_file, write_manifest
from vlm.model_spec import (
    CHECKPOINTS,
    CONFIG,
    LOCAL_PREFIX,
    MIRROR,
    RUN_MODEL,
    is_projection_folder,
    locate_weights,
    model_folder,
    split_model_spec,
)
from vlm.models.low_rank import LORA, merge_adapters
from vlm.models.model import (
    ModelConfig,
    VisionLanguageModel,
    allow_logit_bias,
    build_network,
    enable_padding_trim,
    space_fingerprint,
)
from vlm.models.towers.tower_registry import portable_config
from vlm.models.variants import (
    BackwardCompatibleModel,
    MirroredModel,
    TruncatedModel,
    read_projection,
)

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


WEIGHTS = "open_clip_model.safetensors"


def save_model(
    folder: Path,
    *,
    weights: dict[str, torch.Tensor],
    config: ModelConfig,
    view: EvalTransform,
    tokenizer: Tokenizer,
) -> None:
    """Write the files that `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads, and the tokenizer's.

    Towers that open_clip's format cannot express are named by a `tower` key, which open_clip rejects.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that are not contiguous, as channels-last kernels are
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save(folder)
    values = {"model_cfg": portable_config(config, weights), "preprocess_cfg": view.to_preprocess()}
    values["model_cfg"]["text_cfg"] |= _tokenizer_keys(values["model_cfg"], tokenizer)
    write_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def _tokenizer_keys(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What makes open_clip take the tokenizer in the folder rather than CLIP's, where it has a class for it."""
    is_ours = "tower" in config["text_cfg"] or "huggingface" in config
    if is_ours or not isinstance(tokenizer, HuggingFaceTokenizer):
        return {}
    options = dict(tokenizer.options)
    mode = options.pop("tokenizer_mode", None)
    # open_clip reads the folder itself, whatever the name says
    keys = {"hf_tokenizer_name": "local", "tokenizer_kwargs": options}
    return keys | {"tokenizer_mode": mode} if mode else keys


def save_model_folder(folder: Path, model: VisionLanguageModel, *, inputs: dict[str, str]) -> None:
    """Write a complete model folder with its manifest."""
    save_model(
        folder,
        weights=model.network.state_dict(),
        config=model.config,
        view=model.view,
        tokenizer=model.tokenizer,
    )
    fingerprint = space_fingerprint(model.network, model.view, model.tokenizer)
    files = {path.name: record_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    files.pop("manifest.json", None)  # of an earlier save
    write_manifest(
        folder,
        Manifest(
            kind="model",
            fingerprint=fingerprint,
            counts={"parameters": sum(parameter.numel() for parameter in model.network.parameters())},
            configuration=model.config,
            inputs=inputs,
            files=files,
        ),
    )


def load_model_folder(folder: Path, device: torch.device, precision: torch.dtype) -> VisionLanguageModel:
    """Read a model folder, ours or one that open_clip wrote.

    Raises:
        UsageError: it is not a model folder. VlmError: its weights are damaged, or are not those of its manifest.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is not a model folder: it has no {CONFIG}.")
    if not (folder / TOKENIZER_DESCRIPTION).is_file():
        return load_open_clip_folder(folder, device, precision)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config = values["model_cfg"]
    # before the network, whose towers fail on sizes that no view has
    view = EvalTransform.from_preprocess(
        {"size": config["vision_cfg"]["image_size"], **values.get("preprocess_cfg", {})}
    )
    network = build_network(config)
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, FileNotFoundError) as error:
        raise VlmError(f"The weights of {folder} cannot be read: {error}") from error
    if LORA in config:
        # of a checkpoint: as the final model would be
        config = merge_adapters(network, config)
    model = VisionLanguageModel(
        name=str(folder),
        network=network.eval().to(device),
        config=config,
        view=view,
        tokenizer=open_tokenizer(str(folder), config["text_cfg"].get("context_length")),
        device=device,
        precision=precision,
        trims_padding=enable_padding_trim(network, is_trained=False),
    )
    if is_complete(folder) and read_manifest(folder, "model").fingerprint != model.fingerprint:
        raise VlmError(
            f"{folder} is not what its manifest says: weights, view or tokenizer were changed. Save it again."
        )
    return model


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_model(spec: str, *, device: str = "auto", precision: str = "fp32") -> VisionLanguageModel:
    """The model of this name:

    - a run folder (its final model, else its newest checkpoint), a model folder, also one of open_clip (`local-dir:`
      may stand before it), or an upgrade folder (the new model with the projection on top);
    - a Hugging Face folder of CLIP, MetaCLIP 2, SigLIP or SigLIP 2, or a sentence-transformers folder (texts only);
    - `package:all-minilm-l6-v2`: such a folder in an installed package (`vlm.model_spec`);
    - `ORGANISATION/NAME` or `hf-hub:ORGANISATION/NAME`: such a folder or one of open_clip on the Hugging Face Hub;
    - `ViT-B-32:laion2b_s34b_b79k`, a name of open_clip with its weights (or a file of them); the name alone where there
      is one set of weights only.

    Any of them followed by `#64` keeps the first 64 dimensions; by `#mirror` it embeds an image with its mirror image.

    Raises:
        UsageError: there is no such model, or it has no such variant. VlmError: its weights cannot be loaded.
    """
    whole_spec, variant = split_model_spec(spec)
    if variant is not None:
        whole = load_model(whole_spec, device=device, precision=precision)
        return MirroredModel.of(whole) if variant == MIRROR else TruncatedModel.of(whole, variant)

    torch_device = choose_device(device)
    if precision not in PRECISIONS:
        raise UsageError(f"precision = {precision!r}; give {' or '.join(PRECISIONS)}.")
    dtype = PRECISIONS[precision]
    path = Path(locate_weights(spec.removeprefix(LOCAL_PREFIX)))
    # of a name it is said once it is known
    if path.is_dir():
        logger.info(f"Loading the model {spec} ({torch_device})")
    if is_projection_folder(path):
        return _load_backward_compatible(path, device, precision)
    if path.is_dir():
        return _load_folder(path, torch_device, dtype)
    if spec.startswith(LOCAL_PREFIX):
        raise UsageError(f"There is no model {spec!r}: {path} is not a folder.")
    if is_hub_name(spec):
        return dataclasses.replace(_load_folder(download_from_hub(spec), torch_device, dtype), name=spec)
    return load_open_clip(spec, torch_device, dtype)


def _load_folder(folder: Path, device: torch.device, precision: torch.dtype) -> VisionLanguageModel:
    # a model of ours first, whatever other files lie beside it
    if not any((folder / name).exists() for name in (CONFIG, RUN_MODEL, CHECKPOINTS)):
        from vlm.models.huggingface_clip import is_huggingface_folder, load_huggingface
        from vlm.models.sentence_encoder import is_sentence_transformer, load_sentence_transformer

        if is_sentence_transformer(folder):
            return load_sentence_transformer(folder, device, precision)
        if is_huggingface_folder(folder):
            return load_huggingface(folder, device, precision)
    return load_model_folder(model_folder(folder), device, precision)


def load_network(spec: str, *, device: str = "auto", precision: str = "fp32") -> VisionLanguageModel:
    """A model to take weights from: one whose embeddings are those of its network.

    Raises:
        UsageError: it is truncated or mirrored, has a projection or no image tower; otherwise as `load_model`.
    """
    model = load_model(spec, device=device, precision=precision)
    # a network's weights alone would embed otherwise than the named model
    if model.derived_from:
        raise UsageError(
            f"{spec} has no weights of its own: its embeddings are derived from those of "
            f"{model.derived_from}. Give that one."
        )
    if not model.embeds_images:
        raise UsageError(f"{spec} embeds texts only; give a model with an image tower.")
    return model


def _load_backward_compatible(folder: Path, device: str, precision: str) -> BackwardCompatibleModel:
    head = read_projection(folder)
    # by its path, since an upgrade folder holds only the projection
    base = load_model(head.model, device=device, precision=precision)
    if base.fingerprint != head.new:
        raise UsageError(
            f"{head.model} has changed since the head {folder} was fitted to it: its fingerprint was {head.new} and is "
            f"now {base.fingerprint}. Put the model back, or fit the head again."
        )
    return BackwardCompatibleModel.of(base, head, str(folder))


def choose_device(device: str) -> torch.device:
    """`auto` is a GPU where torch sees one.

    Raises:
        UsageError: there is no such device, or it cannot be used.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"There is no device {device!r}; give auto, cpu, cuda or cuda:1.") from error
    try:
        # torch accepts the name of a device it cannot use; this fails now rather than after the data is opened
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UsageError(f"torch sees no device {device!r} here ({reason}); give auto or cpu.") from error
    return chosen
