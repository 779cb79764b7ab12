"""Values over the steps since the last line."""

from collections.abc import Mapping
from typing import Any

import torch

from vlm.tensors import Tensor


class WindowMean:
    """Means of named values over the steps since the last reading.

    Values may be scalars on the device: they are summed there, in float64, and nothing waits for them before `read`.
    The sums are part of the state of a run: a run that stops between two lines writes, when resumed, the line that the
    uninterrupted run does (`to_values`, `restore`).
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """The values of one step."""
        for name, value in values.items():
            number = torch.as_tensor(value).detach().double()
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, Tensor]:
        """The mean of each name over the steps that had it; then start anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def to_values(self) -> dict[str, tuple[float, int]]:
        """Sum and count of each name, as plain values."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}

    def restore(self, values: dict[str, Any], device: torch.device) -> None:
        """Go on from what `to_values` gave."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=device) for name, (total, _) in values.items()
        }
        self._counts = {name: count for name, (_, count) in values.items()}
