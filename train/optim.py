"""AdamW with weight decay on matrices only, Muon in addition for the matrices inside a network, and their schedule.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; learning rates matched to AdamW's root
mean square as in Liu et al. 2025, "Muon is scalable for LLM training", eq. 4. `layer_rates` lets a pretrained tower's
early layers take smaller steps than its late ones.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from math import cos, pi
from typing import Any

import torch
from torch import nn

from vlm.models.low_rank import tower_of
from vlm.tensor_types import Tensor
from vlm.train.distributed import split_by_sharding
from vlm.train.run_config import OptimizerConfig

_BLOCK = re.compile(r"(?:resblocks|blocks|layers?|h)\.(\d+)\.")
_FIRST = re.compile(r"embed|conv1|ln_pre|pre_layrnorm|patch|stem|cls_token")


def layer_rates(network: nn.Module, decay: float) -> dict[str, float]:
    """The multiplier of the learning rate of each weight, by its name; 1 for those that are after the layers.

    The rate of a group of layers is `decay` times that of the group after it, and the last group's that of what comes
    after the trunk (Howard and Ruder 2018, ULMFiT, §3.2; BEiT, Bao et al. 2022, §A). Groups are timm's where a trunk
    has them, else blocks by their number, with embeddings before the first.
    """
    depths = _layer_depths(network)
    counts: dict[str, int] = {}
    for name, depth in depths.items():
        tower = tower_of(name)
        counts[tower] = max(counts.get(tower, 0), depth + 1)
    rates: dict[str, float] = {}
    for name, _ in network.named_parameters():
        # temperature, projections, heads and caption decoders have no depth
        above = counts[tower_of(name)] - depths[name] if name in depths else 0
        rates[name] = decay**above
    return rates


def _layer_depths(network: nn.Module) -> dict[str, int]:
    """The number of the group of layers each weight is in, from 0."""
    depths = _timm_depths(network)
    has_timm_trunk = bool(depths)
    for name, _ in network.named_parameters():
        if not tower_of(name) or (has_timm_trunk and name.startswith("visual.")):
            continue
        block = _BLOCK.search(name)
        if block:
            depths[name] = int(block[1]) + 1
        elif _FIRST.search(name):
            depths[name] = 0
    return depths


def _timm_depths(network: nn.Module) -> dict[str, int]:
    trunk: Any = getattr(getattr(network, "visual", None), "trunk", None)
    if not hasattr(trunk, "group_matcher"):
        return {}
    from timm.models import group_parameters

    depths: dict[str, int] = {}
    # timm numbers its groups, and leaves numbers out where a group has no weights
    groups = group_parameters(trunk, trunk.group_matcher())
    for depth, number in enumerate(sorted(groups)):
        for name in groups[number]:
            depths[f"visual.trunk.{name}"] = depth
    return depths


_PIXEL_CHANNELS = 3


class MuonWithAdamW(torch.optim.Optimizer):
    """Both as one optimizer, whose state and groups are those of the weights, saved and restored as any optimizer's.

    matrices: groups of what Muon updates; a kernel [O, I, …] is updated as the matrix [O, I · …].
    """

    def __init__(self, matrices: Sequence[dict[str, Any]], adamw: torch.optim.AdamW, **muon_options: Any) -> None:
        # torch's Muon takes matrices only
        flat_groups: list[dict[str, Any]] = []
        for group in matrices:
            flat_groups.append(group | {"params": list(map(_flat, group["params"]))})
        self.muon = torch.optim.Muon(flat_groups, **muon_options)
        self.adamw = adamw
        super().__init__([{"params": group["params"]} for group in (*matrices, *adamw.param_groups)], {})

        # the groups of this optimizer have Muon's settings, but hold the weights instead of their flat views
        muon_groups: list[dict[str, Any]] = []
        for muon_group, group in zip(self.muon.param_groups, matrices, strict=True):
            muon_groups.append(muon_group | {"params": group["params"]})
        self.param_groups = [*muon_groups, *adamw.param_groups]
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all weights."""
        # the flat views share the memory of the weights, but need their gradients, states and learning rates
        for muon_group, group in zip(self.muon.param_groups, self.param_groups, strict=False):
            # a schedule writes its rates into the groups of this optimizer, which torch's Muon does not read
            for name, value in group.items():
                if name != "params":
                    muon_group[name] = value
            for flat, weight in zip(muon_group["params"], group["params"], strict=True):
                flat.grad = None if weight.grad is None else _as_matrix(weight.grad, weight)
                self.muon.state[flat] = self.state[weight]
        self.muon.step()
        self.adamw.step()


