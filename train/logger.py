"""The data ledger of a run as files: one for each finished epoch of a source, one for the whole.

What a run tells while it goes: lines of metrics, TensorBoard on request, the progress line.
"""

import contextlib
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from vlm.console import say
from vlm.data.collate import TrainingBatch
from vlm.data.corpus import Corpus
from vlm.data.ledger import Epoch, Ledger, ShardCount, total_of
from vlm.errors import VlmError
from vlm.files import fingerprint_of, write_text
from vlm.train.distributed import gathered, summed_ledger
from vlm.train.flops import device_peak
from vlm.train.history import METRICS, MetricsLog, write_telemetry
from vlm.train.metrics import TENSORBOARD_FOLDER, ProgressLine, StepClock, TensorBoardLog, Utilisation, over_processes
from vlm.train.objectives.loss_term import Inputs
from vlm.train.recovery import PassedOver, visits_in
from vlm.train.session import Session
from vlm.train.step import StepResult
from vlm.train.task import example_inputs

LEDGER_FOLDER = "ledger"
_ALLOWED_AT_FIRST = 10


def close_epochs(session: Session, *, before: int) -> None:
    """Write the ledger of every epoch that ended since a position; all processes call it at the same step."""
    corpus, state = session.corpus, session.state
    passed = zip(corpus.order.finished_epochs(before), corpus.order.finished_epochs(state.position), strict=True)
    ended = [(source, epoch) for source, (first, last) in enumerate(passed) for epoch in range(first, last)]
    for source, epoch in ended:
        shards = corpus.shards_of(source)
        whole = summed_ledger(state.ledger)
        counts = whole.close(epoch, shards)
        state.ledger.close(epoch, shards)
        if session.accelerator.is_main_process:
            path = session.folder / LEDGER_FOLDER / f"{corpus.sources[source].name}-epoch-{epoch:05d}.json"
            write_ledger(path, corpus, counts, whole, shards=shards)


def count_passed_over(session: Session, passed: PassedOver) -> None:
    """Count the visits that a run which went back passes over, and close the epochs they end; all processes call it.

    The main process carries on the restored ledger, which is that of all.
    """
    order, state = session.corpus.order, session.state
    if session.accelerator.is_main_process:
        for visits in visits_in(passed, order.locate):
            state.ledger.pass_over(visits)
    close_epochs(session, before=passed.first)


def write_ledger(path: Path, corpus: Corpus, counts: Epoch, ledger: Ledger, *, shards: Iterable[int]) -> None:
    """Counts by shard, their sum, and the samples among these shards that cannot be used."""
    chosen = list(shards)
    content = {
        "total": total_of(counts).to_values() | {"filtered": sum(corpus.filtered[shard] for shard in chosen)},
        "shards": [shard_row(corpus, shard, counts.get(shard, ShardCount())) for shard in chosen],
        "failures": failure_rows(corpus, ledger, set(chosen)),
    }
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def shard_row(corpus: Corpus, shard: int, count: ShardCount) -> dict[str, Any]:
    """What became of one shard's samples; filtered counts the samples its selection leaves out of every epoch."""
    told = {"shard": corpus.shards[shard], "samples": corpus.samples[shard], "filtered": corpus.filtered[shard]}
    return told | count.to_values()


def failure_rows(corpus: Corpus, ledger: Ledger, shards: set[int]) -> list[dict[str, Any]]:
    """The samples that cannot be used: shard, number, key, byte offset, reason, detail."""
    return [
        {"shard": corpus.shards[shard], "number": number} | told
        for (shard, number), told in sorted(ledger.failures.items())
        if shard in shards
    ]


def refuse_too_many_bad(ledger: Ledger, limit: float, corpus: Corpus) -> None:
    """End the run when more samples than allowed cannot be used; the first ten are allowed unless the limit is 0.

    Raises:
        VlmError: naming one of them.
    """
    allowed = max(limit * ledger.num_asked, _ALLOWED_AT_FIRST) if limit else 0
    if ledger.num_replaced > allowed:
        told = failure_rows(corpus, ledger, set(range(len(corpus.shards))))[-1]
        raise VlmError(
            f"{ledger.num_replaced:,} of {ledger.num_asked:,} samples cannot be used, the limit is {limit:.1%}; "
            f"e.g. {told['key']!r} (number {told['number']} of {told['shard']}, byte {told['offset']:,}): "
            f"{told['reason']}: {told['detail']}. See vlm inspect, or raise --max-bad."
        )


