"""A pretraining run as one story: open or resume it, then step, log, evaluate and save until it is done or stopped.

At its end a run leaves the model, the ledger, the curves and the manifest.
"""

import contextlib
import logging
import os
import platform
import signal
import subprocess
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from vlm import __version__
from vlm.data.collate import TrainingBatch
from vlm.data.sample_ledger import Ledger
from vlm.data.shards import shards_fingerprint
from vlm.errors import VlmError
from vlm.manifest import Manifest, write_manifest
from vlm.model_spec import CHECKPOINTS, RUN_MODEL
from vlm.models.load import WEIGHTS, save_model_folder
from vlm.models.low_rank import LORA, merge_adapters
from vlm.models.model import VisionLanguageModel, build_network
from vlm.results import Result
from vlm.tensor_types import Tensor
from vlm.train.checkpoint.checkpoint_files import EMA_WEIGHTS, checkpoint_name, find_damage, new_best
from vlm.train.checkpoint.manager import CheckpointSchedule, CheckpointWriter, any_across_processes
from vlm.train.distributed import merge_ledgers, to_full_tensor, unsharded_weights
from vlm.train.history import (
    DEFAULT_METRIC,
    METRICS,
    evaluations_without_gain,
    format_metric,
    overfitting,
    read_metrics,
)
from vlm.train.logger import (
    RunLogger,
    check_bad_sample_limit,
    close_epochs,
    count_skipped_range,
    ledger_table,
    write_ledger,
)
from vlm.train.metrics import Utilisation
from vlm.train.plots import draw_curves
from vlm.train.recipes import BandReport, compare_with_band, held_out_fingerprint
from vlm.train.recovery import Watchdog, find_lost_worker, lost_worker_error, roll_back, should_roll_back
from vlm.train.run_config import TrainConfig
from vlm.train.run_setup import CONFIG, Session, open_remote_store, open_session
from vlm.train.state import TrainState
from vlm.train.step import train_step
from vlm.train.validation import EvaluationClock

logger = logging.getLogger(__name__)

Batches = Generator[list[TrainingBatch], None, None]
"""Global batches as this process's micro-batches; closing them ends the loader's workers."""

_GIT_SECONDS = 10.0
_THROUGHPUT = ("samples_per_second", "images_per_second", "data_wait", "mfu")


@dataclass(frozen=True, kw_only=True)
class RunSummary(Result):
    """How a run ended: where it is, its counts, its time, the last value of each metric, the ledger as a table.

    samples_per_second: over the whole run, with its evaluations and checkpoints. The metrics of throughput are means
    over the run, too, of its steps alone. band: a run of a preset beside what the preset is expected to end with.
    """

    run: str
    steps: int
    samples: int
    bad_samples: int
    skipped_steps: int
    seconds: float
    samples_per_second: float
    metrics: dict[str, Any]
    ledger: tuple[list[str], list[list[Any]]]
    band: BandReport | None = None


