"""Image towers on transformers: any vision model by folder, or by model type with fresh weights (CvT, PVT, DiNAT)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlm.errors import UsageError, VlmError
from vlm.models.towers.config import ImageTowerConfig
from vlm.models.towers.features import Features, as_tokens, measure
from vlm.models.towers.hf_config import dropout_of, open_config
from vlm.models.towers.image import ImageTower
from vlm.tensors import Float, Tensor

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
        tokens = as_tokens(features, self.measured.layouts)[0]
        return tokens.prefix[:, 0] if tokens.prefix.shape[1] else tokens.patches.mean(dim=1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the trunk does it.

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
    changes: dict[str, Any] = dropout_of(config.dropout)
    changes |= {"image_size": config.image_size, "drop_path_rate": config.drop_path}
    hf_config = open_config(config.hf_config, **changes)
    if config.drop_path and not hasattr(hf_config, "drop_path_rate"):
        raise UsageError(f"{config.tower} has no drop path; leave --drop-path at 0.")
    build = fresh_builder(hf_config, config.tower)
    measured = measure(
        build,
        _features,
        _mean,
        name=config.tower,
        image_size=config.image_size,
        own_size=hf_size(config.hf_config),
    )
    trunk = load_weights(hf_config, config.initial_weights) if config.initial_weights else build()
    return HuggingFaceImageTower(trunk, config, measured, embed_dim, has_class_token=True)


def fresh_builder(hf_config: Any, tower: str) -> Callable[[], nn.Module]:
    """A function that makes the model of a configuration, without a pooling layer of its own where it can be left out.

    Raises, when called:
        UsageError: a library the model needs is not there (natten for DiNAT), or it is no model of this kind.
    """
    from transformers import AutoModel

    def build() -> nn.Module:
        try:
            return AutoModel.from_config(hf_config, add_pooling_layer=False, dtype=torch.float32)
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
            f"The weights of {folder} cannot be read as they are asked for ({error}); an image size other than "
            "theirs is one cause."
        ) from error


def set_checkpointing(trunk: Any, enable: bool) -> None:
    """Turn gradient checkpointing of a transformers model on or off.

    Raises:
        UsageError: it has none.
    """
    try:
        if enable:
            trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            trunk.gradient_checkpointing_disable()
    except ValueError as error:
        raise UsageError(f"{type(trunk).__name__} has no gradient checkpointing; leave it out.") from error


def hf_size(values: dict[str, Any]) -> int:
    """The side of the pictures a configuration is for."""
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
    assert isinstance(states, Tensor)
    is_map = states.ndim == 4 and states.shape[3] != getattr(trunk.config, "hidden_size", None)
    return states.mean(dim=(2, 3)) if is_map else states.flatten(1, -2).mean(dim=1)
