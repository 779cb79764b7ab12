"""Loss-spike guard: a step with a loss or gradient that is not finite, or a loss spike, must not reach the weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

# long enough for a stable median, short enough to follow the falling loss of an early run
LOSS_HISTORY_LENGTH = 100
# before that the loss falls by more per step than it scatters
_MIN_LOSSES = 20
_MAD_TO_STD = 1.4826
_MIN_RELATIVE_DEVIATION = 1e-3


@dataclass
class LossSpikeGuard:
    """The losses of the last good steps, oldest first, and how many steps in a row have just been skipped."""

    losses: list[float] = field(default_factory=list)
    in_a_row: int = 0

    def accept(self, loss: float) -> None:
        """A step was good."""
        self.losses = [*self.losses[1 - LOSS_HISTORY_LENGTH :], loss]
        self.in_a_row = 0

    def reject(self) -> None:
        """A step was skipped."""
        self.in_a_row += 1


def skip_reason(
    loss_terms: Mapping[str, float], gradient_norm: float, losses: Sequence[float], *, spike_factor: float = 0.0
) -> str:
    """Why the update of a step is to be skipped; empty where it is good.

    loss_terms: the weighted losses, and gradient_norm: the norm before clipping, both as all processes agree on them.
    losses: of the last good steps. spike_factor: see `spike_threshold`; 0 lets every finite loss pass.

    >>> skip_reason({"clip": math.nan}, 1.0, [])
    'the loss clip is nan'
    >>> skip_reason({"clip": 9.0}, 1.0, [1.0, 1.1] * 10, spike_factor=6.0)
    'the loss 9 is above 1.495 = median 1.05 + 6 x 0.07413'
    """
    for name, value in loss_terms.items():
        if not math.isfinite(value):
            return f"the loss {name} is {value}"
    if not math.isfinite(gradient_norm):
        return f"the gradient's norm is {gradient_norm}"
    loss = sum(loss_terms.values())
    limit, explanation = spike_threshold(losses, spike_factor)
    return f"the loss {loss:.4g} is above {limit:.4g} = {explanation}" if loss > limit else ""


def spike_threshold(losses: Sequence[float], factor: float) -> tuple[float, str]:
    """The loss above which a step is a spike, and its formula; infinity with factor 0 or too few losses.

    It is the median plus `factor` deviations, of which one is 1.4826 times the median absolute deviation (the standard
    deviation, where losses are normally distributed: Rousseeuw and Croux 1993, §1), and at least 0.1% of the median.
    """
    if not factor or len(losses) < _MIN_LOSSES:
        return math.inf, ""
    middle = median(losses)
    spread = _MAD_TO_STD * median(abs(loss - middle) for loss in losses)
    # a loss that has stopped changing has next to no spread, and any step would be a spike
    deviation = max(spread, _MIN_RELATIVE_DEVIATION * abs(middle))
    return middle + factor * deviation, f"median {middle:.4g} + {factor:g} x {deviation:.4g}"


def copy_running_stats(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers that a forward pass changes (of batch normalisation), each with a copy of its values now."""
    statistics: list[tuple[Tensor, Tensor]] = []
    for layer in module.modules():
        # layers in evaluation mode (frozen ones) do not change
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training:
            for buffer in layer.buffers():
                statistics.append((buffer, buffer.clone()))
    return statistics


@torch.no_grad()
def restore_running_stats(statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Undo what forward passes have done to the buffers since."""
    for buffer, before in statistics:
        buffer.copy_(before)