def train(config: TrainConfig, *, resume: bool = False, allow: tuple[str, ...] = ()) -> RunSummary:
    """Train as configured; with `resume`, continue from the newest undamaged checkpoint as if never interrupted.

    allow: keys of the configuration that may differ from those the run was begun with.

    Raises:
        UsageError: the configuration cannot work, or does not fit the run being resumed.
        VlmError: the run had to end: stopped by a signal (after saving), bad steps that rolling back did not cure, too
            many bad samples, a lost worker, no space to save.
    """
    session = open_session(config, resume=resume, allow=allow)
    state = session.state
    safety = config.safety
    schedule = CheckpointSchedule(
        every=safety.checkpoint_every, minutes=safety.checkpoint_minutes, last_saved_seconds=state.elapsed_seconds
    )
    # a resumed run counts the time of its earlier parts too; a monotonic clock, since wall clocks are set back
    started = time.monotonic() - state.elapsed_seconds
    evaluation_clock = open_evaluation_clock(session)
    with (
        reraise_lost_workers(session),
        # entered before the loader's workers are forked, which inherit its handlers
        StopRequest() as stop,
        open_watchdog(session) as watchdog,
        open_writer(session) as writer,
        RunLogger(session) as run_logger,
    ):
        if state.step == 0:
            # what early trouble rolls back to; and better to find now than later that there is no space
            writer.save(state, ledger=merge_ledgers(state.ledger), is_scheduled=True)
        batches = open_batches(session, run_logger)
        while (micro_batches := next(batches, None)) is not None:
            watchdog.set_phase(f"in step {state.step + 1:,}")
            result = train_step(session, micro_batches)
            state.elapsed_seconds = time.monotonic() - started
            run_logger.step(result, micro_batches)
            check_bad_sample_limit(state.ledger, config.loader.max_bad, session.corpus)
            # an epoch may end inside a batch, so every step asks
            close_epochs(session, before=state.position - config.batch_size)

            if should_roll_back(state, safety):
                watchdog.set_phase("rolling back", after=f"step {state.step:,}")
                batches = roll_back_session(session, batches, writer, run_logger)
                continue

            is_last = state.step == session.steps
            is_logged = state.step % config.log_every == 0 or is_last
            values = run_logger.read(result, micro_batches) if is_logged else {}
            before_pause = time.monotonic()
            if log_and_evaluate(session, values, run_logger, evaluation_clock, watchdog, is_last=is_last):
                is_last = True
                batches.close()
            is_stopping = save_if_due(state, writer, schedule, stop, watchdog, is_last=is_last)
            # neither evaluation nor saving may look like slow steps
            run_logger.exclude_time(time.monotonic() - before_pause)
            if is_stopping and not is_last:
                # the upload of this checkpoint must end before the process does
                writer.close()
                session.accelerator.wait_for_everyone()
                raise stopped_error(session, stop)
            watchdog.set_phase("waiting for data", after=f"step {state.step:,}")

    ledger = merge_ledgers(state.ledger)
    finish_run(session, ledger, run_logger.utilisation)
    session.accelerator.wait_for_everyone()
    return summarise(session, ledger)


def open_batches(session: Session, run_logger: RunLogger) -> Batches:
    """The batches from the state's position on, timed; none where the run had stopped early before an interruption."""
    batches = run_logger.timed(session.open_batches())
    if session.state.step and session.config.safety.early_stop and stops_early(session):
        batches.close()
    return batches


def open_evaluation_clock(session: Session) -> EvaluationClock:
    """Says when to evaluate, from now on."""
    return EvaluationClock(
        evaluate_every=session.config.evaluate_every,
        budget=session.config.evaluate_budget,
        started=time.monotonic(),
        is_main=session.accelerator.is_main_process,
    )


