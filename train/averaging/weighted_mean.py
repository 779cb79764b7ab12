"""The weighted mean of several networks' weights, summed in float64."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vlm.errors import VlmError
from vlm.tensors import Tensor

Weights = Mapping[str, Tensor]
"""Tensors by the names of `state_dict`."""


@dataclass(frozen=True, kw_only=True)
class WeightedMean:
    """Σ share · weights / Σ share, one network after the other; `plus` leaves the mean it is asked of as it was.

    A network alone, with share 1, comes out bit for bit. The statistics of batch normalisation are averaged as weights
    are. Whole numbers (counters, places) are no quantities to average: those of the network with the largest share
    stand, the first among equals.
    """

    total: float = 0.0
    largest: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def plus(self, weights: Weights, share: float = 1.0) -> "WeightedMean":
        """The mean with one network more; a share of 0 changes nothing.

        Raises:
            VlmError: other names or shapes than those of the networks before.
        """
        if share == 0:
            return self
        if self.sums:
            self._refuse_unlike(weights)
        sums: dict[str, Tensor] = {}
        for name, value in weights.items():
            if value.is_floating_point():
                term = value.detach().to("cpu", torch.float64) * share
                sums[name] = self.sums[name] + term if self.sums else term
            else:
                sums[name] = value.detach().to("cpu", copy=True) if share > self.largest else self.sums[name]
        return WeightedMean(
            total=self.total + share,
            largest=max(self.largest, share),
            sums=sums,
            dtypes=self.dtypes or {name: value.dtype for name, value in weights.items()},
        )

    def weights(self) -> dict[str, Tensor]:
        """The mean, in the types of the first network, on the CPU."""
        return {
            name: (value / self.total).to(self.dtypes[name]) if value.is_floating_point() else value.clone()
            for name, value in self.sums.items()
        }

    def _refuse_unlike(self, weights: Weights) -> None:
        unlike = sorted(weights.keys() ^ self.sums.keys())
        unlike += [name for name in weights if not unlike and weights[name].shape != self.sums[name].shape]
        if unlike:
            raise VlmError(f"Weights of different networks cannot be averaged; they differ in {', '.join(unlike[:3])}.")
