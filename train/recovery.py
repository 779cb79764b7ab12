"""A loader worker that was killed, told so that one knows which, why, and how to go on.

A run that hangs ends, saying where: which process, doing what, with which workers reading which shards.

Going back: when skipping does not help, to a checkpoint from before the trouble, and on past its samples.

The trouble is where the weights came to, so passing over only the batches that were skipped would lead there again;
as in PaLM (Chowdhery et al. 2022, §5.1) everything from the checkpoint to the end of the trouble is passed over.
All of it follows from the state and from the checkpoints that are due by step, so a run killed in the midst of trouble
goes the same way.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import psutil

from vlm.console import say
from vlm.errors import VlmError
from vlm.train.checkpoint.format import (
    CheckpointInfo,
    checkpoint_name,
    find_damage,
    list_checkpoint_infos,
    list_checkpoints,
)
from vlm.train.checkpoint.manager import CheckpointWriter, broadcast_path, restore
from vlm.train.checkpoint.remote_checkpoints import RemoteCheckpointStore
from vlm.train.run_config import SafetyConfig
from vlm.train.state import TrainState

_LOST_WORKER_PATTERN = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pid>[\d, ]+)\)(?P<how>[^\n.)]*)")


def find_lost_worker(error: BaseException) -> re.Match[str] | None:
    """Which worker an error, or best what first caused it, says was lost; None if it says no such thing."""
    found: re.Match[str] | None = None
    cause: BaseException | None = error
    while cause is not None:
        found = _LOST_WORKER_PATTERN.search(str(cause)) or found
        cause = cause.__cause__
    return found


def lost_worker_error(found: re.Match[str], *, run: Path, checkpoints: Path, workers: int) -> VlmError:
    """The message, once the writer has finished: pid and end of the worker, memory now, newest checkpoint, command."""
    free = psutil.virtual_memory().available
    whole = list_checkpoints(checkpoints)
    saved = (
        f"All until step {int(whole[-1].name.rpartition('-')[2]):,} is saved ({whole[-1]})."
        if whole
        else "No checkpoint was due yet."
    )
    return VlmError(
        f"Loader worker with pid {found['pid'].strip()} of {workers} was lost: {found['how'].strip()}. Most often the "
        f"system ends one for want of memory ({free / 2**30:.1f} GiB are free now; see dmesg): take fewer --workers, a "
        f"smaller --batch-size or --shuffle-window. {saved} Go on with: vlm train {run} --resume"
    )


_SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz", ".part")
_OTHER_PROCESSES_GRACE_SECONDS = 5.0
_FALLBACK_SECONDS = 30.0


class Watchdog:
    """While entered, ends the process with exit code 1 when one thing takes longer than `minutes`.

    Before that it writes the stacks of all threads, the state of the worker processes and the shards they have open to
    `folder/hang-PROCESS.txt`. Should even its thread be unable to run, because foreign code holds Python's lock, the
    stacks go to stderr half a minute later.

    minutes: 0 waits for ever. process: number of this process among `num_processes`.
    reading: where the loader tells it, the shard each worker read last, by pid.
    """

    def __init__(
        self,
        folder: Path,
        *,
        minutes: float,
        process: int = 0,
        num_processes: int = 1,
        reading: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self._folder, self._seconds = folder, 60 * minutes
        self._process_label = f"process {process} of {num_processes}"
        self._path = folder / f"hang-{process}.txt"
        self._grace = _OTHER_PROCESSES_GRACE_SECONDS if num_processes > 1 else 0.0
        self._reading = reading
        self._phase, self._phase_started, self._last_event = "starting", time.monotonic(), "starting"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def set_phase(self, phase: str, *, after: str = "") -> None:
        """This begins now: `waiting for data`, `step 12`, `saving`; the time starts anew.

        after: what is known of the run by now, e.g. the last step.
        """
        self._phase, self._phase_started = phase, time.monotonic()
        self._last_event = after or self._last_event
        self._arm()

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

    def _arm(self) -> None:
        if self._seconds:
            late = self._seconds + self._grace + _FALLBACK_SECONDS
            faulthandler.dump_traceback_later(late, exit=True, file=sys.__stderr__ or 2)

    def _watch(self) -> None:
        while not self._ended.wait(min(self._seconds / 10, 1.0)):
            if time.monotonic() - self._phase_started > self._seconds:
                self._terminate()

    def _terminate(self) -> None:
        """Tell what is known and end the process, without the clean-up that would hang too."""
        phase, seconds = self._phase, time.monotonic() - self._phase_started
        headline = (
            f"{self._process_label[0].upper()}{self._process_label[1:]} (pid {os.getpid()}) "
            f"has been {phase} for {seconds / 60:.2g} min, "
            f"the limit (--hang-minutes); before that: {self._last_event}"
        )
        workers = describe_workers(self._reading() if self._reading else {})
        with contextlib.suppress(OSError), self._path.open("w", encoding="utf-8") as file:
            self._write(file, headline, workers)
        details = f" Workers: {'; '.join(workers)}." if workers else ""
        say(
            f"\n{headline}.{details} Where each thread stands: {self._path}. "
            f"Go on from the last checkpoint with: vlm train {self._folder} --resume"
        )
        for worker in multiprocessing.active_children():  # one that hangs does not notice that its parent is gone
            worker.kill()
        time.sleep(self._grace)  # for the other processes to write theirs, before the launcher ends them
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)

    def _write(self, file: TextIO, headline: str, workers: list[str]) -> None:
        print(headline, *(f"worker: {line}" for line in workers), "", sep="\n", file=file, flush=True)
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.flush()
        os.fsync(file.fileno())


def describe_workers(reading: Mapping[int, str]) -> list[str]:
    """A line for each worker process: pid, what the system says of it, the shard it read last or those it has open."""
    lines: list[str] = []
    for worker in multiprocessing.active_children():
        pid = worker.pid or 0
        try:
            status = psutil.Process(pid).status()
        except psutil.Error:
            status = "gone"
        opened = ", ".join(open_shard_paths(pid)) or "no shard"
        shard = f"read {reading[pid]} last" if pid in reading else f"has {opened} open"
        lines.append(f"pid {pid} ({status}) {shard}")
    return lines


def open_shard_paths(pid: int) -> list[str]:
    """The shards a process has open, where the system tells (Linux); the files themselves are not touched."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(entry.path))
    return sorted({path for path in found if path.endswith(_SHARD_ENDINGS)})


