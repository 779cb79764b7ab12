"""Model FLOP utilisation (MFU): the FLOPs a network needs for a sample, counted, and the peak of the device."""

import contextlib
import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.models.dropout import PerSampleNoise
from vlm.tensor_types import Tensor

logger = logging.getLogger(__name__)

# two rows, since batch norms refuse one in training mode
_ROWS = 2
_META = torch.device("meta")
_CHECKPOINTING_FLAGS = ("grad_checkpointing", "gradient_checkpointing")


@dataclass(frozen=True, kw_only=True)
class SampleFlops:
    """Floating-point operations of one sample: a multiplication and the addition that follows it are two."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


class FlopCounter:
    """The FLOPs of batches, counted once for each shape of inputs: captions may be trimmed to different lengths.

    Counted are matrix products, convolutions and attention (all L² of it, masked or not), as dispatched by torch on a
    copy without data (device `meta`), in the mode the network is in: what patch dropout leaves out is not counted, nor
    are gradients nobody needs (locked towers, the pixels). Not counted: elementwise work, normalisation, look-ups, the
    loss, the optimizer. Nor is work done twice: recomputation under gradient checkpointing, and the first of the two
    forward passes of gradient caching, since they bring the model no further (Chowdhery et al. 2022, PaLM, appendix B).

    Make it before the network is wrapped for several processes; it counts at any time after. Weights, gradients,
    buffers and torch's generators do not change. A network that cannot run without data is copied with its data and
    run on its own device.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._meta_network: nn.Module | None = None
        with contextlib.suppress(Exception):  # tried again, and logged, when something is to be counted
            self._meta_network = _copy(network, _META)
        self._counted: dict[tuple, SampleFlops | None] = {}

    def of(self, inputs: dict[str, Tensor]) -> float:
        """FLOPs, forward and backward, of all rows of these inputs [B, …]; nan where they cannot be counted."""
        sample = self.sample_flops(inputs)
        return sample.total * len(next(iter(inputs.values()))) if sample else float("nan")

    def sample_flops(self, inputs: dict[str, Tensor]) -> SampleFlops | None:
        """The same of one row; None where they cannot be counted, which is logged once."""
        # without the batch dimension, in which everything counted is linear
        shape = tuple(sorted((name, tuple(value.shape[1:])) for name, value in inputs.items()))
        if shape not in self._counted:
            try:
                meta_network = self._meta_network or _copy(self._network, _META)
                self._counted[shape] = _count_with_fallback(meta_network, self._network, inputs)
            except Exception as error:  # a failed speed figure must not end a run
                logger.warning(f"FLOPs cannot be counted, so there will be no MFU: {type(error).__name__}: {error}")
                self._counted[shape] = None
        return self._counted[shape]


def _count_with_fallback(meta_network: nn.Module, network: nn.Module, inputs: dict[str, Tensor]) -> SampleFlops:
    """Counted on the copy without data, or else on a copy with it."""
    try:
        return _count(meta_network, inputs, _META)
    # operations without a kernel for meta tensors, or whose shapes depend on values
    except (RuntimeError, NotImplementedError):
        device = next(network.parameters()).device
        return _count(_copy(network, device), inputs, device)


