"""What the network must compute for a sample, counted; against the device's peak that is model FLOP utilisation."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.console import say
from vlm.models.row_noise import RowNoise
from vlm.tensors import Tensor

_ROWS = 2
_META = torch.device("meta")
_RECOMPUTES = ("grad_checkpointing", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class SampleFlops:
    """Floating-point operations of one sample: a multiplication and the addition that follows it are two."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def count_flops(network: nn.Module, inputs: dict[str, Tensor]) -> SampleFlops:
    """FLOPs of one sample of inputs [B, …] in `network(inputs)`, a mapping of outputs, and in its backward pass.

    Counted are matrix products, convolutions and attention (all L² of it, masked or not), as dispatched by torch on a
    copy without data (device `meta`), in the mode the network is in: what patch dropout leaves out is not counted, nor
    are gradients nobody asks for (locked towers, the pixels). Not counted: elementwise work, normalisation, look-ups,
    the loss, the optimiser. Nor is work done twice: recomputation under gradient checkpointing, and the first of the
    two forward passes of the exact split, since they bring the model no further (Chowdhery et al. 2022, PaLM,
    appendix B).

    Call it before the network is wrapped for several processes. Weights, gradients, buffers and torch's generators stay
    as they are. Where the network cannot run without data it is copied as it is and run on its own device.
    """
    return _count_either(_copy(network, _META), network, inputs)


class FlopCounts:
    """The FLOPs of batches, counted once for each shape of inputs: captions may be trimmed to different lengths.

    Made before the network is wrapped for several processes, it counts at any time after.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._outline: nn.Module | None = None
        with contextlib.suppress(Exception):  # tried again, and said, when something is to be counted
            self._outline = _copy(network, _META)
        self._known: dict[tuple, SampleFlops | None] = {}

    def of(self, inputs: dict[str, Tensor]) -> float:
        """FLOPs, forward and backward, of all rows of these inputs; nan where they cannot be counted."""
        sample = self.of_sample(inputs)
        return sample.both * len(next(iter(inputs.values()))) if sample else float("nan")

    def of_sample(self, inputs: dict[str, Tensor]) -> SampleFlops | None:
        """The same of one row; None where they cannot be counted, which is said once."""
        shape = tuple(sorted((name, tuple(value.shape[1:])) for name, value in inputs.items()))
        if shape not in self._known:
            try:
                outline = self._outline or _copy(self._network, _META)
                self._known[shape] = _count_either(outline, self._network, inputs)
            except Exception as error:  # a figure of speed is no reason to end a run
                say(f"FLOPs cannot be counted, so there will be no MFU: {type(error).__name__}: {error}")
                self._known[shape] = None
        return self._known[shape]


def _count_either(outline: nn.Module, network: nn.Module, inputs: dict[str, Tensor]) -> SampleFlops:
    """Counted on the copy without data, or else on a copy with it."""
    try:
        return _count(outline, inputs, _META)
    except (RuntimeError, NotImplementedError):
        device = next(network.parameters()).device
        return _count(_copy(network, device), inputs, device)


def _count(network: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> SampleFlops:
    rows = min(_ROWS, len(next(iter(inputs.values()))))
    few = {name: value[:rows].detach().to(device) for name, value in inputs.items()}
    for module in network.modules():
        if isinstance(noise := getattr(module, "noise", None), RowNoise):
            noise.rows = torch.arange(rows)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _plain_attention(), torch.enable_grad():
        with FlopCounterMode(display=False) as forward:
            outputs = network(few)
        trained = [
            value.flatten().float().sum()
            for value in outputs.values()
            if value.is_floating_point() and value.requires_grad
        ]
        with FlopCounterMode(display=False) as backward:
            if trained:
                torch.stack(trained).sum().backward()
    return SampleFlops(forward=forward.get_total_flops() / rows, backward=backward.get_total_flops() / rows)


def _copy(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy on `device` that computes nothing twice; without data if that is `meta`."""
    memo: dict[int, object] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        moved = torch.empty_like(tensor, device=device) if device.type == "meta" else tensor.detach().clone()
        memo[id(tensor)] = (
            nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        )
    with _without_gradients(network):
        copied = copy.deepcopy(network, memo)
    for module in copied.modules():
        for name in _RECOMPUTES:
            if getattr(module, name, False) is True:
                setattr(module, name, False)
    return copied


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """One implementation of attention on every device, made of products that are counted."""
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)


@contextlib.contextmanager
def _without_gradients(network: nn.Module) -> Iterator[None]:
    """Gradients lie aside while the network is copied."""
    kept = {parameter: parameter.grad for parameter in network.parameters()}
    try:
        for parameter in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept.items():
            parameter.grad = gradient
