"""Training as the GPU benchmark measures it, by generators: each result is kept even if the next one never comes."""

import gc
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import open_clip  # noqa: F401  so that it is imported once, before the parts are forked
import torch

from vlm.data.collate import TrainingBatch
from vlm.train.logger import RunLogger
from vlm.train.run_config import LoaderConfig, ModelConfig, ObjectiveConfig, TrainConfig
from vlm.train.run_setup import Session, open_session
from vlm.train.step import compute_gradients, train_step

Row = dict[str, Any]
Precision = Literal["fp32", "bf16"]
_ENDLESS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by all parts.

    batch: micro-batch size. seconds: of timed steps. most: batch size at which the search for the largest stops.
    equal: batch whose gradients in four micro-batches are compared with those of the whole.
    rows: of the searched index. is_tiny: small networks, to try the script.
    """

    shards: str
    batch: int
    global_batch: int
    workers: int
    is_compiled: bool
    decode_on_device: bool
    seconds: float
    warm_up: int
    most: int
    equal: int
    rows: int
    objective: str
    is_tiny: bool


def device_name() -> Iterator[Row]:
    """The GPU and its memory; nothing if there is none. Call it in its own process: it may initialise CUDA."""
    if torch.cuda.is_available():
        yield {"name": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.get_device_properties(0).total_memory}


def speed(settings: Settings, architecture: str) -> Iterator[Row]:
    """Training steps on one batch in memory, repeatedly, and then on batches of the loader."""
    with tempfile.TemporaryDirectory() as folder:
        session = _open(settings, architecture, folder, compile=settings.is_compiled)
        first = next(session.open_batches())
        with RunLogger(session) as run_logger:
            began = time.monotonic()
            result = train_step(session, first)
            yield {
                "what": "first step",
                "seconds": time.monotonic() - began,
                "peak": run_logger.utilisation.peak.source,
            }
            del result
            yield {"what": "alone"} | _timed_steps(settings, session, run_logger, itertools.repeat(first))
            yield {"what": "fed"} | _timed_steps(settings, session, run_logger, session.open_batches())


def _timed_steps(
    settings: Settings, session: Session, run_logger: RunLogger, batches: Iterator[list[TrainingBatch]]
) -> Row:
    """The run's own metrics over the steps after the warm-up; every step ends with its loss on the CPU."""
    begun = 0.0
    for number, micro_batches in enumerate(run_logger.timed(batches), 1):
        result = train_step(session, micro_batches)
        run_logger.step(result, micro_batches)
        if number == settings.warm_up:
            run_logger.read(result, micro_batches)  # whose reading starts the next
            begun = time.monotonic()
        elif number > settings.warm_up and time.monotonic() - begun >= settings.seconds:
            return _figures(run_logger.read(result, micro_batches)) | {"steps": number - settings.warm_up}
    raise AssertionError("the endless stream of batches ended")


def largest(settings: Settings, architecture: str) -> Iterator[Row]:
    """The largest undivided batch whose gradient fits, not compiled: doubled until out of memory, then bisected.

    First without, then with gradient checkpointing.
    """
    for is_checkpointed in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            session = _open(settings, architecture, folder, checkpointing=is_checkpointed)
            unit = next(session.open_batches())[0]
            name = f"largest batch{', checkpointing' if is_checkpointed else ''}"
            yield from ({"what": name} | row for row in _search(settings, session, unit))
        del session
        _empty_cache()


def _search(settings: Settings, session: Session, unit: TrainingBatch) -> Iterator[Row]:
    """Each batch that fits; is_limit: whether a larger one ran out of memory."""
    size, fitting = len(unit.keys), 0
    for times in itertools.takewhile(lambda times: times * size <= settings.most, _powers_of_two()):
        if not _fits(session, _repeated(unit, times)):
            break
        fitting = times
        yield {"batch": fitting * size, "is_limit": False}
    else:
        return
    half_way = fitting + fitting // 2
    if half_way > fitting and _fits(session, _repeated(unit, half_way)):
        fitting = half_way
    yield {"batch": fitting * size, "is_limit": True}


def _powers_of_two() -> Iterator[int]:
    return (1 << power for power in itertools.count())


def _fits(session: Session, batch: TrainingBatch) -> bool:
    _empty_cache()
    try:
        compute_gradients(session, [batch])
    except torch.OutOfMemoryError:
        return False
    finally:
        session.state.optimizer.zero_grad(set_to_none=True)
    return True


def equality(settings: Settings, architecture: str, *, precision: Precision) -> Iterator[Row]:
    """Gradients of a batch in four micro-batches compared with those of the whole, not compiled."""
    whole = _gradients(settings, architecture, precision, micro_batches=1)
    parted = _gradients(settings, architecture, precision, micro_batches=4)
    norm = sum(float(gradient.square().sum()) for gradient in whole.values()) ** 0.5
    apart = sum(float((parted[name] - whole[name]).square().sum()) for name in whole) ** 0.5
    shared = {name: float(parted[name] / whole[name]) for name in whole if name.startswith("network.logit_")}
    yield {"what": f"equal, {precision}", "difference": apart / norm, "times": shared}


def _gradients(
    settings: Settings, architecture: str, precision: Precision, *, micro_batches: int
) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        micro = settings.equal // micro_batches if micro_batches > 1 else 0
        session = _open(settings, architecture, folder, batch=settings.equal, micro=micro, precision=precision)
        compute_gradients(session, next(session.open_batches()))
    named = session.state.task.named_parameters()
    return {name: weight.grad.double() for name, weight in named if weight.grad is not None}


def exact(settings: Settings, architecture: str) -> Iterator[Row]:
    """Two steps of the large global batch in micro-batches, fed by the loader; the first also compiles."""
    with tempfile.TemporaryDirectory() as folder:
        session = _open(
            settings,
            architecture,
            folder,
            batch=settings.global_batch,
            micro=settings.batch,
            compile=settings.is_compiled,
        )
        with RunLogger(session) as run_logger:
            for number, micro_batches in enumerate(run_logger.timed(session.open_batches()), 1):
                result = train_step(session, micro_batches)
                run_logger.step(result, micro_batches)
                values = run_logger.read(result, micro_batches)
                yield {"what": f"global batch, step {number}", "loss": values["loss"]} | _figures(values)
                if number == 2:
                    return


def _open(
    settings: Settings,
    architecture: str,
    folder: str,
    *,
    batch: int = 0,
    micro: int = 0,
    precision: Precision = "bf16",
    compile: bool = False,
    checkpointing: bool = False,
) -> Session:
    config = TrainConfig(
        data=settings.shards,
        run=str(Path(folder) / "run"),
        batch_size=batch or settings.batch,
        micro_batch=micro,
        steps=_ENDLESS,
        precision=precision,
        model=ModelConfig(architecture=architecture, compile=compile, gradient_checkpointing=checkpointing),
        loader=LoaderConfig(workers=settings.workers, decode_on_device=settings.decode_on_device),
        objective=ObjectiveConfig(objective=settings.objective),
    )
    return open_session(config, resume=False)


def _figures(values: dict[str, Any]) -> Row:
    names = ("samples_per_second", "mfu", "data_wait", "memory_bytes")
    return {name: values[name] for name in names if name in values}


def _repeated(batch: TrainingBatch, times: int) -> TrainingBatch:
    """Repeat the same samples endlessly."""
    return replace(
        batch.changed(lambda tensor: torch.cat([tensor] * times)),
        keys=batch.keys * times,
        drawn=batch.drawn * times,
        sample_indices=batch.sample_indices * times,
        used=batch.used * times,
    )


def _empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