def _count(network: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> SampleFlops:
    rows = min(_ROWS, len(next(iter(inputs.values()))))
    few_rows = {name: value[:rows].detach().to(device) for name, value in inputs.items()}
    for module in network.modules():
        if isinstance(noise := getattr(module, "noise", None), PerSampleNoise):
            noise.rows = torch.arange(rows)
    devices = [device] if device.type == "cuda" else []
    # counting must not move the run's random state
    with torch.random.fork_rng(devices), _math_attention(), torch.enable_grad():
        with FlopCounterMode(display=False) as forward:
            outputs = network(few_rows)
        losses: list[Tensor] = []
        for value in outputs.values():
            if value.is_floating_point() and value.requires_grad:
                losses.append(value.flatten().float().sum())
        with FlopCounterMode(display=False) as backward:
            if losses:
                torch.stack(losses).sum().backward()
    return SampleFlops(forward=forward.get_total_flops() / rows, backward=backward.get_total_flops() / rows)


def _copy(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy on `device` that computes nothing twice; without data if that is `meta`."""
    # deepcopy takes what its memo holds for an object, so tensors are never copied on the network's device
    memo: dict[int, object] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        moved = torch.empty_like(tensor, device=device) if device.type == "meta" else tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = moved
    with _gradients_removed(network):
        copied = copy.deepcopy(network, memo)
    for module in copied.modules():
        # recomputation is not useful work, see the docstring of FlopCounter
        for name in _CHECKPOINTING_FLAGS:
            if getattr(module, name, False) is True:
                setattr(module, name, False)
    return copied


@contextlib.contextmanager
def _math_attention() -> Iterator[None]:
    """One implementation of attention on every device, made of products that are counted."""
    # the fused kernels of attention and of TransformerEncoder are opaque to the counter
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)


@contextlib.contextmanager
def _gradients_removed(network: nn.Module) -> Iterator[None]:
    """Gradients are set aside while the network is copied."""
    gradients = {parameter: parameter.grad for parameter in network.parameters()}
    try:
        for parameter in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


Precision = Literal["fp32", "tf32", "bf16"]

PEAKS: dict[str, dict[Precision, float]] = {
    "B200": {"bf16": 2250, "tf32": 1125, "fp32": 75},
    "GH200": {"bf16": 989, "tf32": 494, "fp32": 67},
    "H200 NVL": {"bf16": 835, "tf32": 417, "fp32": 60},
    "H200": {"bf16": 989, "tf32": 494, "fp32": 67},
    "H100 NVL": {"bf16": 835, "tf32": 417, "fp32": 60},
    "H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "H100": {"bf16": 989, "tf32": 494, "fp32": 67},
    "H800": {"bf16": 989, "tf32": 494, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "A800": {"bf16": 312, "tf32": 156, "fp32": 19.5},
    "A40": {"bf16": 149.7, "tf32": 74.8, "fp32": 37.4},
    "A30": {"bf16": 165, "tf32": 82, "fp32": 10.3},
    "A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L40": {"bf16": 181, "tf32": 90.5, "fp32": 90.5},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3},
    "RTX 6000 Ada": {"bf16": 364, "tf32": 182, "fp32": 91.1},
    "RTX A6000": {"bf16": 154.8, "tf32": 77.4, "fp32": 38.7},
    "RTX 4090": {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "tf32": 35.6, "fp32": 35.6},
    "V100-PCIE": {"bf16": 14, "tf32": 14, "fp32": 14},
    "V100": {"bf16": 15.7, "tf32": 15.7, "fp32": 15.7},
    "T4": {"bf16": 8.1, "tf32": 8.1, "fp32": 8.1},
    "MI300X": {"bf16": 1307, "tf32": 654, "fp32": 163},
}
"""TFLOP/s (10¹² a second) of the vendors' data sheets, dense (half of what is given "with sparsity"), sums in fp32.

The name is a run of words of what torch calls the device; the first that matches counts. Volta and Turing have no unit
for bf16 or TF32: torch computes there in fp32.
"""

_CPU_SIDE = 1024
_GPU_SIDE = 8192
_NUM_WARM_UPS = 2
_MIN_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class PeakFlops:
    """FLOP/s of one process's device, and the source of the figure in words."""

    flops: float
    source: str


def device_peak(device: torch.device, precision: Literal["fp32", "bf16"], *, override_tflops: float = 0.0) -> PeakFlops:
    """The peak that utilisation is measured against: the given one, else the data sheet's, else a measured one.

    A GPU computes fp32 products in TF32 where torch is allowed to; then that is its peak. A CPU, and a GPU that is not
    in the table, is measured (`measure_peak`). That is what a library reaches, not what the maker promises, so
    utilisation comes out higher than against a data sheet; and two processes on one CPU should measure at the same
    time, as they compute.
    """
    if override_tflops:
        return PeakFlops(flops=override_tflops * 1e12, source="as given by peak_tflops")
    if device.type == "cuda":
        is_tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
        arithmetic: Precision = "tf32" if is_tf32 else precision
        name = torch.cuda.get_device_name(device)
        flops = find_peak(name, arithmetic)
        if flops:
            return PeakFlops(flops=flops, source=f"{name}, data sheet, {arithmetic} dense")
    return measure_peak(device, precision)


def find_peak(name: str, precision: Precision) -> float:
    """FLOP/s of the device torch calls so; 0 if it is not in the table.

    >>> find_peak("NVIDIA A100-SXM4-80GB", "bf16") / 1e12
    312.0
    >>> find_peak("NVIDIA A10G", "bf16")
    0.0
    """
    words = f" {name.replace('-', ' ')} "
    if " Laptop " in words:  # other chips under the same names
        return 0.0
    for known, peaks in PEAKS.items():
        if f" {known.replace('-', ' ')} " in words:
            return peaks[precision] * 1e12
    return 0.0


def measure_peak(
    device: torch.device, precision: Literal["fp32", "bf16"], *, side: int = 0, seconds: float = 0.3
) -> PeakFlops:
    """The fastest of the matrix products done in so many seconds, by as many threads as torch has.

    side: rows and columns of the matrices; 0 takes a size that keeps the device busy.
    """
    side = side or (_GPU_SIDE if device.type == "cuda" else _CPU_SIDE)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    out = torch.empty_like(matrix)
    for _ in range(_NUM_WARM_UPS):
        torch.mm(matrix, matrix, out=out)

    fastest = float("inf")
    num_repeats = 0
    started = time.perf_counter()
    while num_repeats < _MIN_REPEATS or time.perf_counter() - started < seconds:
        _synchronise(device)
        before = time.perf_counter()
        torch.mm(matrix, matrix, out=out)
        _synchronise(device)
        fastest = min(fastest, time.perf_counter() - before)
        num_repeats += 1

    # a product of n × n matrices takes n³ multiplications and as many additions
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    source = f"measured here: {precision} product of {side:,} × {side:,} matrices{threads}"
    return PeakFlops(flops=2 * side**3 / fastest, source=source)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
