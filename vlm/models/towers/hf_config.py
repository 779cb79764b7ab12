"""Hugging Face configurations: from a folder or a model type, kept inside our own."""

import json
from pathlib import Path
from typing import Any

from vlm.errors import UsageError
from vlm.models.towers.naming import nearest_of_many

_STATE_DROPOUT = ("hidden_dropout_prob", "dropout", "dropout_rate", "resid_pdrop", "embd_pdrop", "drop_rate")
# attention drops inside one fused operation, which cannot be told whose sample a weight is, so it is left out
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attention_drop_rate")


def read_hf(name: str) -> tuple[dict[str, Any], str]:
    """The configuration of a folder, and that folder if it holds weights; or the defaults of a model type (`bert`).

    Raises:
        UsageError: there is neither.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    folder = Path(name)
    if (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(name, local_files_only=True)
        return _values(config), str(folder.resolve()) if has_weights(folder) else ""
    if name in CONFIG_MAPPING:
        return _values(CONFIG_MAPPING[name]()), ""
    if folder.is_dir():
        raise UsageError(f"{name} is no Hugging Face folder: it has no config.json.")
    raise UsageError(
        f"hf:{name} is neither a folder nor a model type of transformers; "
        f"{nearest_of_many(name, sorted(CONFIG_MAPPING))} Nothing is downloaded: give a folder on this machine."
    )


def has_weights(folder: Path) -> bool:
    """Whether a Hugging Face folder holds weights."""
    return bool(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """Its files of weights."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def open_config(values: dict[str, Any], **changes: Any) -> Any:
    """The transformers configuration of saved values, with those of `changes` it has a place for.

    Where it has a value for each stage (CvT), numbers are given to all of them, and drop path rises to the last.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(**values)
    for key, value in changes.items():
        if not hasattr(config, key):
            continue
        stages = getattr(config, key)
        if isinstance(stages, list | tuple) and not isinstance(value, list | tuple):
            value = [0.0] * (len(stages) - 1) + [value] if key == "drop_path_rate" else [value] * len(stages)
        setattr(config, key, value)
    return config


def dropout_of(probability: float) -> dict[str, float]:
    """What a configuration is told of dropout, whatever its family calls it."""
    return {**{key: probability for key in _STATE_DROPOUT}, **{key: 0.0 for key in _ATTENTION_DROPOUT}}


def is_causal(values: dict[str, Any]) -> bool:
    """Whether the model reads from left to right only."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    named = " ".join(values.get("architectures") or ())
    if named:
        return "CausalLM" in named or "LMHead" in named or named.startswith("GPT2")
    return values["model_type"] in CAUSAL and values["model_type"] not in MASKED


def _values(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_string())
