"""What a run logs: metrics.jsonl, other sinks on request, the progress line, and the data ledger as files.

The ledger is written once for each finished epoch of a source, and once for the whole run.
"""

import contextlib
import io
import json
import logging
import secrets
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch

from vlm.config import flatten_config
from vlm.data.collate import TrainingBatch
from vlm.data.corpus import Corpus
from vlm.data.precomputed_features import IMAGE_FEATURE, TEXT_FEATURE
from vlm.data.sample_ledger import Epoch, Ledger, ShardCount, sum_counts
from vlm.errors import UsageError, VlmError
from vlm.files import compute_fingerprint, write_text
from vlm.train.caption_packing import computed_rows
from vlm.train.distributed import gather_objects, merge_ledgers
from vlm.train.history import METRICS, MetricsLog, write_telemetry
from vlm.train.metrics import (
    ProgressLine,
    StepTimer,
    Utilisation,
    device_peak,
    reduce_over_processes,
)
from vlm.train.objectives.loss_term import Inputs
from vlm.train.recovery import SkippedRange, skipped_sample_blocks
from vlm.train.run_config import TrainConfig
from vlm.train.run_setup import Session
from vlm.train.step import StepResult
from vlm.train.task import example_inputs

logger = logging.getLogger(__name__)


TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID = "wandb-id.txt"
"""File of a run's folder with its id at Weights & Biases, so that a resumed run continues there."""


