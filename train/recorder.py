"""What a run tells while it goes: lines of metrics, TensorBoard on request, the progress line."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from vlm.console import say
from vlm.data.training_batches import TrainingBatch
from vlm.files import fingerprint_of
from vlm.train.objectives.term import Inputs
from vlm.train.processes import gathered
from vlm.train.session import Session
from vlm.train.step import StepResult
from vlm.train.student import example_inputs
from vlm.train.telemetry.clock import StepClock, Utilisation, over_processes
from vlm.train.telemetry.metrics import METRICS, MetricsLog
from vlm.train.telemetry.peaks import device_peak
from vlm.train.telemetry.progress import ProgressLine
from vlm.train.telemetry.runs import write_telemetry
from vlm.train.telemetry.tensorboard import FOLDER, TensorBoardLog

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
            TensorBoardLog(session.folder / FOLDER, resumed_step=state.step)
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
