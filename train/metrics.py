"""Metrics of a run: means since the last line, speed, data wait, MFU and time left; the progress line.

Model FLOP utilisation (MFU) is the FLOPs a network needs for a sample, counted, over the peak of the device.
"""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlm.console import format_duration, progress
from vlm.data.tokenizers import Padding
from vlm.models.dropout import PerSampleNoise
from vlm.tensor_types import Tensor
from vlm.train.distributed import gather_objects

logger = logging.getLogger(__name__)

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
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
        copied: Any = copy.deepcopy(network, memo)
    # in bfloat16 it would be that of the original
    vars(copied).pop("forward", None)
    # rows count as wide as they are given, whatever of them is padding
    if isinstance(getattr(copied, "padding", None), Padding):
        copied.padding = None
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


class ProgressLine:
    """One bar over the whole run: step, loss, samples/s, data wait, MFU, time left."""

    def __init__(self, *, steps: int, done: int, is_shown: bool) -> None:
        self._bar = progress(total=steps, what="training", done=done, unit="step") if is_shown else None
        if self._bar is not None:
            # the bar's own estimate of the time left ignores evaluations
            self._bar.bar_format = _FORMAT

    def update(self, values: dict[str, Any]) -> None:
        """Show the newest values."""
        if self._bar is not None:
            self._bar.set_postfix_str(progress_note(values), refresh=False)

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def roll_back(self, step: int) -> None:
        """The run rolled back to a step."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def progress_note(values: dict[str, Any]) -> str:
    """What is shown of the values of a line.

    >>> values = {"loss": 2.5, "samples_per_second": 1234.5, "data_wait": 0.03, "mfu": 0.412, "eta_seconds": 3750}
    >>> progress_note(values)
    'loss 2.500  1,234 samples/s  data wait 3%  MFU 41%  1 h 2 min left'
    """
    parts = [
        f"loss {values['loss']:.3f}",
        f"{values['samples_per_second']:,.0f} samples/s",
        f"data wait {values['data_wait']:.0%}",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    if values.get("eta_seconds"):
        parts.append(f"{format_duration(values['eta_seconds'])} left")
    return "  ".join(parts)


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
            # float64, so that sums do not depend on where a window begins; on the device, so that nothing waits for
            # it
            number = torch.as_tensor(value).detach().double()
            self._sums[name] = self._sums[name] + number if name in self._sums else number
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, Tensor]:
        """The mean of each name over the steps that had it; then the sums are reset."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def to_values(self) -> dict[str, tuple[float, int]]:
        """Sum and count of each name, as plain values."""
        return {name: (float(total), self._counts[name]) for name, total in self._sums.items()}

    def restore(self, values: dict[str, Any], device: torch.device) -> None:
        """Continue from what `to_values` gave."""
        self._sums, self._counts = {}, {}
        for name, (total, count) in values.items():
            self._sums[name] = torch.tensor(total, dtype=torch.float64, device=device)
            self._counts[name] = count


Item = TypeVar("Item")


