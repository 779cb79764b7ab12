"""MODEL as people write it: a run folder, a model folder, or an open_clip name."""

from pathlib import Path

import torch

from vlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer, open_tokenizer
from vlm.data.views import FixedView
from vlm.errors import UsageError, VlmError
from vlm.models.encoder import VisionLanguageModel
from vlm.models.folder import CONFIG, load_model_folder

RUN_MODEL = "model"
CHECKPOINTS = "checkpoints"


def load_model(spec: str, *, device: str = "auto", precision: str = "fp32") -> VisionLanguageModel:
    """The model named by a run folder (its final model, else its newest checkpoint), a model folder, or an
    open_clip name with its weights (`ViT-B-32:laion2b_s34b_b79k`).

    Raises:
        UsageError: there is no such model. VlmError: its weights cannot be had.
    """
    where, dtype = choose_device(device), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    path = Path(spec)
    if path.is_dir():
        return load_model_folder(_model_folder(path), where, dtype)
    if ":" not in spec:
        raise UsageError(
            f"There is no model {spec!r}: give a run folder, a model folder, or NAME:WEIGHTS of open_clip."
        )
    return _load_pretrained(spec, where, dtype)


def choose_device(device: str) -> torch.device:
    """`auto` is a GPU where torch sees one."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _model_folder(folder: Path) -> Path:
    if (folder / CONFIG).is_file():
        return folder
    if (folder / RUN_MODEL / CONFIG).is_file():
        return folder / RUN_MODEL
    checkpoints = sorted((folder / CHECKPOINTS).glob("step-*"))
    if not checkpoints:
        raise UsageError(f"{folder} holds no model: neither {CONFIG}, nor {RUN_MODEL}/, nor {CHECKPOINTS}/step-*.")
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
        network = open_clip.create_model(name, pretrained=tag, device=device, output_dict=True)
        tokenizer = _tokenizer_of(config)
    except (OSError, RuntimeError) as error:
        raise VlmError(f"The weights of {spec} are neither cached nor within reach of the network: {error}") from error
    preprocess = open_clip.get_model_preprocess_cfg(network)
    return VisionLanguageModel(
        name=spec,
        network=network.eval(),
        config=config,
        view=FixedView.from_preprocess(preprocess),
        tokenizer=tokenizer,
        device=device,
        precision=precision,
    )


def _tokenizer_of(config: dict) -> Tokenizer:
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text:
        return HuggingFaceTokenizer(text["hf_tokenizer_name"], text.get("context_length", 77))
    return open_tokenizer("clip", text.get("context_length"))