def open_watchdog(session: Session) -> Watchdog:
    """Ends the run when a step, or waiting for one, takes too long."""
    accelerator = session.accelerator
    return Watchdog(
        session.folder,
        minutes=session.config.safety.hang_minutes,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def open_writer(session: Session) -> CheckpointWriter:
    """Writes the run's checkpoints in the background."""
    config = session.config
    return CheckpointWriter(
        session.folder / CHECKPOINTS,
        keep=config.safety.keep_checkpoints,
        remote_store=open_remote_store(config),
        is_main=session.accelerator.is_main_process,
    )


@contextlib.contextmanager
def reraise_lost_workers(session: Session) -> Iterator[None]:
    """Turn the error of a killed loader worker into one that says how to resume, once pending writes are finished."""
    try:
        yield
    except (RuntimeError, VlmError) as error:
        match = find_lost_worker(error)
        if match is None:
            raise
        raise lost_worker_error(
            match, run=session.folder, checkpoints=session.folder / CHECKPOINTS, workers=session.config.loader.workers
        ) from error


def roll_back_session(session: Session, batches: Batches, writer: CheckpointWriter, run_logger: RunLogger) -> Batches:
    """Roll back to a checkpoint from before the trouble, and count the samples that are passed over.

    Returns the batches that come after these.
    """
    # ends the workers of the old loader, which are ahead on samples that are passed over now
    batches.close()
    skipped_range = roll_back(
        session.state,
        writer,
        session.folder / CHECKPOINTS,
        remote_store=open_remote_store(session.config),
        is_main=session.accelerator.is_main_process,
    )
    count_skipped_range(session, skipped_range)
    run_logger.roll_back()
    return open_batches(session, run_logger)


def log_and_evaluate(
    session: Session,
    values: dict[str, Any],
    run_logger: RunLogger,
    clock: EvaluationClock,
    watchdog: Watchdog,
    *,
    is_last: bool,
) -> bool:
    """Log the values of a step with those of an evaluation, where one is due; whether the run ends early for these."""
    is_evaluated = bool(session.validation) and (is_last or is_evaluation_due(session, clock))
    if is_evaluated:
        watchdog.set_phase("evaluating", after=f"step {session.state.step:,}")
        started = time.monotonic()
        values = values | evaluate(session)
        clock.add(started, time.monotonic())
    # none at a step that is neither logged nor evaluated
    if values:
        run_logger.write(values)
    return is_evaluated and stops_early(session, values)


def is_evaluation_due(session: Session, clock: EvaluationClock) -> bool:
    """Whether to evaluate at this step; the same on all processes."""
    state = session.state
    if state.step % session.config.evaluate_every:
        return False
    if not session.config.evaluate_budget:
        return True
    # clocks differ between processes, and that of the main one decides
    is_allowed = session.accelerator.is_main_process and clock.allows(time.monotonic())
    return any_across_processes([is_allowed], state.model.device)[0]


def evaluate(session: Session) -> dict[str, float]:
    """The validation with the weights the final model would have; all processes take part, the main one gets it."""
    state = session.state
    config = session.config
    assert session.validation is not None
    state.network.eval()
    validation = session.validation
    ema_weights_applied = session.ema.swapped_in(state.network) if session.ema else contextlib.nullcontext()
    with ema_weights_applied, unsharded_weights(state.task):
        if session.drift is None:
            metrics = validation.measure(state.model, state.step)
        else:
            metrics = session.drift.measure(state.network, lambda: validation.measure(state.model, state.step))
    if session.drift is not None and state.ema_weights is not None:
        # what was drawn back is gone with the EMA that was measured
        session.drift.draw_back(state.network.state_dict())
        session.drift.draw_back(state.ema_weights)
    state.network.train()
    if not session.accelerator.is_main_process:
        return {}
    if config.safety.keep_best:
        state.best = new_best(state.best, config.safety.keep_best, metrics, state.step) or state.best
    return metrics


def stops_early(session: Session, measured: Collection[str] = ()) -> bool:
    """Whether the held-out figures have not improved for so long that the run ends; all processes call it.

    Warns of overfitting on the way.

    measured: the figures that were just measured.
    """
    safety = session.config.safety
    metric = safety.keep_best or DEFAULT_METRIC
    has_stopped = False
    # all that the run has logged is read only where there is something to judge
    if session.accelerator.is_main_process and (safety.early_stop or metric in measured):
        lines = read_metrics(session.folder / METRICS)
        if warning := overfitting(lines, metric):
            logger.warning(warning)
        if safety.early_stop and evaluations_without_gain(lines, metric) >= safety.early_stop:
            has_stopped = True
            logger.info(f"{metric} has not risen for {safety.early_stop} evaluations: the run ends (--early-stop).")
    return any_across_processes([has_stopped], session.state.model.device)[0]


def is_best(state: TrainState) -> bool:
    """Whether the state is the best one measured so far; known on the main process."""
    return state.best is not None and state.best.step == state.step


def finish_run(session: Session, ledger: Ledger, utilisation: Utilisation) -> None:
    """Write model/ (the EMA where one is kept), ledger.json, curves.png, and last the manifest."""
    weights = final_weights(session.state)
    if session.accelerator.is_main_process:
        model = final_model(session.state.model, best_weights(session) or weights)
        _write_run(session, ledger, utilisation, model)
        outputs: set[str] = set()
        for weighted in session.terms:
            outputs.update(weighted.term.outputs)
        # a run that trains no caption decoder has nothing to caption with
        if session.validation and outputs & {"logits", "parallel_logits"}:
            session.validation.check_captions(model)


def best_weights(session: Session) -> dict[str, Tensor] | None:
    """Those of the best checkpoint of a run that stops early; None where the last ones are the best, or are wanted.

    Raises:
        VlmError: the checkpoint is damaged, or gone with another machine's disk, and so is its remote copy.
    """
    best = session.state.best
    if not session.config.safety.early_stop or best is None or best.step == session.state.step:
        return None
    checkpoint = session.folder / CHECKPOINTS / checkpoint_name(best.step)
    damage = find_damage(checkpoint) if checkpoint.is_dir() else "absent"
    remote_store = open_remote_store(session.config)
    # a run that was resumed on another machine fetched the newest one only
    if damage and remote_store and checkpoint.name in remote_store.names():
        damage = remote_store.fetch(checkpoint.name, checkpoint.parent)
    if damage:
        raise VlmError(
            f"{checkpoint}, the best one, cannot be used ({damage}), nor a copy of it: train to the end instead, "
            "with --resume --early-stop 0 --allow safety.early_stop."
        )
    logger.info(f"The model is that of step {best.step:,}: {best.metric} {format_metric(best.metric, best.value)}.")
    return load_file(checkpoint / (EMA_WEIGHTS if session.ema else WEIGHTS))


def final_weights(state: TrainState) -> dict[str, Tensor]:
    """The weights of the final model, whole and on the CPU; all processes call it."""
    held = state.ema_weights if state.ema_weights is not None else state.network.state_dict()
    return {name: to_full_tensor(tensor).detach().cpu() for name, tensor in held.items()}


def final_model(model: VisionLanguageModel, weights: dict[str, Tensor]) -> VisionLanguageModel:
    """The model with these weights, in a network as it is loaded from a folder."""
    # a new network rather than the trained one, which may be sharded, compiled or wrapped
    network = build_network(model.config)
    if "logit_bias" in weights and getattr(network, "logit_bias", None) is None:
        network.register_parameter("logit_bias", nn.Parameter(torch.zeros_like(weights["logit_bias"])))
    fresh = network.state_dict()
    # the EMA of half-precision weights is kept in float32
    network.load_state_dict({name: tensor.to(fresh[name].dtype) for name, tensor in weights.items()})
    config = merge_adapters(network, model.config) if LORA in model.config else model.config
    return replace(model, network=network.eval(), config=config, device=torch.device("cpu"))


def _write_run(session: Session, ledger: Ledger, utilisation: Utilisation, model: VisionLanguageModel) -> None:
    run = session.folder
    state = session.state
    config = session.config
    data = shards_fingerprint(session.corpus.shards)
    save_model_folder(run / RUN_MODEL, model, inputs={"shards": data})
    all_shards = range(len(session.corpus.shards))
    write_ledger(run / "ledger.json", session.corpus, ledger.by_shard(), ledger, shards=all_shards)
    title = f"{run.name}: {config.model.architecture}, {state.step:,} steps of {config.batch_size:,}"
    draw_curves(read_metrics(run / METRICS), run / "curves.png", title=title)
    # last, since a folder with a manifest counts as finished
    write_manifest(
        run,
        Manifest(
            kind="run",
            fingerprint=model.fingerprint,
            counts={"steps": state.step, "samples": state.position, "bad": ledger.num_replaced},
            configuration=asdict(config),
            inputs={"shards": data, "sequence": session.corpus.fingerprint},
            details={
                "sources": [asdict(source) for source in session.corpus.sources],
                "environment": environment(),
                "initial_weights": _initial_weights(state.model.network),
                "utilisation": utilisation.to_values(),
                "skipped": state.skipped,
                "best": asdict(state.best) if state.best else None,
                "repeat": f"vlm train {run / CONFIG} --run NEW",
            },
        ),
    )


def environment() -> dict[str, Any]:
    """What a run was made with: versions, machine, commit."""
    return {
        "vlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of this package; empty where it is in no repository, or git is not installed or does not answer."""
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).resolve().parent
    try:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=folder, check=False, timeout=_GIT_SECONDS
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _initial_weights(network: nn.Module) -> dict[str, Any] | None:
    """What the image tower started from; None if its weights were random, or those of another model."""
    loaded = getattr(getattr(network, "visual", None), "loaded_weights", None)
    return asdict(loaded) if loaded else None


def summarise(session: Session, ledger: Ledger) -> RunSummary:
    """What is reported at the end."""
    # validation metrics are only on some of the lines
    last_values: dict[str, Any] = {}
    lines = read_metrics(session.folder / METRICS)
    state = session.state
    final_step = state.best.step if session.config.safety.early_stop and state.best else state.step
    for line in lines:
        # what the model at the end was measured to be
        last_values |= line if line["step"] <= final_step else {}
    return RunSummary(
        run=str(session.folder),
        steps=state.step,
        samples=state.position,
        bad_samples=ledger.num_replaced,
        skipped_steps=len(state.skipped_steps),
        seconds=state.elapsed_seconds,
        samples_per_second=state.position / max(state.elapsed_seconds, 1e-9),
        metrics=last_values | _throughput_of_run(lines),
        ledger=ledger_table(session.corpus, ledger),
        band=_band(session, lines),
    )


def _band(session: Session, lines: Sequence[Mapping[str, Any]]) -> BandReport | None:
    data = session.validation.data if session.validation else None
    return compare_with_band(
        session.config,
        lines,
        steps=session.state.step,
        samples=session.corpus.order.num_samples,
        held_out=held_out_fingerprint(data.captions) if data else "",
    )


def _throughput_of_run(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The averages over a run of what its lines say of their own steps."""
    averages: dict[str, float] = {}
    for name in _THROUGHPUT:
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            averages[name] = sum(values) / len(values)
    return averages


_HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """While entered, signals are remembered instead of ending the process; a second SIGINT ends it.

    SIGTERM and SIGINT: save and end. SIGUSR1: save and continue, since batch systems warn with it whether or not the
    end follows. Enter it before worker processes are forked: in these SIGUSR1 and SIGINT, which terminals and batch
    systems send to them too, then do nothing, and SIGTERM ends them (those of the loader after a while).
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._is_save_requested = False
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __bool__(self) -> bool:
        return bool(self.signal_name)

    @property
    def is_save_requested(self) -> bool:
        """Whether SIGUSR1 came since the last `mark_saved`."""
        return self._is_save_requested

    def mark_saved(self) -> None:
        """The save that SIGUSR1 asked for is done."""
        self._is_save_requested = False

    def __enter__(self) -> "StopRequest":
        self._process = os.getpid()
        for number in _HANDLED_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._handle_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker, which inherits the handler
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGUSR1:
            self._is_save_requested = True
            logger.info("SIGUSR1: saving after this step; training continues.")
            return
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        logger.info(f"{self.signal_name}: saving after this step; press Ctrl-C again to stop now without saving.")


def save_if_due(
    state: TrainState,
    writer: CheckpointWriter,
    schedule: CheckpointSchedule,
    stop: StopRequest,
    watchdog: Watchdog,
    *,
    is_last: bool,
) -> bool:
    """Save a checkpoint where one is due, at the last step, and before the run stops; whether it stops."""
    # clocks, signals and metrics differ between processes, which must save and stop at the same step
    wants_save = schedule.is_due(state.step, state.elapsed_seconds) or stop.is_save_requested or is_best(state)
    is_stopping, is_due = any_across_processes([bool(stop), wants_save], state.model.device)
    if is_due or is_last or is_stopping:
        watchdog.set_phase("saving", after=f"step {state.step:,}")
        is_scheduled = schedule.is_scheduled(state.step)
        writer.save(state, ledger=merge_ledgers(state.ledger), is_scheduled=is_scheduled)
        schedule.mark_saved(state.elapsed_seconds)
        stop.mark_saved()
    # an error of the thread ends the run at the next step rather than at the next checkpoint
    writer.check()
    return is_stopping


def stopped_error(session: Session, stop: StopRequest) -> VlmError:
    """How to resume a run that a signal has stopped."""
    return VlmError(
        f"Stopped by {stop.signal_name or 'a signal'} after step {session.state.step:,}; everything is saved. "
        f"Resume with: vlm train {session.folder} --resume"
    )