class StepTimer:
    """Times a run: one reading for the steps since the last.

    batch_size: samples of a step, over all processes. steps, done: of the whole run, and when the clock starts.
    peak: of this process's device. now: the clock read, in seconds.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        steps: int = 0,
        done: int = 0,
        peak: PeakFlops | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batch_size = batch_size
        self._peak = peak
        self._now = now
        self._steps_left = steps - done
        self._is_length_known = steps > 0
        self._timed_from: float | None = None
        self._timed_steps = 0
        self._restart()

    def _restart(self) -> None:
        self._since = self._now()
        self._data_wait_seconds = 0.0
        self._steps = 0
        self._decoded = 0
        self._flops = 0.0

    def timed(self, items: Iterator[Item]) -> Generator[Item, None, None]:
        """Pass the items on, timing how long each is waited for."""
        while True:
            before = self._now()
            item = next(items, None)
            # until here: what the caller does with the item is no waiting
            self._data_wait_seconds += self._now() - before
            if item is None:
                return
            yield item

    def tick(self, *, decoded: int = 0, flops: float = 0.0) -> None:
        """One more step is done, for which this process decoded so many images and needed so many FLOPs."""
        self._steps += 1
        self._decoded += decoded
        self._flops += flops

    def exclude_time(self, seconds: float) -> None:
        """Leave out time that was spent on neither data nor steps (evaluation, saving)."""
        # as if the window had begun later
        self._since += seconds

    def read(self) -> dict[str, float]:
        """The values of this process for the steps since the last reading; then the timer is reset.

        samples_per_second (all processes), images_per_second (decoded for this process), data_wait (share in [0, 1]),
        mfu (share of the peak, in [0, 1]; absent without a peak or a count, and from the first reading on that is
        higher than the peak), memory_bytes (largest use of the GPU so
        far, or resident memory of this process now), eta_seconds (absent where the number of steps is not known).
        """
        elapsed = max(self._now() - self._since, 1e-9)
        values = {
            "samples_per_second": self._steps * self._batch_size / elapsed,
            "images_per_second": self._decoded / elapsed,
            "data_wait": min(self._data_wait_seconds / elapsed, 1.0),
            "memory_bytes": float(_memory_bytes()),
        }
        utilisation = self._utilisation(elapsed)
        if utilisation is not None:
            values["mfu"] = utilisation
        left = self._seconds_left(elapsed)
        if left is not None:
            values["eta_seconds"] = left
        self._restart()
        return values

    def _utilisation(self, elapsed: float) -> float | None:
        """Share of the peak; None where either is not known, or where the peak turns out to be none."""
        if not self._peak or not math.isfinite(self._flops) or self._flops <= 0:
            return None
        share = self._flops / elapsed / self._peak.flops
        if share <= 1:
            return share
        logger.warning(
            f"The run reaches {self._flops / elapsed / 1e12:,.3g} TFLOP/s, more than its device's peak of "
            f"{self._peak.flops / 1e12:,.3g} ({self._peak.source}), so MFU is not shown from here on: the peak was "
            "measured while other work ran, or is another device's. Give the real one by --peak-tflops."
        )
        self._peak = None
        return None

    def _seconds_left(self, elapsed: float) -> float | None:
        """From the mean over all windows but the first, which compiles and fills queues; evaluations count in it."""
        if not self._is_length_known:
            return None
        self._steps_left -= self._steps
        if self._steps_left <= 0:
            return 0.0
        if not self._steps:
            return None
        # the first window has compilation and empty queues; from the second on the mean is representative
        if self._timed_from is None:
            self._timed_from = self._now()
            return self._steps_left * elapsed / self._steps
        self._timed_steps += self._steps
        return self._steps_left * (self._now() - self._timed_from) / self._timed_steps


def reduce_over_processes(reading: dict[str, float]) -> dict[str, float]:
    """One reading for all processes, called by all: images are summed, memory is the largest, the rest are means."""
    readings = gather_objects([reading])
    reducers: dict[str, Callable[[list[float]], float]] = {"images_per_second": math.fsum, "memory_bytes": max}
    merged: dict[str, float] = {}
    for name, own_value in reading.items():
        # a process whose peak was too low leaves out its mfu
        values = [other.get(name, own_value) for other in readings]
        merged[name] = reducers.get(name, _mean)(values)
    return merged


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """What MFU is measured against: the FLOPs of a sample, and the peak of each process's device."""

    sample: SampleFlops | None
    peak: PeakFlops
    processes: int

    def to_values(self) -> dict[str, float | str | int | None]:
        """As plain values."""
        return {
            "forward_flops_per_sample": self.sample.forward if self.sample else None,
            "backward_flops_per_sample": self.sample.backward if self.sample else None,
            "peak_flops": self.peak.flops,
            "peak_source": self.peak.source,
            "processes": self.processes,
        }

    def summary(self) -> str:
        """In words, for the start of a run."""
        if self.sample is None:
            return "MFU is not reported: the FLOPs of this network cannot be counted."
        devices = f"{self.processes} × " if self.processes > 1 else ""
        return (
            f"MFU is of {devices}{self.peak.flops / 1e12:,.3g} TFLOP/s ({self.peak.source}); a sample takes "
            f"{self.sample.forward / 1e9:,.3g} GFLOP forward and {self.sample.backward / 1e9:,.3g} backward."
        )


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _memory_bytes() -> int:
    """Peak memory of the GPU, or memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return psutil.Process().memory_info().rss
