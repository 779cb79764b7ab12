"""A pretraining run, as one story: open, restore, then step, log, evaluate, save, until done or stopped."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vlm.console import say
from vlm.data.ledger import Ledger
from vlm.errors import VlmError
from vlm.evaluation.retrieval import evaluate_retrieval
from vlm.models.loading import CHECKPOINTS
from vlm.train.accounts import close_epochs, count_passed_over, ledger_table, refuse_too_many_bad
from vlm.train.checkpoints.cadence import Cadence, agree
from vlm.train.checkpoints.retention import improved
from vlm.train.checkpoints.writer import CheckpointWriter
from vlm.train.config import TrainConfig
from vlm.train.finish import finish_run
from vlm.train.guard.lost_worker import explain_lost_worker, lost_worker
from vlm.train.guard.rewind import go_back, must_go_back
from vlm.train.guard.watchdog import Watchdog
from vlm.train.processes import summed_ledger
from vlm.train.recorder import Recorder
from vlm.train.session import Session, open_session
from vlm.train.setup import open_mirror
from vlm.train.sharding import whole_weights
from vlm.train.state import TrainState
from vlm.train.step import take_step
from vlm.train.stopping import StopRequest
from vlm.train.telemetry.metrics import METRICS, read_metrics


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended: where it is, its counts, its time, the last value of each metric, the ledger as a table."""

    run: str
    steps: int
    samples: int
    bad_samples: int
    skipped_steps: int
    seconds: float
    metrics: dict[str, Any]
    ledger: tuple[list[str], list[list[Any]]]


def train(config: TrainConfig, *, resume: bool = False, allow: tuple[str, ...] = ()) -> RunSummary:
    """Train as configured; with `resume`, go on from the newest undamaged checkpoint as if never interrupted.

    allow: keys of the configuration that may differ from those the run was begun with.

    Raises:
        UsageError: the configuration cannot work, or does not fit the run being resumed.
        VlmError: the run had to end: stopped by a signal (after saving), bad steps that going back did not cure, too
            many bad samples, a lost worker, no room to save.
    """
    session = open_session(config, resume=resume, allow=allow)
    state, safety = session.state, config.safety
    cadence = Cadence(
        every=safety.checkpoint_every, minutes=safety.checkpoint_minutes, saved_seconds=state.elapsed_seconds
    )
    begun = time.monotonic() - state.elapsed_seconds
    with (
        explaining_lost_workers(session),
        StopRequest() as stop,
        open_watchdog(session) as watchdog,
        open_writer(session) as writer,
        Recorder(session) as record,
    ):
        if state.step == 0:  # where a run with early trouble goes back to; and better no room now than later
            writer.save(state, ledger=summed_ledger(state.ledger), is_regular=True)
        batches = record.waiting(session.open_batches())
        while (parts := next(batches, None)) is not None:
            watchdog.note(f"in step {state.step + 1:,}")
            result = take_step(session, parts)
            state.elapsed_seconds = time.monotonic() - begun
            record.step(result, parts)
            refuse_too_many_bad(state.ledger, config.loader.max_bad, session.corpus)
            close_epochs(session, before=state.position - config.batch_size)
            if must_go_back(state, safety):
                watchdog.note("going back", after=f"step {state.step:,}")
                batches.close()
                rewind(session, writer, record)
                batches = record.waiting(session.open_batches())
                continue

            is_last = state.step == session.steps
            values: dict[str, Any] = {}
            if state.step % config.log_every == 0 or is_last:
                values = record.read(result, parts)
            before = time.monotonic()
            if session.val_shards and (state.step % config.evaluate_every == 0 or is_last):
                watchdog.note("evaluating", after=f"step {state.step:,}")
                values |= evaluate(session)
            if values:
                record.write(values)
            is_wanted = cadence.is_due(state.step, state.elapsed_seconds) or stop.is_save_wanted or is_best(state)
            is_stopping, is_due = agree([bool(stop), is_wanted], state.model.device)
            if is_due or is_last or is_stopping:
                watchdog.note("saving", after=f"step {state.step:,}")
                writer.save(state, ledger=summed_ledger(state.ledger), is_regular=cadence.is_regular(state.step))
                cadence.saved(state.elapsed_seconds)
                stop.saved()
            writer.check()
            record.leave_out(time.monotonic() - before)
            if is_stopping and not is_last:
                writer.close()
                session.accelerator.wait_for_everyone()
                raise VlmError(
                    f"Stopped by {stop.signal_name or 'a signal'} after step {state.step:,}; all is saved. "
                    f"Go on with: vlm train {session.folder} --resume"
                )
            watchdog.note("waiting for data", after=f"step {state.step:,}")
    ledger = summed_ledger(state.ledger)
    finish_run(session, ledger, record.utilisation)
    session.accelerator.wait_for_everyone()
    return summarise(session, ledger)


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
        mirror=open_mirror(config),
        is_main=session.accelerator.is_main_process,
    )


@contextlib.contextmanager
def explaining_lost_workers(session: Session) -> Iterator[None]:
    """Turn the error of a killed loader worker into one that says how to go on, once what was under way is saved."""
    try:
        yield
    except (RuntimeError, VlmError) as error:
        found = lost_worker(error)
        if found is None:
            raise
        raise explain_lost_worker(
            found, run=session.folder, checkpoints=session.folder / CHECKPOINTS, workers=session.config.loader.workers
        ) from error


def rewind(session: Session, writer: CheckpointWriter, record: Recorder) -> None:
    """Go back to a checkpoint from before the trouble, and count the samples that are passed over."""
    is_main = session.accelerator.is_main_process
    passed = go_back(
        session.state, writer, session.folder / CHECKPOINTS, mirror=open_mirror(session.config), is_main=is_main
    )
    count_passed_over(session, passed)
    record.go_back()


def evaluate(session: Session) -> dict[str, float]:
    """Retrieval on the validation shards with the weights the final model would have; said in one line."""
    state, config = session.state, session.config
    is_main = session.accelerator.is_main_process
    if not is_main and config.sharding == "none":
        return {}
    state.network.eval()
    averaged = session.average.applied(state.network) if session.average else contextlib.nullcontext()
    with averaged, whole_weights(state.student):
        measured = evaluate_retrieval(
            state.model,
            session.val_shards,
            languages=config.loader.languages,
            captions_each=config.val_captions_each,
        )
    state.network.train()
    metrics = measured.metrics()
    if not is_main:
        return {}
    if config.safety.keep_best:
        state.best = improved(state.best, config.safety.keep_best, metrics, state.step) or state.best
    say(
        f"\nstep {state.step:,}: text→image recall@1 {metrics['text_to_image_recall@1']:.1%} "
        f"@10 {metrics['text_to_image_recall@10']:.1%}, image→text @1 {metrics['image_to_text_recall@1']:.1%} "
        f"@10 {metrics['image_to_text_recall@10']:.1%} ({measured.num_images:,} pictures)"
    )
    return metrics


def is_best(state: TrainState) -> bool:
    """Whether the state is the best one measured so far; known on the main process."""
    return state.best is not None and state.best.step == state.step


def summarise(session: Session, ledger: Ledger) -> RunSummary:
    """What is said at the end."""
    last: dict[str, Any] = {}
    for line in read_metrics(session.folder / METRICS):
        last |= line
    state = session.state
    return RunSummary(
        run=str(session.folder),
        steps=state.step,
        samples=state.position,
        bad_samples=ledger.num_replaced,
        skipped_steps=sum("to_step" not in entry for entry in state.skipped),
        seconds=state.elapsed_seconds,
        metrics=last,
        ledger=ledger_table(session.corpus, ledger),
    )
