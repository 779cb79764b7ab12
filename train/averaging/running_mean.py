"""The running mean of the weights while they are trained (EMA): the last steps without their noise."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vlm.errors import VlmError
from vlm.tensors import Tensor


class RunningMean:
    """mean ← d · mean + (1 - d) · weights after each step (Polyak and Juditsky 1992, in its exponential form).

    Early on d = min(decay, (1 + step) / (10 + step)), so that the fresh weights are soon forgotten (the warm-up of
    TensorFlow's ExponentialMovingAverage). Parameters are averaged in float32 at least; buffers, and whatever holds
    whole numbers, are those of the last step. Processes that train the same weights each keep the same mean.

    weights: the mean by the names of `state_dict`: all there is to save. The dict stays the same object.
    """

    def __init__(self, decay: float, weights: dict[str, Tensor]) -> None:
        self.decay, self.weights = decay, weights

    @classmethod
    def begin(cls, decay: float, network: nn.Module) -> "RunningMean":
        """The mean before the first step: the weights as they are."""
        averaged = _averaged_names(network)
        return cls(
            decay,
            {
                name: value.to(torch.promote_types(value.dtype, torch.float32) if name in averaged else None, copy=True)
                for name, value in network.state_dict().items()
            },
        )

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step number `step`, counted from 1.

        Raises:
            VlmError: the network is not the one the mean is of.
        """
        current, averaged = self._weights_of(network), _averaged_names(network)
        decay = min(self.decay, (1 + step) / (10 + step))
        means = [self.weights[name] for name in current if name in averaged]
        values = [value.to(self.weights[name].dtype) for name, value in current.items() if name in averaged]
        if means:
            torch._foreach_lerp_(means, values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for name in current.keys() - averaged:
            self.weights[name].copy_(current[name])

    @contextmanager
    def applied(self, network: nn.Module) -> Iterator[None]:
        """The network with the mean as its weights; afterwards it has its own again, bit for bit.

        Raises:
            VlmError: the network is not the one the mean is of.
        """
        kept = {name: value.clone() for name, value in self._weights_of(network).items()}
        try:
            _copy(self.weights, into=network)
            yield
        finally:
            _copy(kept, into=network)

    def _weights_of(self, network: nn.Module) -> dict[str, Tensor]:
        """The network's own tensors, with the mean brought to where they are."""
        current: dict[str, Tensor] = network.state_dict()
        unlike = sorted(current.keys() ^ self.weights.keys())
        unlike += [name for name in current if not unlike and current[name].shape != self.weights[name].shape]
        if unlike:
            raise VlmError(f"The running mean is of another network: they differ in {', '.join(unlike[:3])}.")
        for name, value in current.items():
            self.weights[name] = self.weights[name].to(value.device)
        return current


def _averaged_names(network: nn.Module) -> set[str]:
    parameters = network.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.is_floating_point()}


@torch.no_grad()
def _copy(weights: dict[str, Tensor], *, into: nn.Module) -> None:
    # asked anew each time: state_dict makes FSDP drop the whole weights that its last forward pass gathered
    for name, own in into.state_dict().items():
        own.copy_(weights[name])
