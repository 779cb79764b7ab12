"""Runs of both trainers, ours and open_clip's, on the same network, batches and shards."""

import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from vlm.errors import VlmError
from vlm.train.history import METRICS, read_metrics

BENCH = Path(__file__).parent
NETWORK = "vit-bench"
"""Name of the network; open_clip's optimizer defaults depend on whether it contains "vit"."""

ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "raised": {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)},
}
"""Settings of glibc's allocator, always the same on both sides; `raised` keeps memory instead of returning it."""

Trainer = Literal["ours", "open_clip"]
Precision = Literal["fp32", "bf16"]
_RATE = re.compile(r"Batch \(t\): \S+ ([0-9.e+]+)/s")
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Network:
    """The CLIP model that both sides train."""

    width: int
    layers: int
    text_layers: int
    image_size: int
    patch_size: int
    context_length: int

    def write(self, folder: Path) -> None:
        """Write it in open_clip's format, for `open_clip.add_model_config(folder)`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NETWORK}.json").write_text(json.dumps(self.values()))

    def values(self) -> dict[str, Any]:
        """In open_clip's format, with CLIP's own vocabulary."""
        vision = {"image_size": self.image_size, "patch_size": self.patch_size, "head_width": min(64, self.width)}
        text = {"context_length": self.context_length, "vocab_size": 49408, "heads": max(1, self.width // 64)}
        return {
            "embed_dim": self.width,
            "vision_cfg": vision | {"width": self.width, "layers": self.layers},
            "text_cfg": text | {"width": self.width, "layers": self.text_layers},
        }


@dataclass(frozen=True, kw_only=True)
class TrainerRun:
    """A request to a trainer. micro: micro-batch size, a divisor of the batch."""

    shards: tuple[str, ...]
    batch: int
    micro: int
    steps: int
    allocator: str = "default"
    precision: Precision = "fp32"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """samples_per_s: of each step. peak_mb: largest proportional set size of all processes; 0 if not watched."""

    samples_per_s: list[float]
    peak_mb: float


@dataclass(frozen=True, kw_only=True)
class Trainers:
    """Both trainers. pythons: interpreter of each. models: folder with the network."""

    pythons: dict[Trainer, Path]
    models: Path

    def measure(self, trainer: Trainer, run: TrainerRun, *, is_watched: bool = False) -> Measured:
        """Train in its own process, in an empty folder.

        Raises:
            VlmError: it fails; the message has the end of its output.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            words = _our_words(run, folder) if trainer == "ours" else _their_words(run, folder)
            script = "vlm_trainer.py" if trainer == "ours" else "open_clip_trainer.py"
            command = [str(self.pythons[trainer]), str(BENCH / script), str(self.models), *words]
            peak_mb = _run(command, folder, ALLOCATORS[run.allocator], is_watched=is_watched)
            rates = _our_rates(folder) if trainer == "ours" else _their_rates(folder)
        return Measured(samples_per_s=rates, peak_mb=peak_mb)


def _our_words(run: TrainerRun, folder: Path) -> list[str]:
    return [
        *(
            "train",
            NETWORK,
            "--data",
            "::".join(run.shards),
            "--run",
            str(folder / "run"),
            "--precision",
            run.precision,
        ),
        *("--batch-size", str(run.batch), "--micro-batch", str(run.micro if run.micro < run.batch else 0)),
        *("--steps", str(run.steps), "--workers", "1", "--log-every", "1", "--grad-clip-norm", "1"),
    ]


def _their_words(run: TrainerRun, folder: Path) -> list[str]:
    return [
        *("--model", NETWORK, "--train-data", "::".join(run.shards), "--dataset-type", "webdataset"),
        *("--train-num-samples", str(run.batch * run.steps), "--epochs", "1"),
        *("--precision", "amp_bf16" if run.precision == "bf16" else "fp32"),
        *("--batch-size", str(run.micro), "--accum-freq", str(run.batch // run.micro), "--workers", "1"),
        *("--warmup", "2000", "--grad-clip-norm", "1", "--log-every-n-steps", "1", "--save-frequency", "0"),
        *("--device", "cpu", "--logs", str(folder), "--name", "run"),
    ]


def _run(command: list[str], folder: Path, allocator: dict[str, str], *, is_watched: bool) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | allocator
    peak_mb, said = 0.0, folder / "said.txt"
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment)
        if is_watched:
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                peak_mb = max(peak_mb, memory_mb(watched))
                time.sleep(_POLL_S)
        process.wait()
    if process.returncode:
        raise VlmError(f"{' '.join(command)} failed: {said.read_text()[-2000:]}")
    return peak_mb


def memory_mb(process: psutil.Process) -> float:
    """Proportional set size of a process and its children in MB, so shared pages count once; 0 if it has ended."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.NoSuchProcess:
        return 0.0
    return total / 1e6


def _our_rates(folder: Path) -> list[float]:
    return [line["samples_per_second"] for line in read_metrics(folder / "run" / METRICS)]


def _their_rates(folder: Path) -> list[float]:
    return [float(found) for found in _RATE.findall((folder / "run" / "out.log").read_text())]
