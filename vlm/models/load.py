"""A model folder on disk, and MODEL as people write it: a run, model or upgrade folder, or an open_clip name.

A model folder is in open_clip's own format where that can express the towers, with tokenizer and manifest.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer, open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.files import write_text
from vlm.manifest import Manifest, is_complete, read_manifest, record_file, write_manifest
from vlm.models.factory import ModelConfig, build_network, enable_padding_trim
from vlm.models.model import VisionLanguageModel, space_fingerprint
from vlm.models.model_spec import split_model_spec
from vlm.models.towers.tower_registry import portable_config
from vlm.models.variants import (
    BackwardCompatibleModel,
    TruncatedModel,
    is_projection_folder,
    read_projection,
)

CONFIG = "open_clip_config.json"
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
    write_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")


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
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config = values["model_cfg"]
    text = config["text_cfg"]
    # folders that open_clip wrote hold no tokenizer: CLIP's is meant, unless the configuration names another
    source = "clip" if not _has_tokenizer(folder) and "hf_tokenizer_name" not in text else str(folder)
    network = build_network(config)
    try:
        network.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, FileNotFoundError) as error:
        raise VlmError(f"The weights of {folder} cannot be read: {error}") from error
    model = VisionLanguageModel(
        name=str(folder),
        network=network.eval().to(device),
        config=config,
        view=EvalTransform.from_preprocess(
            {"size": config["vision_cfg"]["image_size"], **values.get("preprocess_cfg", {})}
        ),
        tokenizer=open_tokenizer(source, text.get("context_length")),
        device=device,
        precision=precision,
        trims_padding=enable_padding_trim(network),
    )
    # a folder that open_clip wrote has no manifest to compare with
    if is_complete(folder) and read_manifest(folder, "model").fingerprint != model.fingerprint:
        raise VlmError(
            f"{folder} is not what its manifest says: weights, view or tokenizer were changed. Save it again."
        )
    return model


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("vlm_tokenizer.json", "tokenizer.json", "tokenizer_config.json"))


RUN_MODEL = "model"
CHECKPOINTS = "checkpoints"


def load_model(spec: str, *, device: str = "auto", precision: str = "fp32") -> VisionLanguageModel:
    """The model named by a run folder (its final model, else its newest checkpoint), a model folder, an upgrade
    folder (the new model with the head on top), or an open_clip name with its weights (`ViT-B-32:laion2b_s34b_b79k`).
    Any of them followed by `#64` keeps the first 64 dimensions.

    Raises:
        UsageError: there is no such model, or it has fewer dimensions. VlmError: its weights cannot be loaded.
    """
    whole_spec, num_dimensions = split_model_spec(spec)
    if num_dimensions is not None:
        whole = load_model(whole_spec, device=device, precision=precision)
        return TruncatedModel.of(whole, num_dimensions)

    torch_device = choose_device(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    path = Path(spec)
    if is_projection_folder(path):
        return _load_backward_compatible(path, device, precision)
    if path.is_dir():
        return load_model_folder(_model_folder(path), torch_device, dtype)
    if ":" not in spec:
        raise UsageError(
            f"There is no model {spec!r}: give a run folder, a model folder, or NAME:WEIGHTS of open_clip."
        )
    return _load_pretrained(spec, torch_device, dtype)


def load_network(spec: str, *, device: str = "auto", precision: str = "fp32") -> VisionLanguageModel:
    """A model to take weights from: one whose embeddings are those of its network.

    Raises:
        UsageError: it is truncated or has a projection; otherwise as `load_model`.
    """
    model = load_model(spec, device=device, precision=precision)
    # a network's weights alone would embed otherwise than the named model
    if model.derived_from:
        raise UsageError(
            f"{spec} has no weights of its own: its embeddings are derived from those of "
            f"{model.derived_from}. Give that one."
        )
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


def _model_folder(folder: Path) -> Path:
    if (folder / CONFIG).is_file():
        return folder
    if (folder / RUN_MODEL / CONFIG).is_file():
        return folder / RUN_MODEL
    checkpoints = sorted((folder / CHECKPOINTS).glob("step-*"))
    if not checkpoints:
        raise UsageError(f"{folder} holds no model: neither {CONFIG}, nor {RUN_MODEL}/, nor {CHECKPOINTS}/step-*.")
    # a run in progress has no final model yet; names sort by step
    return checkpoints[-1]


def _load_pretrained(spec: str, device: torch.device, precision: torch.dtype) -> VisionLanguageModel:
    import open_clip

    name, _, tag = spec.partition(":")
    config = open_clip.get_model_config(name)
    if config is None or tag not in open_clip.list_pretrained_tags_by_model(name):
        known = [f"{model}:{weights}" for model, weights in open_clip.list_pretrained()]
        near = [entry for entry in known if entry.startswith(name)][:5] or known[:5]
        raise UsageError(f"open_clip has no {spec!r}; it has for example {', '.join(near)}.")
    try:
        # output_dict, so that its forward pass gives names as ours do
        network: Any = open_clip.create_model(name, pretrained=tag, device=device, output_dict=True)
        tokenizer = _tokenizer_of(config)
    except (OSError, RuntimeError) as error:
        raise VlmError(f"The weights of {spec} are neither cached nor within reach of the network: {error}") from error
    preprocess = open_clip.get_model_preprocess_cfg(network)
    return VisionLanguageModel(
        name=spec,
        network=network.eval(),
        config=config,
        view=EvalTransform.from_preprocess(preprocess),
        tokenizer=tokenizer,
        device=device,
        precision=precision,
        trims_padding=enable_padding_trim(network),
    )


def _tokenizer_of(config: dict) -> Tokenizer:
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text:
        return HuggingFaceTokenizer(text["hf_tokenizer_name"], text.get("context_length", 77))
    return open_tokenizer("clip", text.get("context_length"))
