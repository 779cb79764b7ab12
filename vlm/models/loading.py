"""MODEL as people write it: a run folder, a model folder, an upgrade folder, or an open_clip name."""

from pathlib import Path

import torch

from vlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer, open_tokenizer
from vlm.data.views import FixedView
from vlm.errors import UsageError, VlmError
from vlm.models.compatible import CompatibleModel, is_upgrade, read_head
from vlm.models.encoder import VisionLanguageModel
from vlm.models.folder import CONFIG, load_model_folder
from vlm.models.prefix import PrefixModel, split_spec
from vlm.models.short_texts import accept_short_texts

RUN_MODEL = "model"
CHECKPOINTS = "checkpoints"


def load_model(spec: str, *, device: str = "auto", precision: str = "fp32") -> VisionLanguageModel:
    """The model named by a run folder (its final model, else its newest checkpoint), a model folder, an upgrade
    folder (the new model with the head on top), or an open_clip name with its weights (`ViT-B-32:laion2b_s34b_b79k`).
    Any of them followed by `#64` keeps the first 64 dimensions.

    Raises:
        UsageError: there is no such model, or it has fewer dimensions. VlmError: its weights cannot be had.
    """
    where, dtype = choose_device(device), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    whole, kept = split_spec(spec)
    if kept is not None:
        return PrefixModel.of(load_model(whole, device=device, precision=precision), kept)
    path = Path(spec)
    if is_upgrade(path):
        return _load_upgraded(path, device, precision)
    if path.is_dir():
        return load_model_folder(_model_folder(path), where, dtype)
    if ":" not in spec:
        raise UsageError(
            f"There is no model {spec!r}: give a run folder, a model folder, or NAME:WEIGHTS of open_clip."
        )
    return _load_pretrained(spec, where, dtype)


def load_network(spec: str, *, device: str = "auto", precision: str = "fp32") -> VisionLanguageModel:
    """A model to take weights from: one whose embeddings are those of its network.

    Raises:
        UsageError: it is a prefix or has a head; otherwise as `load_model`.
    """
    model = load_model(spec, device=device, precision=precision)
    if model.made_of:
        raise UsageError(
            f"{spec} has no weights of its own: its embeddings are made of those of {model.made_of}. Give that one."
        )
    return model


def _load_upgraded(folder: Path, device: str, precision: str) -> CompatibleModel:
    head = read_head(folder)
    base = load_model(head.model, device=device, precision=precision)
    if base.fingerprint != head.new:
        raise UsageError(
            f"{head.model} has changed since the head {folder} was fitted to it: its fingerprint was {head.new} and is "
            f"now {base.fingerprint}. Put the model back, or fit the head again."
        )
    return CompatibleModel.of(base, head, str(folder))


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
        trims_text=accept_short_texts(network),
    )


def _tokenizer_of(config: dict) -> Tokenizer:
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text:
        return HuggingFaceTokenizer(text["hf_tokenizer_name"], text.get("context_length", 77))
    return open_tokenizer("clip", text.get("context_length"))