MAX_SKIPPED_STEPS_KEPT = 1000
_BLOCK_SAMPLES = 1 << 16

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step that left the weights as they were. position: of its first sample in the run."""

    step: int
    position: int
    reason: str
    first_key: str
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class SkippedRange:
    """The samples at positions [first, last), which the run passes over since it went back from one step to another."""

    from_step: int
    to_step: int
    first: int
    last: int
    reason: str


def record_skipped_step(state: TrainState, skipped: SkippedStep) -> None:
    """Record a skipped step in the state, and say it."""
    state.spike_guard.reject()
    state.skipped.append(asdict(skipped))
    steps = [number for number, entry in enumerate(state.skipped) if "to_step" not in entry]
    if len(steps) > MAX_SKIPPED_STEPS_KEPT:
        del state.skipped[steps[0]]
    say(f"\nstep {skipped.step:,} is skipped: {skipped.reason} (first sample {skipped.first_key!r}).")


def should_roll_back(state: TrainState, safety: SafetyConfig) -> bool:
    """Whether skipping has gone on for too long.

    Raises:
        VlmError: and the run has gone back as often as it may.
    """
    if state.spike_guard.in_a_row < safety.skip_limit:
        return False
    if state.num_rollbacks >= safety.rewind_limit:
        raise VlmError(_unrecoverable_message(state, f"the run has gone back {state.num_rollbacks} times, the limit"))
    return True


def roll_back(
    state: TrainState,
    writer: CheckpointWriter,
    folder: Path,
    *,
    remote_store: RemoteCheckpointStore | None = None,
    is_main: bool = True,
) -> SkippedRange:
    """Restore the checkpoint to go back to, and put the position past the trouble; all processes call it.

    Afterwards the loader is to be opened again at `state.position` for the steps that are left, and the samples passed
    over are to be counted in the ledger of the main process, which carries on that of all.

    Raises:
        VlmError: there is no checkpoint from before the trouble.
    """
    writer.wait()
    path = broadcast_path(lambda: _rollback_target(state, folder, remote_store), is_main=is_main)
    if path is None:
        raise VlmError(_unrecoverable_message(state, f"no undamaged checkpoint in {folder} is older than that"))
    from_step, last = state.step, state.position
    reason, num_rollbacks, seconds = state.skipped[-1]["reason"], state.num_rollbacks, state.elapsed_seconds
    restore(path, state, is_main=is_main)
    skipped_range = SkippedRange(
        from_step=from_step, to_step=state.step, first=state.position, last=last, reason=reason
    )
    state.skipped.append(asdict(skipped_range))
    state.position, state.num_rollbacks, state.elapsed_seconds = last, num_rollbacks + 1, seconds
    writer.roll_back(state.step)
    if is_main:
        say(
            f"\nBack from step {from_step:,} to {state.step:,} (rewind {state.num_rollbacks}): {reason}. Passing over "
            f"{last - skipped_range.first:,} samples, positions {skipped_range.first:,} to {last - 1:,}."
        )
    return skipped_range


def skipped_sample_blocks(
    skipped_range: SkippedRange, locate: Callable[[Sequence[int]], Sequence[Item]]
) -> Iterator[Sequence[Item]]:
    """The visits that were passed over, in blocks, as `Order.locate` finds them."""
    for start in range(skipped_range.first, skipped_range.last, _BLOCK_SAMPLES):
        yield locate(range(start, min(start + _BLOCK_SAMPLES, skipped_range.last)))


def choose_rollback_target(
    found: Sequence[CheckpointInfo], *, instability_start: int, last_target: int | None
) -> CheckpointInfo | None:
    """The checkpoint to go back to.

    It is the newest good one from before the trouble that was due by its step, or, where there is none, any good one.
    If the run went back to just that one the last time, it is the one before it.

    trouble_since: the last step before the trouble. tried: the step last gone back to.

    >>> found = [CheckpointInfo(step=step, is_scheduled=True, is_good=True) for step in (10, 20, 30)]
    >>> [choose_rollback_target(found, instability_start=25, last_target=last).step for last in (None, 20, 10)]
    [20, 10, 20]
    """
    older = sorted((info for info in found if info.is_good and info.step <= instability_start), key=lambda f: f.step)
    fitting = [info for info in older if info.is_scheduled] or older
    if len(fitting) > 1 and fitting[-1].step == last_target:
        return fitting[-2]
    return fitting[-1] if fitting else None


def _rollback_target(state: TrainState, folder: Path, remote_store: RemoteCheckpointStore | None) -> Path | None:
    """The folder of the checkpoint to go back to; damaged ones are left out, and one that is only a copy is fetched."""
    own = {checkpoint_name(info.step): info for info in list_checkpoint_infos(folder)}
    copied = remote_store.infos() if remote_store else {}
    found = copied | own
    rollback_targets = [entry["to_step"] for entry in state.skipped if "to_step" in entry]
    while found:
        chosen = choose_rollback_target(
            list(found.values()),
            instability_start=state.step - state.spike_guard.in_a_row,
            last_target=rollback_targets[-1] if rollback_targets else None,
        )
        if chosen is None:
            return None
        name = checkpoint_name(chosen.step)
        damage = find_damage(folder / name) if name in own else "absent"
        if damage and remote_store and name in copied:
            damage = remote_store.fetch(name, folder)
        if not damage:
            return folder / name
        say(f"{folder / name} is damaged ({damage}); trying the one before it.")
        del found[name]
    return None


def _unrecoverable_message(state: TrainState, why: str) -> str:
    steps: list[dict[str, Any]] = [entry for entry in state.skipped if "to_step" not in entry]
    unstable_steps = steps[-state.spike_guard.in_a_row :]
    details = "; ".join(
        f"step {entry['step']:,}: {entry['reason']}, from {entry['first_key']!r}" for entry in unstable_steps[:5]
    )
    more = f" and {len(unstable_steps) - 5} more" if len(unstable_steps) > 5 else ""
    return (
        f"{state.spike_guard.in_a_row} steps in a row could not be used ({details}{more}), and {why}. "
        "The learning rate was "
        f"{unstable_steps[-1]['learning_rate']:.3g}; the weights are as before these steps. "
        "Try a lower --learning-rate, more "
        "--warmup-steps, --precision fp32, or look at these samples with vlm inspect; then go on from a checkpoint "
        "with --resume (and --allow for what you change)."
    )
