"""Drift: how far retrieval and zero-shot figures have fallen since the model that a run started from, and holding it.

A model that is tuned for other data, or to write captions, forgets what it was trained for. Each evaluation tells by
how much; with a bound, the weights of the embeddings are drawn back half the way to the start until the bound holds
(weight interpolation, Wortsman et al. 2022, WiSE-FT, §3). The caption decoder is left as it is.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vlm.errors import UsageError
from vlm.models.low_rank import DECODER, FACTOR_A
from vlm.tensor_types import Tensor
from vlm.train.run_config import TrainConfig

logger = logging.getLogger(__name__)

_FIGURES = ("text_to_image_recall@1", "image_to_text_recall@1", "top1")
# after so many halves a thousandth is left of what was learned
_MOST_HALVES = 10
DRIFT = "drift/"

Figures = dict[str, float]


@dataclass(kw_only=True)
class DriftGuard:
    """The start of a run, and how far its figures may fall below those of the start.

    start: weights of the embeddings, by the names of `state_dict`. bound: share, e.g. 0.01 for a point; 0 only reports.
    baseline: the figures of the start; None until they are measured, once. halves: how often the last measurement drew
        weights back.
    """

    start: dict[str, Tensor]
    bound: float
    baseline: Figures | None = None
    halves: int = 0

    @classmethod
    def of(cls, network: nn.Module, *, bound: float) -> "DriftGuard":
        """Before the first step, and before a checkpoint is read."""
        start: dict[str, Tensor] = {}
        for name, tensor in network.state_dict().items():
            # half of an adapter is half of B A, so that only B is drawn back
            if tensor.is_floating_point() and not name.startswith(DECODER) and FACTOR_A not in name:
                start[name] = tensor.detach().to("cpu", copy=True)
        return cls(start=start, bound=bound)

    def measure(self, network: nn.Module, measure: Callable[[], Figures]) -> Figures:
        """The figures with the drift of each beside them; where the bound is passed, those after drawing back.

        measure: of the network as it is; all processes call it, and all get the same.
        """
        if self.baseline is None:
            # both are reported as of this step
            logger.info("First the figures of the start, from which drift is measured, then those of this step.")
            with self._at_start(network):
                self.baseline = _tracked(measure())
        values = measure()
        self.halves = 0
        while self.bound and _worst_fall(self.baseline, values) > self.bound and self.halves < _MOST_HALVES:
            self._draw_back(network.state_dict(), 0.5)
            self.halves += 1
            values = measure()
        if self.halves:
            logger.warning(
                f"Retrieval or zero-shot had fallen by more than {self.bound:.1%} since the start: the embeddings' "
                f"weights are drawn back, {0.5**self.halves:.1%} of their way is left."
            )
        drift: Figures = {}
        changes: list[str] = []
        for name, before in self.baseline.items():
            change = values[name] - before
            drift[DRIFT + name] = change
            changes.append(f"{name} {change:+.1%}")
        if changes:
            logger.info(f"Since the start: {', '.join(changes)}.")
        return values | drift

    def draw_back(self, weights: Mapping[str, Tensor]) -> None:
        """Draw other weights of the same names back as far as the network was."""
        if self.halves:
            self._draw_back(weights, 1 - 0.5**self.halves)

    @torch.no_grad()
    def _draw_back(self, weights: Mapping[str, Tensor], share: float) -> None:
        for name, start in self.start.items():
            weights[name].lerp_(start.to(weights[name]), share)

    @contextlib.contextmanager
    def _at_start(self, network: nn.Module) -> Iterator[None]:
        own: dict[str, Tensor] = {}
        for name, tensor in network.state_dict().items():
            if name in self.start:
                own[name] = tensor.clone()
        try:
            _copy(self.start, network)
            yield
        finally:
            _copy(own, network)


def open_drift_guard(config: TrainConfig, network: nn.Module) -> DriftGuard | None:
    """A guard for a run that tunes a model and measures it; None for others.

    Raises:
        UsageError: there is a bound, and no start, nothing to measure, or weights that are spread over processes.
    """
    bound = config.safety.max_drift
    has_start = bool(config.model.start_from and (config.val or config.val_suite or config.val_other))
    if bound and not has_start:
        raise UsageError(
            f"max_drift = {bound} is since the start: give --start-from, and --val, --val-other or --val-suite."
        )
    if bound and config.sharding == "fsdp":
        raise UsageError("--max-drift draws whole weights back, and fsdp shards them; leave one of them out.")
    if not has_start or config.sharding == "fsdp":
        return None
    return DriftGuard.of(network, bound=bound)


def _tracked(values: Figures) -> Figures:
    figures: Figures = {}
    for name, value in values.items():
        # what is measured on other data begins with `other/`
        if name.rpartition("/")[2] in _FIGURES:
            figures[name] = value
    return figures


def _worst_fall(before: Figures, values: Figures) -> float:
    return max((before[name] - values[name] for name in before), default=0.0)


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], network: nn.Module) -> None:
    for name, own in network.state_dict().items():
        if name in weights:
            own.copy_(weights[name])
