"""Towers on transformers: any vision model, and any encoder or causal language model, from a folder or a model type.

A folder's weights start a fresh network; a model type (CvT, PVT, DiNAT, bert) starts with random ones. The transformers
configuration is kept inside our own, so that a model folder needs no other file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.errors import UsageError, VlmError
from vlm.model_spec import locate_weights
from vlm.models.towers.pooling import Features, as_tokens, probe_trunk
from vlm.models.towers.tower import ImageTower, TextTower, pool_states, projection, residual_head, text_mask
from vlm.models.towers.tower_config import ImageTowerConfig, TextTowerConfig, suggest_names
from vlm.tensor_types import Float, Int64, Tensor

_STATE_DROPOUT = ("hidden_dropout_prob", "dropout", "dropout_rate", "resid_pdrop", "embd_pdrop", "drop_rate")
# attention dropout is inside one fused operation, where `PerSampleDropout` cannot replace it, so it is disabled
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attention_drop_rate")


def read_hf_config(name: str) -> tuple[dict[str, Any], str]:
    """The configuration of a folder, and that folder if it holds weights; or the defaults of a model type (`bert`).

    Raises:
        UsageError: there is neither.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    name = locate_weights(name)
    folder = Path(name)
    if (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(name, local_files_only=True)
        return _values(config), str(folder.resolve()) if has_weights(folder) else ""
    if name in CONFIG_MAPPING:
        return _values(CONFIG_MAPPING[name]()), ""
    if folder.is_dir():
        raise UsageError(f"{name} is not a Hugging Face folder: it has no config.json.")
    raise UsageError(
        f"hf:{name} is neither a folder nor a model type of transformers; "
        f"{suggest_names(name, sorted(CONFIG_MAPPING))} Nothing is downloaded: give a folder on this machine."
    )


def hf_preprocess(folder: str) -> dict[str, Any]:
    """Channel statistics that a folder's weights were trained with, as keys of a `preprocess_cfg`; empty if untold."""
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    known = {"mean": values.get("image_mean"), "std": values.get("image_std")}
    return {key: value for key, value in known.items() if value}


def has_weights(folder: Path) -> bool:
    """Whether a Hugging Face folder holds weights."""
    return bool(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """Its files of weights."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def build_hf_config(values: dict[str, Any], **changes: Any) -> Any:
    """The transformers configuration of saved values, with those of `changes` it has a key for.

    If it has a value for each stage (CvT), numbers apply to all of them, and drop path to the last.
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


def dropout_settings(probability: float) -> dict[str, float]:
    """The dropout settings of a configuration, whatever its model family calls them."""
    settings: dict[str, float] = dict.fromkeys(_STATE_DROPOUT, probability)
    return settings | dict.fromkeys(_ATTENTION_DROPOUT, 0.0)


def is_causal(values: dict[str, Any]) -> bool:
    """Whether the model reads from left to right only."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    named = " ".join(values.get("architectures") or ())
    # what the weights were saved as says more than what the model type can be
    if named:
        return "CausalLM" in named or "LMHead" in named or named.startswith("GPT2")
    return values["model_type"] in CAUSAL and values["model_type"] not in MASKED


def _values(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_string())


# of models whose configuration names no size, such as CvT
_SIZE = 224


class HuggingFaceImageTower(ImageTower):
    """A vision model of transformers. Its own pooling is the class token where there is one, else the mean patch."""

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Features:
        """The last hidden state, with the class token before the patches where it is given apart (CvT)."""
        return _features(self.trunk, pixels)

    def native(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
        """The class token, or the mean patch."""
        return self.native_of(self.features(pixels))

    def native_of(self, features: Features) -> Float[Tensor, "B F"]:
        """The same of the last hidden state."""
        tokens = as_tokens(features, self.trunk_info.layouts)[0]
        return tokens.prefix[:, 0] if tokens.prefix.shape[1] else tokens.patches.mean(dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, as the trunk does it.

        Raises:
            UsageError: the trunk cannot.
        """
        trunk: Any = self.trunk
        set_checkpointing(trunk, enable)


def build_hf_image(config: ImageTowerConfig, name: str, embed_dim: int) -> ImageTower:
    """`hf:FOLDER` or `hf:TYPE`; the weights are those of `initial_weights` if that is given, else fresh.

    Raises:
        UsageError: the model cannot be built, or not at that size. VlmError: the weights cannot be read.
    """
    if config.patch_dropout or config.registers or config.overrides:
        raise UsageError(f"{config.tower} has neither patch dropout, registers nor overrides; choose a timm tower.")
    changes: dict[str, Any] = dropout_settings(config.dropout)
    changes |= {"image_size": config.image_size, "drop_path_rate": config.drop_path}
    hf_config = build_hf_config(config.hf_config, **changes)
    if config.drop_path and not hasattr(hf_config, "drop_path_rate"):
        raise UsageError(f"{config.tower} has no drop path; leave --drop-path at 0.")
    build = fresh_builder(hf_config, config.tower)
    trunk_info = probe_trunk(
        build,
        _features,
        _mean,
        name=config.tower,
        image_size=config.image_size,
        own_size=hf_image_size(config.hf_config),
    )
    trunk = load_weights(hf_config, config.initial_weights) if config.initial_weights else build()
    return HuggingFaceImageTower(trunk, config, trunk_info, embed_dim, has_class_token=True)


def fresh_builder(hf_config: Any, tower: str) -> Callable[[], nn.Module]:
    """A function that makes the model of a configuration, without a pooling layer of its own where it can be left out.

    Raises, when called:
        UsageError: a library the model needs is missing (natten for DiNAT), or it is not a model of this kind.
    """
    from transformers import AutoModel

    def build() -> nn.Module:
        try:
            return AutoModel.from_config(hf_config, add_pooling_layer=False, dtype=torch.float32)
        # not every class of models has the argument
        except TypeError:
            return AutoModel.from_config(hf_config, dtype=torch.float32)
        except ImportError as error:
            raise UsageError(f"{tower} cannot be built here: {' '.join(str(error).split())}") from error

    return build


def load_weights(hf_config: Any, folder: str) -> nn.Module:
    """The model with the weights of a folder on this machine.

    Raises:
        VlmError: they cannot be read.
    """
    from transformers import AutoModel

    options: dict[str, Any] = {"config": hf_config, "dtype": torch.float32, "local_files_only": True}
    try:
        try:
            return AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)
        except TypeError:
            return AutoModel.from_pretrained(folder, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise VlmError(
            f"The weights of {folder} do not fit the configuration ({error}); an image size other than theirs is "
            "one cause."
        ) from error


def set_checkpointing(trunk: Any, enable: bool) -> None:
    """Turn gradient checkpointing of a transformers model on or off.

    Raises:
        UsageError: it has none.
    """
    try:
        if enable:
            # the reentrant kind gives no gradients where no input needs one, and pixels and tokens do not
            trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            trunk.gradient_checkpointing_disable()
    except ValueError as error:
        raise UsageError(f"{type(trunk).__name__} has no gradient checkpointing; leave it out.") from error


def hf_image_size(values: dict[str, Any]) -> int:
    """The image size of a configuration."""
    size = values.get("image_size", _SIZE)
    return int(size) if isinstance(size, int) else int(size[0])


def _features(trunk: Any, pixels: Tensor) -> Features:
    outputs = trunk(pixels)
    states = outputs.last_hidden_state
    class_token = getattr(outputs, "cls_token_value", None)
    if class_token is None:
        return states
    return torch.cat([class_token, states.flatten(2).transpose(1, 2)], dim=1)


def _mean(trunk: Any, pixels: Tensor) -> Tensor:
    states = _features(trunk, pixels)
    assert isinstance(states, torch.Tensor)
    # [B, C, H, W], unless the last dimension is that of the channels
    is_map = states.ndim == 4 and states.shape[3] != getattr(trunk.config, "hidden_size", None)
    return states.mean(dim=(2, 3)) if is_map else states.flatten(1, -2).mean(dim=1)


class HuggingFaceTextTower(TextTower):
    """States of a language model over the tokens, pooled and projected; of encoder-decoders the encoder alone.

    Positions are counted from the start of the row, so rows are padded at their end.
    """

    def __init__(self, trunk: Any, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.pad_id = config.pad_id
        self.pooling = config.pooling
        width = int(trunk.config.hidden_size)
        self.head = projection(width, config.hidden, embed_dim)
        if config.residual:
            self.head = residual_head(width, config.residual, embed_dim, config.head_dropout)

    def embed(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B F"]:
        """What the trunk makes of texts, pooled: all that a frozen trunk is run for."""
        mask = text_mask(tokens, self.pad_id)
        states = self.trunk(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return pool_states(states, mask, self.pooling)

    def project(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """Pooled features to vectors of the joint space, not normalised."""
        return self.head(features)

    def forward(self, tokens: Int64[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """Vectors of the joint space, not normalised."""
        return self.project(self.embed(tokens))

    def trunk_parameters(self) -> dict[str, nn.Parameter]:
        """The language model's; the projection is trained all the same."""
        return dict(self.trunk.named_parameters())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, as the language model does it."""
        set_checkpointing(self.trunk, enable)


def build_hf_text(config: TextTowerConfig, name: str, embed_dim: int) -> TextTower:
    """`hf:FOLDER` or `hf:TYPE`; the weights are those of `initial_weights` if that is given, else fresh.

    A vocabulary larger than the model's (a padding token was added) gets new entries at its end.

    Raises:
        UsageError: the model cannot be built, or reads fewer tokens than a caption may have.
    """
    changes: dict[str, Any] = dropout_settings(config.dropout) | {"use_cache": False}
    hf_config = build_hf_config(config.hf_config, **changes)
    check_length(config.tower, hf_config, config.context_length)
    if config.initial_weights:
        trunk: Any = load_weights(hf_config, config.initial_weights)
    else:
        trunk = fresh_builder(hf_config, config.tower)()
    # the decoder would need a target to read
    if getattr(hf_config, "is_encoder_decoder", False):
        trunk = trunk.get_encoder()
    if config.vocab_size > trunk.get_input_embeddings().weight.shape[0]:
        # mean_resizing draws from a covariance of all embeddings, which is slow for large vocabularies
        trunk.resize_token_embeddings(config.vocab_size, mean_resizing=False)
    return HuggingFaceTextTower(trunk, config, embed_dim)


def check_length(tower: str, hf_config: Any, length: int) -> None:
    """Check that captions are not longer than the model has positions for.

    Raises:
        UsageError: they are.
    """
    longest = getattr(hf_config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise UsageError(f"{tower} reads {longest} tokens and not {length}; give --context-length {longest} or less.")


def default_pooling(values: dict[str, Any]) -> str:
    """The last state of a causal model, which alone has seen the whole text; the mean of the others."""
    return "last" if is_causal(values) else "mean"