def embedding_weight_names(network: nn.Module) -> set[str]:
    """Names of the weights that are looked up row by row: token embeddings, and positions held in modules."""
    names: set[str] = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            names.add(f"{name}.weight")
    return names


def is_hidden_matrix(name: str, weight: nn.Parameter) -> bool:
    """Whether a weight that is not an embedding maps features to features.

    Positions, gains, a single query, kernels of single channels and those that read pixels do not.
    """
    # positions are added, not multiplied: they map nothing
    if weight.ndim < 2 or "pos" in name.rpartition(".")[2]:
        return False
    if weight.ndim > 2:
        return weight.shape[0] > 1 and weight.shape[1] > _PIXEL_CHANNELS
    return min(weight.shape) > 1


def _flat(weight: nn.Parameter) -> nn.Parameter:
    """A view of the weight as a matrix."""
    return nn.Parameter(_as_matrix(weight.detach(), weight))


def _as_matrix(values: Tensor, weight: nn.Parameter) -> Tensor:
    """Values of a weight's shape as a matrix, its columns as the weight lies in memory: of the weight itself a view.

    In channels-last the channels of a pixel are adjacent. The order of columns changes nothing: Muon's update of a
    matrix with its columns exchanged is its update with these columns exchanged.
    """
    if weight.ndim == 4 and not weight.is_contiguous():
        values = values.permute(0, 2, 3, 1)
    return values.reshape(len(values), -1)


_LR_MULTIPLIER = "relative_rate"


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices, and without for gains, biases and temperature (as in CLIP §2.5).

    With `optimizer` "muon" the matrices inside the towers are updated by Muon. With a `layer_decay` the network is a
    training task, whose towers are known.
    """
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter
    tables = embedding_weight_names(network)
    # a task holds the network, and heads of its own beside it
    layers = layer_rates(network.get_submodule("network"), config.layer_decay) if config.layer_decay != 1 else {}
    rates = {name: layers.get(name.removeprefix("network."), 1.0) for name in trained}
    matrices: dict[float, list[nn.Parameter]] = {}
    if config.optimizer == "muon":
        for name, weight in list(trained.items()):
            if name not in tables and is_hidden_matrix(name, weight):
                matrices.setdefault(rates[name], []).append(trained.pop(name))
    adamw = _adamw(trained, tables, config, rates)
    groups: list[dict[str, Any]] = []
    for rate, parameters in matrices.items():
        for weights in split_by_sharding(parameters):
            if weights:
                groups.append({"params": weights, _LR_MULTIPLIER: rate})
    if not groups:
        return adamw
    return MuonWithAdamW(
        groups, adamw, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def _adamw(
    weights: Mapping[str, nn.Parameter], tables: Collection[str], config: OptimizerConfig, rates: Mapping[str, float]
) -> torch.optim.AdamW:
    by_settings: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in weights.items():
        # pulling gains towards 0 would shrink activations, and a bias has no scale to regularise
        decay = config.weight_decay if weight.ndim >= 2 else 0.0
        multiplier = rates[name] * _lr_multiplier(name, weight, tables, config)
        by_settings.setdefault((decay, multiplier), []).append(weight)

    groups: list[dict[str, Any]] = []
    for (decay, multiplier), parameters in by_settings.items():
        for params in split_by_sharding(parameters):
            if params:
                groups.append({"params": params, "weight_decay": decay, _LR_MULTIPLIER: multiplier})
    # fused: one kernel for all weights of a group, which must then be all sharded or all whole
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


def _lr_multiplier(name: str, weight: nn.Parameter, tables: Collection[str], config: OptimizerConfig) -> float:
    if name.endswith(("logit_scale", "logit_bias")):
        return config.temperature_rate
    if name in tables:
        return config.table_rate
    if weight.ndim < 2:
        return config.gain_rate
    return config.kernel_rate if weight.ndim > 2 else 1.0


def learning_rate_at(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Linear warm-up from zero, then half a cosine down to zero at `total_steps`.

    >>> config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    >>> [round(learning_rate_at(step, config, 110), 3) for step in (0, 9, 60, 110)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if step < config.warmup_steps:
        # step + 1, since a first step at rate 0 would be lost
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + cos(pi * min(progress, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate, times each group's multiplier, in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_LR_MULTIPLIER]
