"""A model folder on disk, and MODEL as people write it: a folder or name of ours, of open_clip or of Hugging Face.

A model folder is in open_clip's own format where that can express the towers, with tokenizer and manifest.
"""

import dataclasses
import json
import logging
from pathlib import Path
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
from vlm.models.factory import ModelConfig, build_network, enable_padding_trim
from vlm.models.low_rank import LORA, merge_adapters
from vlm.models.model import VisionLanguageModel, space_fingerprint
from vlm.models.model_spec import CHECKPOINTS, CONFIG, LOCAL_PREFIX, RUN_MODEL, model_folder, split_model_spec
from vlm.models.pretrained import download_from_hub, is_hub_name, load_open_clip, load_open_clip_folder
from vlm.models.towers.tower_registry import portable_config
from vlm.models.variants import (
    BackwardCompatibleModel,
    TruncatedModel,
    is_projection_folder,
    read_projection,
)
from vlm.weight_packages import locate_weights

logger = logging.getLogger(__name__)

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
    - `package:all-minilm-l6-v2`: such a folder in an installed package (`vlm.weight_packages`);
    - `ORGANISATION/NAME` or `hf-hub:ORGANISATION/NAME`: such a folder or one of open_clip on the Hugging Face Hub;
    - `ViT-B-32:laion2b_s34b_b79k`, a name of open_clip with its weights (or a file of them); the name alone where there
      is one set of weights only.

    Any of them followed by `#64` keeps the first 64 dimensions.

    Raises:
        UsageError: there is no such model, or it has fewer dimensions. VlmError: its weights cannot be loaded.
    """
    whole_spec, num_dimensions = split_model_spec(spec)
    if num_dimensions is not None:
        whole = load_model(whole_spec, device=device, precision=precision)
        return TruncatedModel.of(whole, num_dimensions)

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
        UsageError: it is truncated, has a projection or no image tower; otherwise as `load_model`.
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
