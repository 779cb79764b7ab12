"""AdamW with decay on matrices only, or Muon beside it, and the schedule as a pure function of the step."""

from collections.abc import Collection, Mapping
from math import cos, log, pi

import torch
from torch import nn

from vlm.train.config import OptimizerConfig
from vlm.train.muon import MuonWithAdamW, is_hidden_matrix, tables_of
from vlm.train.sharding import by_kind

MAX_LOG_SCALE = log(100)
"""The temperature is kept from falling below 0.01 (CLIP §2.5)."""

_RELATIVE_RATE = "relative_rate"


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices, and without for gains, biases and temperature (as in CLIP §2.5).

    With `optimizer` "muon" the matrices inside the towers are Muon's.
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    tables = tables_of(network)
    hidden = [name for name, weight in trained.items() if name not in tables and is_hidden_matrix(name, weight)]
    matrices = [trained.pop(name) for name in hidden] if config.optimizer == "muon" else []
    adamw = _adamw(trained, tables, config)
    if not matrices:
        return adamw
    groups = [{"params": weights, _RELATIVE_RATE: 1.0} for weights in by_kind(matrices) if weights]
    return MuonWithAdamW(
        groups, adamw, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


def _adamw(weights: Mapping[str, nn.Parameter], tables: Collection[str], config: OptimizerConfig) -> torch.optim.AdamW:
    sorts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in weights.items():
        decay = config.weight_decay if weight.ndim >= 2 else 0.0
        sorts.setdefault((decay, _relative_rate(name, weight, tables, config)), []).append(weight)
    groups = [
        {"params": kind, "weight_decay": decay, _RELATIVE_RATE: rate}
        for (decay, rate), parameters in sorts.items()
        for kind in by_kind(parameters)
        if kind
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


def _relative_rate(name: str, weight: nn.Parameter, tables: Collection[str], config: OptimizerConfig) -> float:
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
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + cos(pi * min(share, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this rate, and those relative to it, in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_RELATIVE_RATE]


@torch.no_grad()
def limit_temperature(network: nn.Module) -> None:
    """Cut the learned log of the inverse temperature at MAX_LOG_SCALE."""
    network.get_parameter("logit_scale").clamp_(max=MAX_LOG_SCALE)
