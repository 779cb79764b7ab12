"""The model folder: open_clip's own format where it can say the towers, with tokenizer, fingerprint and manifest."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vlm.data.tokenizers import Tokenizer, open_tokenizer
from vlm.data.views import FixedView
from vlm.errors import UsageError, VlmError
from vlm.files import write_text
from vlm.manifest import Manifest, is_complete, read_manifest, record_file, write_manifest
from vlm.models.encoder import VisionLanguageModel, space_fingerprint
from vlm.models.network import ModelConfig, build_network
from vlm.models.short_texts import accept_short_texts
from vlm.models.towers.portable import config_to_save

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"


def save_model(
    folder: Path,
    *,
    weights: dict[str, torch.Tensor],
    config: ModelConfig,
    view: FixedView,
    tokenizer: Tokenizer,
) -> None:
    """Write the files that `open_clip.create_model_and_transforms("local-dir:FOLDER")` reads, and the tokenizer's.

    Towers that open_clip's format cannot say are named by a `tower` key, which open_clip refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save(folder)
    values = {"model_cfg": config_to_save(config, weights), "preprocess_cfg": view.to_preprocess()}
    write_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")


def save_model_folder(folder: Path, model: VisionLanguageModel, *, inputs: dict[str, str]) -> None:
    """Write a whole model folder with its manifest."""
    save_model(
        folder,
        weights=model.network.state_dict(),
        config=model.config,
        view=model.view,
        tokenizer=model.tokenizer,
    )
    fingerprint = space_fingerprint(model.network, model.view, model.tokenizer)
    files = {path.name: record_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    files.pop("manifest.json", None)
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
        UsageError: it is no model folder. VlmError: its weights are damaged, or are not those of its manifest.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is no model folder: it has no {CONFIG}.")
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config = values["model_cfg"]
    text = config["text_cfg"]
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
        view=FixedView.from_preprocess(
            {"size": config["vision_cfg"]["image_size"], **values.get("preprocess_cfg", {})}
        ),
        tokenizer=open_tokenizer(source, text.get("context_length")),
        device=device,
        precision=precision,
        trims_text=accept_short_texts(network),
    )
    if is_complete(folder) and read_manifest(folder, "model").fingerprint != model.fingerprint:
        raise VlmError(
            f"{folder} is not what its manifest says: weights, view or tokenizer were changed. Save it anew."
        )
    return model


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("vlm_tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
