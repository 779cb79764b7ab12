"""Muon for the matrices inside a network, AdamW for all else, as one optimizer.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; rates matched to AdamW's root mean square
as in Liu et al. 2025, "Muon is scalable for LLM training", eq. 4.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """One step of both; state and groups are shared with them, so that it is saved and restored as any optimizer."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        super().__init__([{"params": group["params"]} for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move all weights."""
        for part in self.parts:
            part.step()


def tables_of(network: nn.Module) -> set[str]:
    """Names of the weights that are looked up row by row: tables of tokens, and of positions where they are modules."""
    lookups = (nn.Embedding, nn.EmbeddingBag)
    return {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, lookups)}


def is_hidden_matrix(name: str, weight: nn.Parameter) -> bool:
    """Whether a weight that is no table maps features to features: not positions, a kernel, a gain or one query."""
    return weight.ndim == 2 and min(weight.shape) > 1 and "pos" not in name.rpartition(".")[2]
