"""AdamW with decay on matrices only, and the schedule as a pure function of the step."""

from math import cos, log, pi

import torch
from torch import nn

from vlm.train.config import OptimizerConfig
from vlm.train.sharding import by_kind

MAX_LOG_SCALE = log(100)
"""The temperature is kept from falling below 0.01 (CLIP §2.5)."""


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices, and without for gains, biases and temperature (as in CLIP §2.5)."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": kind, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (others, 0.0))
        for kind in by_kind(parameters)
        if kind
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


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
    """Use this rate in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def limit_temperature(network: nn.Module) -> None:
    """Cut the learned log of the inverse temperature at MAX_LOG_SCALE."""
    network.get_parameter("logit_scale").clamp_(max=MAX_LOG_SCALE)
