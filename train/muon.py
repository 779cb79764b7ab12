"""Muon for the matrices inside a network, AdamW for all else, as one optimizer.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; rates matched to AdamW's root mean square
as in Liu et al. 2025, "Muon is scalable for LLM training", eq. 4.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_PIXEL_CHANNELS = 3


class MuonWithAdamW(torch.optim.Optimizer):
    """One step of both. State and groups are those of the weights themselves, saved and restored as any optimizer's.

    matrices: groups of what Muon moves; a kernel [O, I, …] is moved as the matrix [O, I · …].
    """

    def __init__(self, matrices: Sequence[dict[str, Any]], adamw: torch.optim.AdamW, **told: Any) -> None:
        flat = [group | {"params": [_flat(weight) for weight in group["params"]]} for group in matrices]
        self.muon, self.adamw = torch.optim.Muon(flat, **told), adamw
        super().__init__([{"params": group["params"]} for group in (*matrices, *adamw.param_groups)], {})
        of_muon = [
            within | {"params": group["params"]} for within, group in zip(self.muon.param_groups, matrices, strict=True)
        ]
        self.param_groups = [*of_muon, *adamw.param_groups]
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move all weights."""
        for within, group in zip(self.muon.param_groups, self.param_groups, strict=False):
            within.update({name: value for name, value in group.items() if name != "params"})
            for flat, weight in zip(within["params"], group["params"], strict=True):
                flat.grad = None if weight.grad is None else weight.grad.flatten(1)
                self.muon.state[flat] = self.state[weight]
        self.muon.step()
        self.adamw.step()


def tables_of(network: nn.Module) -> set[str]:
    """Names of the weights that are looked up row by row: tables of tokens, and of positions where they are modules."""
    lookups = (nn.Embedding, nn.EmbeddingBag)
    return {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, lookups)}


def is_hidden_matrix(name: str, weight: nn.Parameter) -> bool:
    """Whether a weight that is no table maps features to features.

    Not so: positions, gains, one query, kernels of single channels and those that read pixels.
    """
    if weight.ndim < 2 or "pos" in name.rpartition(".")[2]:
        return False
    if weight.ndim > 2:
        return weight.shape[0] > 1 and weight.shape[1] > _PIXEL_CHANNELS
    return min(weight.shape) > 1


def _flat(weight: nn.Parameter) -> nn.Parameter:
    """The same numbers as a matrix."""
    return nn.Parameter(weight.detach().view(len(weight), -1))
