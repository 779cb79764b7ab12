"""What a run does in trouble: it skips a bad step, rolls back to a checkpoint, or ends saying where it hangs.

A loss or gradient that is not finite, or a loss spike, must not reach the weights: the step's update is skipped. That
does not help when the trouble is where the weights have come to: passing over the skipped batches alone would lead
there again. So, as in PaLM (Chowdhery et al. 2022, §5.1), the run rolls back to a checkpoint from before the trouble
and passes over every sample from there to its end. All of it follows from the state and from the checkpoints that are
due by step, so a run killed in the midst of trouble takes the same course.
"""

import contextlib
import faulthandler
import logging
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TextIO, TypeVar

import psutil
import torch
from torch import nn

from vlm.errors import VlmError
from vlm.tensor_types import Tensor
from vlm.train.checkpoint.checkpoint_files import (
    CheckpointInfo,
    checkpoint_name,
    find_damage,
    list_checkpoint_infos,
    list_checkpoints,
)
from vlm.train.checkpoint.manager import CheckpointWriter, RemoteCheckpointStore, broadcast_path, restore
from vlm.train.run_config import SafetyConfig
from vlm.train.state import TrainState

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS_KEPT = 1000
# before that the loss falls by more per step than it scatters
_MIN_LOSSES = 20
_MAD_TO_STD = 1.4826
_MIN_RELATIVE_DEVIATION = 1e-3
_BLOCK_SAMPLES = 1 << 16

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step whose update was skipped. position: of its first sample in the run."""

    step: int
    position: int
    reason: str
    first_key: str
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class SkippedRange:
    """The samples at positions [first, last), which the run passes over since it rolled back between these steps."""

    from_step: int
    to_step: int
    first: int
    last: int
    reason: str


def skip_reason(
    loss_terms: Mapping[str, float], gradient_norm: float, losses: Sequence[float], *, spike_factor: float = 0.0
) -> str:
    """Why the update of a step is to be skipped; empty where it is good.

    loss_terms: the weighted losses, and gradient_norm: the norm before clipping, both as all processes agree on them.
    losses: of the last good steps. spike_factor: see `spike_threshold`; 0 lets every finite loss pass.

    >>> skip_reason({"clip": math.nan}, 1.0, [])
    'the loss clip is nan'
    >>> skip_reason({"clip": 9.0}, 1.0, [1.0, 1.1] * 10, spike_factor=6.0)
    'the loss 9 is above 1.495 = median 1.05 + 6 x 0.07413'
    """
    for name, value in loss_terms.items():
        if not math.isfinite(value):
            return f"the loss {name} is {value}"
    if not math.isfinite(gradient_norm):
        return f"the gradient's norm is {gradient_norm}"
    loss = sum(loss_terms.values())
    limit, explanation = spike_threshold(losses, spike_factor)
    return f"the loss {loss:.4g} is above {limit:.4g} = {explanation}" if loss > limit else ""


def spike_threshold(losses: Sequence[float], factor: float) -> tuple[float, str]:
    """The loss above which a step is a spike, and its formula; infinity with factor 0 or too few losses.

    It is the median plus `factor` deviations, of which one is 1.4826 times the median absolute deviation (the standard
    deviation, where losses are normally distributed: Rousseeuw and Croux 1993, §1), and at least 0.1% of the median.
    """
    if not factor or len(losses) < _MIN_LOSSES:
        return math.inf, ""
    middle = median(losses)
    spread = _MAD_TO_STD * median(abs(loss - middle) for loss in losses)
    # a loss that has stopped changing has next to no spread, and any step would be a spike
    deviation = max(spread, _MIN_RELATIVE_DEVIATION * abs(middle))
    return middle + factor * deviation, f"median {middle:.4g} + {factor:g} x {deviation:.4g}"


def copy_running_stats(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers that a forward pass changes (of batch normalisation), each with a copy of its values now."""
    statistics: list[tuple[Tensor, Tensor]] = []
    for layer in module.modules():
        # layers in evaluation mode (frozen ones) do not change
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training:
            for buffer in layer.buffers():
                statistics.append((buffer, buffer.clone()))
    return statistics