@runtime_checkable
class MetricsSink(Protocol):
    """Another place than metrics.jsonl that a run's metrics go to: TensorBoard, Weights & Biases, Trackio.

    Each is an extra of this package and imported when it is used. They show what metrics.jsonl holds, which stays the
    record of a run: an interrupted run that is resumed may have sent steps to them that it then repeats.
    """

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The values of one step, of which numbers are shown."""
        ...

    def close(self) -> None:
        """Finish; nothing is written afterwards."""
        ...


class TensorBoardLog:
    """Event files in `folder`; what an interrupted run wrote after `resumed_step` is no longer shown.

    Raises:
        UsageError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "--tensorboard") from error
        # TensorBoard hides events of an interrupted run after this step; the files stay
        self._writer = SummaryWriter(str(folder), purge_step=resumed_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers among the values of one step, and make them visible."""
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbLog:
    """A run of Weights & Biases in a project; its files are in `folder`/wandb. $WANDB_MODE offline keeps it there.

    Raises:
        UsageError: the package wandb is not installed, or it cannot be logged to, e.g. for want of a login.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
            from wandb.errors import Error
        except ImportError as error:
            raise _missing("wandb", "--wandb") from error
        id_file = folder / WANDB_ID
        run_id = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else secrets.token_hex(6)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=str(folder),
                id=run_id,
                resume="allow",
                config=dict(config),
                # it would write to the terminal, and read what others write there
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (Error, OSError) as error:
            raise UsageError(
                f"--wandb {project}: {error} Set WANDB_MODE=offline to keep the run in {folder}, for wandb sync later; "
                "or leave the flag out: metrics.jsonl and curves.png hold the same."
            ) from error
        write_text(id_file, f"{run_id}\n")
        # its own counter of steps must only rise, and a run that rolls back counts them again
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers among the values of one step."""
        self._run.log(numbers(values) | {"step": step})

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


class TrackioLog:
    """A run of a Trackio project on this machine ($TRACKIO_DIR), shown by `trackio show --project PROJECT`.

    Raises:
        UsageError: the package trackio is not installed, or refuses the name of the project.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("trackio", "--trackio") from error
        self._trackio: Any = trackio
        # it prints to stdout, where --json is
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                trackio.init(
                    project=project,
                    name=folder.resolve().name,
                    config=dict(config),
                    resume="allow",
                    embed=False,
                    auto_log_cpu=False,
                    auto_log_gpu=False,
                )
            except (ValueError, OSError) as error:
                raise UsageError(f"--trackio {project}: {error}") from error
        logger.info(f"Trackio: trackio show --project {project}")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers among the values of one step."""
        self._trackio.log(numbers(values), step=step)

    def close(self) -> None:
        """Finish the run there."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()


def open_sinks(config: TrainConfig, folder: Path, *, resumed_step: int) -> list[MetricsSink]:
    """The sinks that are configured, for a run in `folder` that starts or resumes after a step.

    Raises:
        UsageError: a package is missing, or a service refuses.
    """
    settings = flatten_config(asdict(config))
    sinks: list[MetricsSink] = []
    if config.tensorboard:
        sinks.append(TensorBoardLog(folder / TENSORBOARD_FOLDER, resumed_step=resumed_step))
    if config.wandb:
        sinks.append(WandbLog(config.wandb, folder, settings))
    if config.trackio:
        sinks.append(TrackioLog(config.trackio, folder, settings))
    return sinks


def numbers(values: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers among the values.

    >>> numbers({"loss": 1.5, "samples": "1a2b"})
    {'loss': 1.5}
    """
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _missing(package: str, flag: str) -> UsageError:
    return UsageError(
        f"{flag} needs the package {package}: pip install {package}, or leave the flag out; "
        "metrics.jsonl and curves.png hold the same."
    )


LEDGER_FOLDER = "ledger"
_MIN_ALLOWED_BAD = 10
_MAX_TABLE_ROWS = 20


def close_epochs(session: Session, *, before: int) -> None:
    """Write the ledger of every epoch that ended since a position; all processes call it at the same step."""
    corpus = session.corpus
    state = session.state
    finished_before = corpus.order.finished_epochs(before)
    finished_now = corpus.order.finished_epochs(state.position)
    for source, (first, last) in enumerate(zip(finished_before, finished_now, strict=True)):
        for epoch in range(first, last):
            shards = corpus.shards_of(source)
            merged = merge_ledgers(state.ledger)
            counts = merged.close(epoch, shards)
            state.ledger.close(epoch, shards)
            if session.accelerator.is_main_process:
                path = session.folder / LEDGER_FOLDER / f"{corpus.sources[source].name}-epoch-{epoch:05d}.json"
                write_ledger(path, corpus, counts, merged, shards=shards)


def count_skipped_range(session: Session, skipped_range: SkippedRange) -> None:
    """Count the samples that a rollback passes over, and close the epochs they end; all processes call it.

    The main process continues the restored ledger, which is that of all processes.
    """
    order = session.corpus.order
    state = session.state
    if session.accelerator.is_main_process:
        for sample_indices in skipped_sample_blocks(skipped_range, order.locate):
            state.ledger.add_skipped(sample_indices)
    close_epochs(session, before=skipped_range.first)


def write_ledger(path: Path, corpus: Corpus, counts: Epoch, ledger: Ledger, *, shards: Iterable[int]) -> None:
    """Write the counts by shard, their sum, and the samples of these shards that cannot be used."""
    numbers = list(shards)
    num_filtered = 0
    records: list[dict[str, Any]] = []
    for shard in numbers:
        num_filtered += corpus.filtered[shard]
        # none of its samples may have been drawn
        records.append(shard_record(corpus, shard, counts.get(shard, ShardCount())))
    content = {
        "total": sum_counts(counts).to_values() | {"filtered": num_filtered},
        "shards": records,
        "failures": failure_records(corpus, ledger, set(numbers)),
    }
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def shard_record(corpus: Corpus, shard: int, count: ShardCount) -> dict[str, Any]:
    """The counts of one shard; filtered counts the samples its selection leaves out of every epoch."""
    record = {"shard": corpus.shards[shard], "samples": corpus.samples[shard], "filtered": corpus.filtered[shard]}
    return record | count.to_values()


def failure_records(corpus: Corpus, ledger: Ledger, shards: set[int]) -> list[dict[str, Any]]:
    """The samples that cannot be used: shard, number, key, byte offset, reason, detail."""
    records: list[dict[str, Any]] = []
    for (shard, number), record in sorted(ledger.failures.items()):
        if shard in shards:
            records.append({"shard": corpus.shards[shard], "number": number} | record)
    return records


def check_bad_sample_limit(ledger: Ledger, limit: float, corpus: Corpus) -> None:
    """End the run when more samples than allowed cannot be used; the first ten are allowed unless the limit is 0.

    Raises:
        VlmError: naming one of them.
    """
    # a fraction of few samples is no measure: one bad sample among the first fifty would end a run
    allowed = max(limit * ledger.num_requested, _MIN_ALLOWED_BAD) if limit else 0
    if ledger.num_replaced > allowed:
        record = failure_records(corpus, ledger, set(range(len(corpus.shards))))[-1]
        raise VlmError(
            f"{ledger.num_replaced:,} of {ledger.num_requested:,} samples cannot be used, the limit is {limit:.1%}; "
            f"e.g. {record['key']!r} (number {record['number']} of {record['shard']}, byte {record['offset']:,}): "
            f"{record['reason']}: {record['detail']}. See vlm inspect, or raise --max-bad."
        )


def ledger_table(corpus: Corpus, ledger: Ledger) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for people: the sum, then the shards that lost most."""
    counts = ledger.by_shard()
    all_reasons: set[str] = set()
    for count in counts.values():
        all_reasons.update(count.corrupt)
    reasons = sorted(all_reasons)
    columns = ["shard", "samples", "filtered", "asked", "seen", "repeated", "replaced", "stood in", "passed over"]
    columns += reasons
    losing = [shard for shard in counts if counts[shard].replaced]
    losing.sort(key=lambda shard: -counts[shard].replaced)
    rows = [_row("all", sum(corpus.samples), sum(corpus.filtered), sum_counts(counts), reasons)]
    for shard in losing[:_MAX_TABLE_ROWS]:
        name = corpus.shards[shard].rpartition("/")[2]
        rows.append(_row(name, corpus.samples[shard], corpus.filtered[shard], counts[shard], reasons))
    return columns, rows


def _row(name: str, samples: int, filtered: int, count: ShardCount, reasons: list[str]) -> list[Any]:
    numbers = [
        count.requested,
        count.seen,
        count.repeated,
        count.replaced,
        count.used_as_replacement,
        count.skipped,
    ]
    return [name, samples, filtered, *numbers, *(count.corrupt[reason] for reason in reasons)]


# FLOPs are linear in the rows, so a few stand for a whole batch
_ROWS = 2


class RunLogger:
    """Entered for the length of a run; only the main process writes and shows, but all of them count."""

    def __init__(self, session: Session) -> None:
        config, state = session.config, session.state
        self._session = session
        self._is_main = session.accelerator.is_main_process
        # the FLOPs of a sample of full length, for the summary; steps count their own shapes
        examples = example_inputs(state.model, state.task, session.options)
        self.utilisation = Utilisation(
            sample=session.flops.sample_flops(examples),
            peak=device_peak(state.model.device, config.precision, override_tflops=config.peak_tflops),
            processes=session.accelerator.num_processes,
        )
        self._log = MetricsLog(session.folder / METRICS, resumed_step=state.step) if self._is_main else None
        self._sinks = open_sinks(config, session.folder, resumed_step=state.step) if self._is_main else []
        self._exit_stack = contextlib.ExitStack()
        self._timer = self._new_timer()
        self._progress = ProgressLine(steps=session.steps, done=state.step, is_shown=self._is_main)
        if self._is_main:
            write_telemetry(session.folder, steps=session.steps, utilisation=self.utilisation.to_values())
            logger.info(self.utilisation.summary())

    def timed(self, batches: Iterator[list[TrainingBatch]]) -> Generator[list[TrainingBatch], None, None]:
        """Pass the batches on, timing how long each is waited for."""
        return self._timer.timed(batches)

    def step(self, result: StepResult, batches: Sequence[TrainingBatch]) -> None:
        """One more step is done, whether its update was skipped or not."""
        num_samples = 0
        flops = 0.0
        for batch in batches:
            num_samples += len(batch.keys)
            flops += self.flops_of(batch)
        self._timer.tick(decoded=num_samples, flops=flops)
        self._session.state.window.add(result.losses | {"gradient_norm": result.gradient_norm})
        self._progress.step()

    def read(self, result: StepResult, batches: Sequence[TrainingBatch]) -> dict[str, Any]:
        """The values of the steps since the last line, averaged over processes where they differ."""
        state = self._session.state
        samples: list[str] = []
        for batch in batches:
            samples += map("\t".join, zip(batch.keys, batch.captions, strict=True))
        means = {name: float(value) for name, value in state.window.read().items()}
        values: dict[str, Any] = {"loss": sum(means[name] for name in result.losses)} | means
        values |= {
            "learning_rate": result.learning_rate,
            "logit_scale": state.model.logit_scale,
            "seen": state.position,
            "bad": sum(gather_objects([state.ledger.num_replaced])),
            "skipped": len(state.skipped_steps),
            "seconds": state.elapsed_seconds,
        }
        # every process must take part, though only the main one writes
        values |= reduce_over_processes(self._timer.read())
        # equal fingerprints: two runs saw the same samples in the same order, whatever their losses
        values["samples"] = compute_fingerprint(*gather_objects(samples))
        self._progress.update(values)
        return values

    def write(self, values: dict[str, Any]) -> None:
        """A line of metrics for the step that was just done."""
        step = self._session.state.step
        if self._log:
            self._log.write(step, values)
        for sink in self._sinks:
            sink.write(step, values)

    def exclude_time(self, seconds: float) -> None:
        """Leave out time that was spent on neither data nor steps (evaluation, saving)."""
        self._timer.exclude_time(seconds)

    def roll_back(self) -> None:
        """The state is that of an earlier step: remove what was written after it."""
        step = self._session.state.step
        self._timer = self._new_timer()
        if self._log:
            # rewritten without the lines after the step rolled back to
            self._log = MetricsLog(self._session.folder / METRICS, resumed_step=step)
        self._progress.roll_back(step)

    def __enter__(self) -> "RunLogger":
        self._exit_stack.enter_context(self._progress)
        for sink in self._sinks:
            self._exit_stack.callback(sink.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit_stack.close()

    def _new_timer(self) -> StepTimer:
        session = self._session
        return StepTimer(
            session.config.batch_size,
            steps=session.steps,
            done=session.state.step,
            peak=self.utilisation.peak,
        )

    def flops_of(self, batch: TrainingBatch) -> float:
        """FLOPs, forward and backward, of a batch, with each caption as long as it is computed; nan if unknown."""
        inputs, padding = self._inputs_shaped_like(batch), self._session.state.task.padding
        if padding is None:
            return self._session.flops.of(inputs) * len(batch.keys) / _ROWS
        flops = 0.0
        for rows, width in computed_rows(self._session.state.model.network, batch.tokens.numpy(), padding):
            flops += self._session.flops.of(inputs | {"tokens": inputs["tokens"][:, :width]}) * len(rows) / _ROWS
        return flops

    def _inputs_shaped_like(self, batch: TrainingBatch) -> Inputs:
        """Inputs of a few samples, as long and as large as those of a batch, to count FLOPs with."""
        task = self._session.state.task
        view = self._session.state.model.view
        shapes: Inputs = {
            "pixels": torch.empty(_ROWS, 3, view.size, view.size),
            "tokens": batch.tokens[:1].expand(_ROWS, -1),
            "rows": torch.arange(_ROWS),
        }
        for name, rows in batch.arrays.items():
            shapes[name] = rows[:1].expand(_ROWS, -1)
        if batch.sub_tokens is not None:
            shapes["sub_tokens"] = batch.sub_tokens[:1].expand(_ROWS, -1, -1)
        if batch.local_images is not None:
            shapes["local_pixels"] = torch.empty(_ROWS, *batch.local_images.shape[1:])
        names = task.inputs | {"pixels", "tokens", IMAGE_FEATURE, TEXT_FEATURE}
        return {name: value for name, value in shapes.items() if name in names}
