"""Low-rank adapters (LoRA, Hu et al. 2022) in the towers of a network, by peft: W + α/r · B A; only A and B learn.

A configuration says that its network has adapters (the key `lora`), so that a checkpoint is built, filled and read as
any other network is; what is read from it, and the final model, has them merged and is in the format of its base.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from vlm.errors import UsageError
from vlm.models.network import Network
from vlm.models.towers.tower import batch_norm_layers, freeze_batch_norm
from vlm.tensor_types import Tensor

LORA = "lora"
"""The key of a configuration whose network has adapters."""
FACTOR_A = ".lora_A."
"""Part of the names of A, which is random from the start; what was learned is in B, zero at first."""
DECODER = "text_decoder"
"""Where the names of a caption decoder's weights begin."""
# the others are of Hugging Face's dual encoders
_IMAGE_PARTS = ("visual", "trunk.vision", "trunk.visual")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Adapters of rank r, scaled by α/r, in the towers named: `visual`, `text`."""

    rank: int
    alpha: float
    towers: tuple[str, ...] = ("visual", "text")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LowRank":
        """The adapters of a configuration that has the key."""
        values = config[LORA]
        return cls(rank=values["rank"], alpha=values["alpha"], towers=tuple(values["towers"]))

    def to_config(self) -> dict[str, Any]:
        """For a configuration."""
        return {LORA: asdict(self) | {"towers": list(self.towers)}}


def add_adapters(network: Network, settings: LowRank) -> None:
    """Give the matrices of the towers adapters, in place; all other weights but the temperature are frozen.

    Adapted are linear layers, the projections of attention, and convolutions of one pixel. Fresh adapters change no
    output. A is drawn from torch's global generator.

    Raises:
        UsageError: peft is not installed, or there is no such matrix.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise UsageError("--lora-rank needs peft: pip install 'vlm-pipeline[lora]'.") from error

    layers = adapted_layers(network, settings.towers)
    if not layers:
        raise UsageError(f"lora_rank = {settings.rank}: the towers have no matrices to adapt; leave it out.")
    device = network.get_parameter("logit_scale").device
    matrices: list[str] = []
    for name in layers:
        module = network.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention):
            _replace(network, name, AdaptedAttention(module, settings))
        else:
            matrices.append(name)
    if matrices:
        options = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=matrices)  # pyright: ignore[reportArgumentType]
        LoraModel(network, {"default": options}, "default")
    network.to(device)
    for name, parameter in network.named_parameters():
        # a number is no matrix, and a decoder is no tower
        is_trained = "lora_" in name or name in ("logit_scale", "logit_bias") or name.startswith(DECODER)
        parameter.requires_grad_(is_trained)
    # frozen weights with moving statistics would be another network
    freeze_batch_norm(network, _batch_norms(network, settings.towers))


def adapted_layers(network: nn.Module, towers: tuple[str, ...]) -> list[str]:
    """Names of the layers that get adapters."""
    names: list[str] = []
    inside: set[str] = set()
    for name, module in network.named_modules():
        if not name or tower_of(name) not in towers or name in inside:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside.add(f"{name}.out_proj")
            names.append(name)
        elif isinstance(module, nn.Linear) or _is_pointwise(module):
            names.append(name)
    return names


class AdaptedAttention(nn.Module):
    """An attention of torch with adapters for both of its matrices.

    peft's own layer (0.21.2) applies the adapter of the output projection twice, and adds and subtracts the products at
    each pass, so that rounding makes the frozen weights wander off.
    """

    def __init__(self, attention: nn.MultiheadAttention, settings: LowRank) -> None:
        super().__init__()
        width = attention.embed_dim
        self.base_layer = attention
        self.scale = settings.alpha / settings.rank
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        for name, rows in (("in_proj", 3 * width), ("out_proj", width)):
            self.lora_A[name] = nn.Linear(width, settings.rank, bias=False)
            self.lora_B[name] = nn.Linear(settings.rank, rows, bias=False)
            # as peft draws them
            nn.init.kaiming_uniform_(self.lora_A[name].get_parameter("weight"), a=5**0.5)
            nn.init.zeros_(self.lora_B[name].get_parameter("weight"))

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """As of the attention, with the adapted matrices."""
        return functional_call(self.base_layer, self.weights(), arguments, named)

    def weights(self) -> dict[str, Tensor]:
        """The adapted matrices by their names in the attention."""
        adapted: dict[str, Tensor] = {}
        for name, layer in (("in_proj_weight", "in_proj"), ("out_proj.weight", "out_proj")):
            product = self.lora_B[layer].get_parameter("weight") @ self.lora_A[layer].get_parameter("weight")
            adapted[name] = self.base_layer.get_parameter(name) + self.scale * product
        return adapted

    @torch.no_grad()
    def merge(self) -> None:
        """Make the adapted matrices those of the attention."""
        for name, weight in self.weights().items():
            self.base_layer.get_parameter(name).copy_(weight)

    def get_base_layer(self) -> nn.MultiheadAttention:
        """The attention."""
        return self.base_layer


def merge_adapters(network: Network, config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the adapters to the weights they are for, in place, and take them out; returns the configuration without."""
    from peft.tuners.lora import LoraLayer

    # a list, since a network must not change while it is walked
    for name, module in list(network.named_modules()):
        if not isinstance(module, LoraLayer | AdaptedAttention):
            continue
        layer: Any = module
        layer.merge()
        _replace(network, name, layer.get_base_layer())
    network.requires_grad_(True)
    return {key: value for key, value in config.items() if key != LORA}


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def tower_of(name: str) -> str:
    """The tower of a weight or layer, `visual` or `text`; empty for a caption decoder, which is in neither.

    open_clip's CLIP keeps the parts of its text tower in itself.
    """
    if name.startswith(DECODER):
        return ""
    return "visual" if name.startswith(_IMAGE_PARTS) else "text"


def _batch_norms(network: nn.Module, towers: tuple[str, ...]) -> list[str]:
    return [name for name in batch_norm_layers(network) if tower_of(name) in towers]
