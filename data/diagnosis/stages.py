"""A stage and how fast it is alone."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Literal

REPEATS = 3

StageName = Literal[
    "disk, in order",
    "disk, at random",
    "index, scanned",
    "index, cached",
    "read",
    "decode",
    "view",
    "tokenize",
    "stack",
    "assemble",
    "hand-over",
    "copy to device",
    "model, forward",
    "model, forward and backward",
]

PARTS: tuple[StageName, ...] = ("read", "decode", "view", "tokenize", "stack")
"""What one process does, one after the other, to assemble a batch; `stack` puts its views together."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage measured alone, the median of a few repeats.

    rate: samples a second. cores: processor cores it keeps busy; 0 for a stage that waits for other hardware.
    each: whose rate it is; that of a process grows with the workers.
    bytes_rate: bytes a second, where bytes are what it moves.
    """

    name: StageName
    rate: float
    cores: int
    each: Literal["process", "machine"]
    bytes_rate: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LoaderRate:
    """The whole loader with so many workers: samples a second once it runs, and the time to its first batch."""

    workers: int
    rate: float
    first_batch_seconds: float


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that was measured.

    cores: processor cores this process may use. device: what the model runs on, or what there is.
    busy_cores: cores that other work took just before; figures are too low by that.
    shares_cores: the model runs on the same cores as the workers.
    precision: of the model, fp32 or bf16.
    samples: how many were used; unusable: how many of them cannot be read or decoded.
    picture_format: of most of the pictures, as Pillow names it.
    shrink: median of the picture's shorter side / the view's side.
    """

    cores: int
    busy_cores: float
    device: str
    shares_cores: bool
    precision: str
    samples: int
    unusable: int
    batch_size: int
    size: int
    picture_format: str
    shrink: float
    stages: tuple[Stage, ...]
    loader: tuple[LoaderRate, ...]

    def rate(self, name: StageName) -> float | None:
        """Samples a second of a stage; None if it was not measured."""
        return next((stage.rate for stage in self.stages if stage.name == name), None)


def seconds_of(
    work: Callable[[], object], *, repeats: int = REPEATS, before: Callable[[], object] | None = None
) -> float:
    """Seconds that `work` takes: the median of a few repeats; `before` is called before each and not counted."""
    taken: list[float] = []
    for _ in range(repeats):
        if before is not None:
            before()
        begun = perf_counter()
        work()
        taken.append(perf_counter() - begun)
    return max(median(taken), 1e-9)
