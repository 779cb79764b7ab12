"""Layer-wise learning rates: a pretrained tower's early layers take smaller steps than its late ones.

The rate of a group of layers is `decay` times that of the group after it, and the last group's that of what comes after
the trunk (Howard and Ruder 2018, ULMFiT, §3.2; BEiT, Bao et al. 2022, §A). Groups are timm's where a trunk has them,
else blocks by their number, with embeddings before the first.
"""

import re
from typing import Any

from torch import nn

from vlm.models.low_rank import tower_of

_BLOCK = re.compile(r"(?:resblocks|blocks|layers?|h)\.(\d+)\.")
_FIRST = re.compile(r"embed|conv1|ln_pre|pre_layrnorm|patch|stem|cls_token")


def layer_rates(network: nn.Module, decay: float) -> dict[str, float]:
    """The multiplier of the learning rate of each weight, by its name; 1 for those that are after the layers."""
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
