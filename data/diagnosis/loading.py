"""From the workers to the main process: the hand-over alone, and the whole loader with several numbers of workers."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch

from vlm.data.diagnosis.preparing import Trial, one_thread
from vlm.data.diagnosis.stages import LoaderRate, Stage
from vlm.data.loader import Assemble, ShardSet, stream_batches
from vlm.data.order import Address
from vlm.data.plan import TrainingPlan
from vlm.data.training_batches import TrainingBatch

_ROUNDS = 4
_HANDED_OVER_BYTES = 512 << 20
_MOST_HANDED_OVER = 256


@dataclass(frozen=True)
class _Again:
    """The same few batches over and over."""

    plan: TrainingPlan
    batches: int

    @property
    def largest(self) -> int:
        return self.plan.largest

    def __getitem__(self, number: int) -> list[Address]:
        return self.plan[number % self.batches]

    def shards_from(self, number: int) -> list[int]:
        return self.plan.shards_from(number % self.batches)


@dataclass(frozen=True)
class _Ready:
    """Gives a batch that is ready, copied into the memory it is handed over in."""

    batch: TrainingBatch

    @property
    def image_bytes(self) -> int:
        return self.batch.images[0].numel()

    def __call__(self, addresses: list[Address], shards: ShardSet) -> TrainingBatch:
        images = shards.new_images(tuple(self.batch.images.shape))
        images[:] = self.batch.images.numpy()
        return replace(self.batch, images=torch.from_numpy(images), tokens=self.batch.tokens.clone())


def measure_hand_over(trial: Trial) -> Stage:
    """One worker that does nothing but hand over a batch that is ready."""
    plan = trial.plan()
    with one_thread():
        batch = trial.assemble(plan)(plan[0], ShardSet(trial.shards))
    size = batch.images.numel() + batch.tokens.numel() * batch.tokens.element_size()
    number = min(max(_HANDED_OVER_BYTES // size, 16), _MOST_HANDED_OVER)
    rate = _steady_rate(trial, _Ready(batch), workers=1, batches=number).rate
    return Stage(
        name="hand-over",
        rate=rate,
        cores=1,
        each="process",
        bytes_rate=rate * size / trial.batch_size,
        note=f"{size / 1e6:.1f} MB a batch",
    )


def measure_loader(trial: Trial, workers: Sequence[int]) -> list[LoaderRate]:
    """The whole loader with each number of workers, for as many batches as give each worker a few."""
    assemble = trial.assemble(trial.plan())
    return [
        _steady_rate(trial, assemble, workers=number, batches=max(trial.num_batches, _ROUNDS * max(number, 1)))
        for number in workers
    ]


def _steady_rate(trial: Trial, assemble: Assemble[TrainingBatch], *, workers: int, batches: int) -> LoaderRate:
    """Samples a second from the batch on with which every worker has given one."""
    warm = max(workers, 1)
    plan = _Again(trial.plan(), trial.num_batches)
    with one_thread(), warnings.catch_warnings():
        begun = perf_counter()
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        stream = stream_batches(plan, trial.shards, assemble, numbers=range(warm + batches), workers=workers)
        times = [perf_counter() for _ in _each(stream)]
    return LoaderRate(
        workers=workers,
        rate=batches * trial.batch_size / max(times[-1] - times[warm - 1], 1e-9),
        first_batch_seconds=times[0] - begun,
    )


def _each(stream: Iterator[TrainingBatch]) -> Iterator[None]:
    for _ in stream:
        yield None
