"""A pretraining run, as one story: open, restore, then step, log, evaluate, save, until done or stopped."""

import time
from dataclasses import dataclass
from typing import Any

from vlm.console import say
from vlm.data.ledger import Ledger
from vlm.errors import VlmError
from vlm.evaluation.retrieval import evaluate_retrieval
from vlm.files import fingerprint_of
from vlm.models.loading import CHECKPOINTS
from vlm.train.accounts import close_epochs, ledger_table, refuse_too_many_bad
from vlm.train.config import TrainConfig
from vlm.train.finish import finish_run
from vlm.train.processes import gathered, is_true_anywhere, mean_of_parts, summed_ledger
from vlm.train.setup import Session, open_session
from vlm.train.state import save_checkpoint
from vlm.train.step import StepResult, train_step
from vlm.train.stopping import StopRequest
from vlm.train.telemetry import METRICS, MetricsLog, ProgressLine, StepClock, read_metrics


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended: where it is, its counts, its time, the last value of each metric, the ledger as a table."""

    run: str
    steps: int
    samples: int
    bad_samples: int
    seconds: float
    metrics: dict[str, Any]
    ledger: tuple[list[str], list[list[Any]]]


def train(config: TrainConfig, *, resume: bool = False) -> RunSummary:
    """Train as configured; with `resume`, go on from the newest undamaged checkpoint as if never interrupted.

    Raises:
        UsageError: the configuration cannot work, or does not fit the run being resumed.
        VlmError: the run had to end: stopped by a signal (after saving), non-finite loss, too many bad samples.
    """
    session = open_session(config, resume=resume)
    state, is_main = session.state, session.accelerator.is_main_process
    log = MetricsLog(session.folder / METRICS, resumed_step=state.step) if is_main else None
    clock, begun = StepClock(config.batch_size), time.monotonic() - state.elapsed_seconds
    with StopRequest() as stop, ProgressLine(steps=session.steps, done=state.step, is_shown=is_main) as shown:
        for batch in clock.waiting(session.batches):
            result = train_step(session, batch)
            state.elapsed_seconds = time.monotonic() - begun
            clock.tick()
            shown.step()
            refuse_too_many_bad(state.ledger, config.loader.max_bad, session.corpus)
            close_epochs(session, before=state.position - config.batch_size)

            is_last = state.step == session.steps
            is_stopping = is_true_anywhere(bool(stop), state.model.device)
            values: dict[str, Any] = {}
            if state.step % config.log_every == 0 or is_last:
                samples = fingerprint_of(
                    *gathered([f"{key}\t{text}" for key, text in zip(batch.keys, batch.captions, strict=True)])
                )
                values = describe_step(session, result) | clock.read() | {"samples": samples}
                shown.update(values)
            before = time.monotonic()
            if session.val_shards and is_main and (state.step % config.evaluate_every == 0 or is_last):
                values |= evaluate(session)
            if log and values:
                log.write(state.step, values)
            if state.step % config.checkpoint_every == 0 or is_last or is_stopping:
                save(session)
            clock.leave_out(time.monotonic() - before)
            if is_stopping and not is_last:
                raise VlmError(
                    f"Stopped by {stop.signal_name or 'a signal'} after step {state.step:,}; all is saved. "
                    f"Go on with: vlm train {session.folder} --resume"
                )
    ledger = summed_ledger(state.ledger)
    if is_main:
        finish_run(session, ledger)
    session.accelerator.wait_for_everyone()
    return summarise(session, ledger)


def describe_step(session: Session, result: StepResult) -> dict[str, Any]:
    """The values of one step, averaged over processes where they differ."""
    state = session.state
    return mean_of_parts(result.parts) | {
        "learning_rate": result.learning_rate,
        "gradient_norm": result.gradient_norm,
        "logit_scale": state.model.logit_scale,
        "seen": state.position,
        "bad": sum(gathered([state.ledger.num_replaced])),
        "seconds": state.elapsed_seconds,
    }


def evaluate(session: Session) -> dict[str, float]:
    """Retrieval on the validation shards, said in one line."""
    network, config = session.state.network, session.config
    network.eval()
    measured = evaluate_retrieval(
        session.state.model,
        session.val_shards,
        languages=config.loader.languages,
        captions_each=config.val_captions_each,
    )
    network.train()
    metrics = measured.metrics()
    say(
        f"\nstep {session.state.step:,}: text→image recall@1 {metrics['text_to_image_recall@1']:.1%} "
        f"@10 {metrics['text_to_image_recall@10']:.1%}, image→text @1 {metrics['image_to_text_recall@1']:.1%} "
        f"@10 {metrics['image_to_text_recall@10']:.1%} ({measured.num_images:,} pictures)"
    )
    return metrics


def save(session: Session) -> None:
    """Write a checkpoint with the ledger of all processes."""
    state = session.state
    whole = summed_ledger(state.ledger)
    if session.accelerator.is_main_process:
        own, state.ledger = state.ledger, whole
        save_checkpoint(session.folder / CHECKPOINTS, state, keep=session.config.keep_checkpoints)
        state.ledger = own
    session.accelerator.wait_for_everyone()


def summarise(session: Session, ledger: Ledger) -> RunSummary:
    """What is said at the end."""
    last: dict[str, Any] = {}
    for line in read_metrics(session.folder / METRICS):
        last |= line
    return RunSummary(
        run=str(session.folder),
        steps=session.state.step,
        samples=session.state.position,
        bad_samples=ledger.num_replaced,
        seconds=session.state.elapsed_seconds,
        metrics=last,
        ledger=ledger_table(session.corpus, ledger),
    )