@torch.no_grad()
def restore_running_stats(statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Undo what forward passes have done to the buffers since."""
    for buffer, before in statistics:
        buffer.copy_(before)


def record_skipped_step(state: TrainState, skipped: SkippedStep) -> None:
    """Record a skipped step in the state, and log it."""
    state.spike_guard.reject()
    state.skipped.append(asdict(skipped))
    # a run that skips for ever must not grow its checkpoints
    skipped_steps = state.skipped_steps
    if len(skipped_steps) > MAX_SKIPPED_STEPS_KEPT:
        state.skipped.remove(skipped_steps[0])
    logger.warning(f"step {skipped.step:,} is skipped: {skipped.reason} (first sample {skipped.first_key!r}).")


def should_roll_back(state: TrainState, safety: SafetyConfig) -> bool:
    """Whether too many steps in a row were skipped.

    Raises:
        VlmError: and the run has rolled back as often as it may.
    """
    if state.spike_guard.in_a_row < safety.skip_limit:
        return False
    if state.num_rollbacks >= safety.rewind_limit:
        why = f"the run has rolled back {state.num_rollbacks} times, the limit"
        raise VlmError(_unrecoverable_message(state, why))
    return True


def roll_back(
    state: TrainState,
    writer: CheckpointWriter,
    folder: Path,
    *,
    remote_store: RemoteCheckpointStore | None = None,
    is_main: bool = True,
) -> SkippedRange:
    """Restore a checkpoint from before the trouble, and put the position past the trouble; all processes call it.

    Afterwards the loader has to be opened again at `state.position` for the remaining steps, and the samples passed
    over counted in the ledger of the main process, which continues that of all processes.

    Raises:
        VlmError: there is no checkpoint from before the trouble.
    """
    # the checkpoint being written may be the one to roll back to, and must not be half-written
    writer.wait()
    path = broadcast_path(lambda: _rollback_target(state, folder, remote_store), is_main=is_main)
    if path is None:
        raise VlmError(_unrecoverable_message(state, f"no undamaged checkpoint in {folder} is older than that"))

    # what must survive the restore, which overwrites the state
    from_step = state.step
    end_of_trouble = state.position
    reason = state.skipped[-1]["reason"]
    num_rollbacks = state.num_rollbacks
    elapsed_seconds = state.elapsed_seconds
    restore(path, state, is_main=is_main)

    skipped_range = SkippedRange(
        from_step=from_step, to_step=state.step, first=state.position, last=end_of_trouble, reason=reason
    )
    state.skipped.append(asdict(skipped_range))
    state.position = end_of_trouble
    state.num_rollbacks = num_rollbacks + 1
    state.elapsed_seconds = elapsed_seconds
    # later checkpoints belong to the course that was given up; a resumed run must not find them
    writer.roll_back(state.step)
    if is_main:
        logger.warning(
            f"Rolled back from step {from_step:,} to {state.step:,} (rollback {state.num_rollbacks}): {reason}. "
            f"Passing over {end_of_trouble - skipped_range.first:,} samples, positions {skipped_range.first:,} to "
            f"{end_of_trouble - 1:,}."
        )
    return skipped_range


def skipped_sample_blocks(
    skipped_range: SkippedRange, locate: Callable[[Sequence[int]], Sequence[Item]]
) -> Iterator[Sequence[Item]]:
    """The samples that were passed over, in blocks, as `SampleOrder.locate` finds them."""
    for start in range(skipped_range.first, skipped_range.last, _BLOCK_SAMPLES):
        yield locate(range(start, min(start + _BLOCK_SAMPLES, skipped_range.last)))


def choose_rollback_target(
    checkpoints: Sequence[CheckpointInfo], *, instability_start: int, last_target: int | None
) -> CheckpointInfo | None:
    """The checkpoint to roll back to.

    It is the newest good one from before the trouble that was due by its step, or, where there is none, any good one.
    If the run rolled back to just that one the last time, it is the one before it.

    instability_start: the last step before the trouble. last_target: the step last rolled back to.

    >>> checkpoints = [CheckpointInfo(step=step, is_scheduled=True, is_good=True) for step in (10, 20, 30)]
    >>> [choose_rollback_target(checkpoints, instability_start=25, last_target=last).step for last in (None, 20, 10)]
    [20, 10, 20]
    """
    good: list[CheckpointInfo] = []
    for info in sorted(checkpoints, key=lambda info: info.step):
        if info.is_good and info.step <= instability_start:
            good.append(info)
    # an interrupted run has the same scheduled checkpoints, but not those a signal or the clock asked for
    candidates = [info for info in good if info.is_scheduled] or good
    if len(candidates) > 1 and candidates[-1].step == last_target:
        return candidates[-2]
    return candidates[-1] if candidates else None


def _rollback_target(state: TrainState, folder: Path, remote_store: RemoteCheckpointStore | None) -> Path | None:
    """The folder of the checkpoint to roll back to; damaged ones are left out, one that is only a copy is fetched."""
    local = {checkpoint_name(info.step): info for info in list_checkpoint_infos(folder)}
    remote = remote_store.infos() if remote_store else {}
    # remote ones too, since an interrupted run that was resumed elsewhere must roll back to the same checkpoint
    candidates = remote | local
    earlier_targets = [entry["to_step"] for entry in state.skipped if "to_step" in entry]
    while candidates:
        target = choose_rollback_target(
            list(candidates.values()),
            instability_start=state.step - state.spike_guard.in_a_row,
            last_target=earlier_targets[-1] if earlier_targets else None,
        )
        if target is None:
            return None

        name = checkpoint_name(target.step)
        damage = find_damage(folder / name) if name in local else "absent"
        if damage and remote_store and name in remote:
            damage = remote_store.fetch(name, folder)
        if not damage:
            return folder / name
        logger.warning(f"{folder / name} is damaged ({damage}); trying the one before it.")
        del candidates[name]
    return None


def _unrecoverable_message(state: TrainState, why: str) -> str:
    unstable_steps = state.skipped_steps[-state.spike_guard.in_a_row :]
    details: list[str] = []
    for entry in unstable_steps[:5]:
        details.append(f"step {entry['step']:,}: {entry['reason']}, from {entry['first_key']!r}")
    more = f" and {len(unstable_steps) - 5} more" if len(unstable_steps) > 5 else ""
    learning_rate = unstable_steps[-1]["learning_rate"]
    return (
        f"{state.spike_guard.in_a_row} steps in a row could not be used ({'; '.join(details)}{more}), and {why}. The "
        f"learning rate was {learning_rate:.3g}; the weights are unchanged since before these steps. Try a lower "
        "--learning-rate, more --warmup-steps, --precision fp32, or look at these samples with vlm inspect; then "
        "resume from a checkpoint with --resume (and --allow for what you change)."
    )


_SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz", ".part")
_OTHER_PROCESSES_GRACE_SECONDS = 5.0


class Watchdog:
    """While entered, ends the process with exit code 1 when one phase takes longer than `minutes`.

    Before that it writes the stacks of all threads, the state of the worker processes and the shards they have open to
    `folder/hang-PROCESS.txt`.

    minutes: 0 waits for ever. process: number of this process among `num_processes`.
    fallback_seconds: should even its thread be unable to run, because foreign code holds Python's lock, the stacks go
        to stderr this much later.
    """

    def __init__(
        self,
        folder: Path,
        *,
        minutes: float,
        process: int = 0,
        num_processes: int = 1,
        fallback_seconds: float = 30.0,
    ) -> None:
        self._folder = folder
        self._seconds = 60 * minutes
        self._process_label = f"process {process} of {num_processes}"
        self._path = folder / f"hang-{process}.txt"
        self._grace = _OTHER_PROCESSES_GRACE_SECONDS if num_processes > 1 else 0.0
        self._fallback_seconds = fallback_seconds
        self._phase = "starting"
        self._phase_started = time.monotonic()
        self._last_event = "starting"
        self._ended = threading.Event()
        # a thread, since a signal handler would not run while the main thread is in foreign code
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def set_phase(self, phase: str, *, after: str = "") -> None:
        """This begins now (`waiting for data`, `in step 12`, `saving`); the time is counted from here.

        after: what is known of the run by now, e.g. the last step.
        """
        self._phase = phase
        self._phase_started = time.monotonic()
        self._last_event = after or self._last_event
        self._arm_fallback()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._path.unlink(missing_ok=True)
            self.set_phase(self._phase)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def _arm_fallback(self) -> None:
        """faulthandler's own thread needs no Python lock, so it works where `_watch` cannot run."""
        if self._seconds:
            late = self._seconds + self._grace + self._fallback_seconds
            faulthandler.dump_traceback_later(late, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 10, 1.0)):
            if time.monotonic() - self._phase_started > self._seconds:
                self._terminate()

    def _terminate(self) -> None:
        """Report what is known and end the process, without the clean-up that would hang too."""
        seconds = time.monotonic() - self._phase_started
        headline = (
            f"{self._process_label[0].upper()}{self._process_label[1:]} (pid {os.getpid()}) "
            f"has been {self._phase} for {seconds / 60:.2g} min, "
            f"the limit (--watchdog-minutes); before that: {self._last_event}"
        )
        workers = describe_workers()
        with contextlib.suppress(OSError), self._path.open("w", encoding="utf-8") as file:
            self._write_report(file, headline, workers)

        details = f" Workers: {'; '.join(workers)}." if workers else ""
        # not logged: the thread that hangs may hold the lock of a log handler
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(
                f"\n{headline}.{details} Where each thread stands: {self._path}. "
                f"Resume from the last checkpoint with: vlm train {self._folder} --resume\n"
            )
            sys.stderr.flush()

        for worker in multiprocessing.active_children():  # one that hangs does not notice that its parent is gone
            worker.kill()
        time.sleep(self._grace)  # for the other processes to write theirs, before the launcher ends them
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        # sys.exit only ends this thread, and exit handlers would wait for the hanging ones
        os._exit(1)

    def _write_report(self, file: TextIO, headline: str, workers: list[str]) -> None:
        lines = [headline, *(f"worker: {line}" for line in workers), ""]
        file.write("\n".join(lines) + "\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.flush()
        os.fsync(file.fileno())


def describe_workers() -> list[str]:
    """A line for each worker process: its pid, what the system says of it, the shards it has open."""
    lines: list[str] = []
    for worker in multiprocessing.active_children():
        pid = worker.pid or 0
        try:
            status = psutil.Process(pid).status()
        except psutil.Error:
            status = "gone"
        shards = ", ".join(open_shard_paths(pid)) or "no shard"
        lines.append(f"pid {pid} ({status}) has {shards} open")
    return lines


def open_shard_paths(pid: int) -> list[str]:
    """The shards a process has open, where the system tells (Linux); the files themselves are not touched."""
    open_files: set[str] = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                open_files.add(os.readlink(entry.path))
    return sorted(path for path in open_files if path.endswith(_SHARD_ENDINGS))


# what torch's DataLoader raises when the system has killed one of its workers
_LOST_WORKER_PATTERN = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pid>[\d, ]+)\)(?P<how>[^\n.)]*)")