def ledger_table(corpus: Corpus, ledger: Ledger, *, most: int = 20) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for people: the sum, then the shards that lost most."""
    counts = ledger.by_shard()
    reasons = sorted({reason for count in counts.values() for reason in count.corrupt})
    columns = ["shard", "samples", "filtered", "asked", "seen", "repeated", "replaced", "stood in", "passed over"]
    columns += reasons
    losing = sorted((shard for shard in counts if counts[shard].replaced), key=lambda shard: -counts[shard].replaced)
    rows = [_row("all", sum(corpus.samples), sum(corpus.filtered), total_of(counts), reasons)]
    for shard in losing[:most]:
        name = corpus.shards[shard].rpartition("/")[2]
        rows.append(_row(name, corpus.samples[shard], corpus.filtered[shard], counts[shard], reasons))
    return columns, rows


def _row(name: str, samples: int, filtered: int, count: ShardCount, reasons: list[str]) -> list[Any]:
    numbers = [count.asked, count.seen, count.repeated, count.replaced, count.stood_in, count.passed_over]
    return [name, samples, filtered, *numbers, *(count.corrupt[reason] for reason in reasons)]


_ROWS = 2


class Recorder:
    """Entered for the length of a run; only the main process writes and shows, all of them count."""

    def __init__(self, session: Session) -> None:
        config, state = session.config, session.state
        self._session = session
        self._is_main = session.accelerator.is_main_process
        examples = example_inputs(state.model, state.student, session.options)
        self.utilisation = Utilisation(
            sample=session.flops.of_sample(examples),
            peak=device_peak(state.model.device, config.precision, given_tflops=config.peak_tflops),
            processes=session.accelerator.num_processes,
        )
        self._log = MetricsLog(session.folder / METRICS, resumed_step=state.step) if self._is_main else None
        self._board = (
            TensorBoardLog(session.folder / TENSORBOARD_FOLDER, resumed_step=state.step)
            if self._is_main and config.tensorboard
            else None
        )
        self._open = contextlib.ExitStack()
        self._clock = self._new_clock()
        self._shown = ProgressLine(steps=session.steps, done=state.step, is_shown=self._is_main)
        if self._is_main:
            write_telemetry(session.folder, steps=session.steps, utilisation=self.utilisation.facts())
            say(self.utilisation.sentence())

    def waiting(self, batches: Iterator[list[TrainingBatch]]) -> Generator[list[TrainingBatch], None, None]:
        """Pass the batches on, counting the time each takes to come."""
        return self._clock.waiting(batches)

    def step(self, result: StepResult, batches: Sequence[TrainingBatch]) -> None:
        """One more step is done, whether its update was skipped or not."""
        decoded = sum(len(batch.keys) for batch in batches)
        flops = sum(self._session.flops.of(self._shapes_of(batch)) * len(batch.keys) / _ROWS for batch in batches)
        self._clock.tick(decoded=decoded, flops=flops)
        self._session.state.window.add(result.parts | {"gradient_norm": result.gradient_norm})
        self._shown.step()

    def read(self, result: StepResult, batches: Sequence[TrainingBatch]) -> dict[str, Any]:
        """The values of the steps since the last line, averaged over processes where they differ."""
        state = self._session.state
        shown = [f"{key}\t{text}" for part in batches for key, text in zip(part.keys, part.captions, strict=True)]
        means = {name: float(value) for name, value in state.window.read().items()}
        values: dict[str, Any] = {"loss": sum(means[name] for name in result.parts)} | means
        values |= {
            "learning_rate": result.learning_rate,
            "logit_scale": state.model.logit_scale,
            "seen": state.position,
            "bad": sum(gathered([state.ledger.num_replaced])),
            "skipped": sum("to_step" not in entry for entry in state.skipped),
            "seconds": state.elapsed_seconds,
        }
        values |= over_processes(self._clock.read())
        values["samples"] = fingerprint_of(*gathered(shown))
        self._shown.update(values)
        return values

    def write(self, values: dict[str, Any]) -> None:
        """A line of metrics for the step that was just done."""
        step = self._session.state.step
        if self._log:
            self._log.write(step, values)
        if self._board:
            self._board.write(step, values)

    def leave_out(self, seconds: float) -> None:
        """Leave out time that was spent on neither data nor steps (evaluation, saving)."""
        self._clock.leave_out(seconds)

    def go_back(self) -> None:
        """The state is that of an earlier step: what was written after it is no more."""
        step = self._session.state.step
        self._clock = self._new_clock()
        if self._log:
            self._log = MetricsLog(self._session.folder / METRICS, resumed_step=step)
        self._shown.go_back(step)

    def __enter__(self) -> "Recorder":
        self._open.enter_context(self._shown)
        if self._board:
            self._open.callback(self._board.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _new_clock(self) -> StepClock:
        session = self._session
        return StepClock(
            session.config.batch_size,
            steps=session.steps,
            done=session.state.step,
            peak=self.utilisation.peak,
        )

    def _shapes_of(self, batch: TrainingBatch) -> Inputs:
        """Inputs of as few samples, as long and as large as those of a batch."""
        student, view = self._session.state.student, self._session.state.model.view
        shapes: Inputs = {
            "pixels": torch.empty(_ROWS, 3, view.size, view.size),
            "tokens": batch.tokens[:1].expand(_ROWS, -1),
            "rows": torch.arange(_ROWS),
        } | {name: rows[:1].expand(_ROWS, -1) for name, rows in batch.arrays.items()}
        if batch.sub_tokens is not None:
            shapes["sub_tokens"] = batch.sub_tokens[:1].expand(_ROWS, -1, -1)
        if batch.local_images is not None:
            shapes["local_pixels"] = torch.empty(_ROWS, *batch.local_images.shape[1:])
        return {name: value for name, value in shapes.items() if name in student.inputs | {"pixels", "tokens"}}