def find_lost_worker(error: BaseException) -> re.Match[str] | None:
    """Which worker an error, or best what first caused it, says was lost; None if it names none."""
    match: re.Match[str] | None = None
    cause: BaseException | None = error
    while cause is not None:
        match = _LOST_WORKER_PATTERN.search(str(cause)) or match
        # torch raises several errors in a row: the innermost one names the worker that died first
        cause = cause.__cause__
    return match


def lost_worker_error(match: re.Match[str], *, run: Path, checkpoints: Path, workers: int) -> VlmError:
    """The message, once the writer has finished: pid and end of the worker, memory now, newest checkpoint, command."""
    free = psutil.virtual_memory().available
    saved = "No checkpoint was due yet."
    newest = list_checkpoints(checkpoints)[-1:]
    if newest:
        step = int(newest[0].name.rpartition("-")[2])
        saved = f"Everything up to step {step:,} is saved ({newest[0]})."
    return VlmError(
        f"Loader worker with pid {match['pid'].strip()} of {workers} was lost: {match['how'].strip()}. Most often the "
        f"system kills one because it is out of memory ({free / 2**30:.1f} GiB are free now; see dmesg): use fewer "
        f"--workers, a smaller --batch-size or --shuffle-window. {saved} Resume with: vlm train {run} --resume"
    )
