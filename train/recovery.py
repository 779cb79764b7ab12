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
from vlm.train.checkpoint.format import Facts, damage_of, facts_of, list_checkpoints, name_of
from vlm.train.checkpoint.manager import CheckpointWriter, agreed_path, restore
from vlm.train.checkpoint.remote_checkpoints import Mirror
from vlm.train.run_config import SafetyConfig
from vlm.train.state import TrainState

_TOLD = re.compile(r"DataLoader worker \(pid(?:\(s\))? (?P<pid>[\d, ]+)\)(?P<how>[^\n.)]*)")


def lost_worker(error: BaseException) -> re.Match[str] | None:
    """Which worker an error, or best what first caused it, says was lost; None if it says no such thing."""
    found: re.Match[str] | None = None
    cause: BaseException | None = error
    while cause is not None:
        found = _TOLD.search(str(cause)) or found
        cause = cause.__cause__
    return found


def explain_lost_worker(found: re.Match[str], *, run: Path, checkpoints: Path, workers: int) -> VlmError:
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
_OTHERS_SECONDS = 5.0
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
        self._who = f"process {process} of {num_processes}"
        self._path = folder / f"hang-{process}.txt"
        self._grace = _OTHERS_SECONDS if num_processes > 1 else 0.0
        self._reading = reading
        self._doing, self._since, self._after = "starting", time.monotonic(), "starting"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def note(self, doing: str, *, after: str = "") -> None:
        """This begins now: `waiting for data`, `step 12`, `saving`; the time starts anew.

        after: what is known of the run by now, e.g. the last step.
        """
        self._doing, self._since = doing, time.monotonic()
        self._after = after or self._after
        self._arm()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._path.unlink(missing_ok=True)
            self.note(self._doing)
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
            if time.monotonic() - self._since > self._seconds:
                self._end()

    def _end(self) -> None:
        """Tell what is known and end the process, without the clean-up that would hang too."""
        doing, seconds = self._doing, time.monotonic() - self._since
        headline = (
            f"{self._who[0].upper()}{self._who[1:]} (pid {os.getpid()}) has been {doing} for {seconds / 60:.2g} min, "
            f"the limit (--hang-minutes); before that: {self._after}"
        )
        workers = describe_workers(self._reading() if self._reading else {})
        with contextlib.suppress(OSError), self._path.open("w", encoding="utf-8") as file:
            self._write(file, headline, workers)
        told = f" Workers: {'; '.join(workers)}." if workers else ""
        say(
            f"\n{headline}.{told} Where each thread stands: {self._path}. "
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
        opened = ", ".join(open_shards(pid)) or "no shard"
        shard = f"read {reading[pid]} last" if pid in reading else f"has {opened} open"
        lines.append(f"pid {pid} ({status}) {shard}")
    return lines


def open_shards(pid: int) -> list[str]:
    """The shards a process has open, where the system tells (Linux); the files themselves are not touched."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(entry.path))
    return sorted({path for path in found if path.endswith(_SHARD_ENDINGS)})


MAX_SKIPS_KEPT = 1000
_BLOCK = 1 << 16

Visit = TypeVar("Visit")


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step that left the weights as they were. position: of its first sample in the run."""

    step: int
    position: int
    reason: str
    first_key: str
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """The samples at positions [first, last), which the run passes over since it went back from one step to another."""

    from_step: int
    to_step: int
    first: int
    last: int
    reason: str


def note_skip(state: TrainState, skipped: SkippedStep) -> None:
    """Record a skipped step in the state, and say it."""
    state.guard.reject()
    state.skipped.append(asdict(skipped))
    steps = [number for number, entry in enumerate(state.skipped) if "to_step" not in entry]
    if len(steps) > MAX_SKIPS_KEPT:
        del state.skipped[steps[0]]
    say(f"\nstep {skipped.step:,} is skipped: {skipped.reason} (first sample {skipped.first_key!r}).")


def must_go_back(state: TrainState, safety: SafetyConfig) -> bool:
    """Whether skipping has gone on for too long.

    Raises:
        VlmError: and the run has gone back as often as it may.
    """
    if state.guard.in_a_row < safety.skip_limit:
        return False
    if state.rewinds >= safety.rewind_limit:
        raise VlmError(_hopeless(state, f"the run has gone back {state.rewinds} times, the limit"))
    return True


def go_back(
    state: TrainState, writer: CheckpointWriter, folder: Path, *, mirror: Mirror | None = None, is_main: bool = True
) -> PassedOver:
    """Restore the checkpoint to go back to, and put the position past the trouble; all processes call it.

    Afterwards the loader is to be opened again at `state.position` for the steps that are left, and the samples passed
    over are to be counted in the ledger of the main process, which carries on that of all.

    Raises:
        VlmError: there is no checkpoint from before the trouble.
    """
    writer.wait()
    path = agreed_path(lambda: _target(state, folder, mirror), is_main=is_main)
    if path is None:
        raise VlmError(_hopeless(state, f"no undamaged checkpoint in {folder} is older than that"))
    from_step, last = state.step, state.position
    reason, rewinds, seconds = state.skipped[-1]["reason"], state.rewinds, state.elapsed_seconds
    restore(path, state, is_main=is_main)
    passed = PassedOver(from_step=from_step, to_step=state.step, first=state.position, last=last, reason=reason)
    state.skipped.append(asdict(passed))
    state.position, state.rewinds, state.elapsed_seconds = last, rewinds + 1, seconds
    writer.go_back(state.step)
    if is_main:
        say(
            f"\nBack from step {from_step:,} to {state.step:,} (rewind {state.rewinds}): {reason}. Passing over "
            f"{last - passed.first:,} samples, positions {passed.first:,} to {last - 1:,}."
        )
    return passed


def visits_in(passed: PassedOver, locate: Callable[[Sequence[int]], Sequence[Visit]]) -> Iterator[Sequence[Visit]]:
    """The visits that were passed over, in blocks, as `Order.locate` finds them."""
    for start in range(passed.first, passed.last, _BLOCK):
        yield locate(range(start, min(start + _BLOCK, passed.last)))


def choose_target(found: Sequence[Facts], *, trouble_since: int, tried: int | None) -> Facts | None:
    """The checkpoint to go back to.

    It is the newest good one from before the trouble that was due by its step, or, where there is none, any good one.
    If the run went back to just that one the last time, it is the one before it.

    trouble_since: the last step before the trouble. tried: the step last gone back to.

    >>> found = [Facts(step=step, is_regular=True, is_good=True) for step in (10, 20, 30)]
    >>> [choose_target(found, trouble_since=25, tried=tried).step for tried in (None, 20, 10)]
    [20, 10, 20]
    """
    older = sorted((facts for facts in found if facts.is_good and facts.step <= trouble_since), key=lambda f: f.step)
    fitting = [facts for facts in older if facts.is_regular] or older
    if len(fitting) > 1 and fitting[-1].step == tried:
        return fitting[-2]
    return fitting[-1] if fitting else None


def _target(state: TrainState, folder: Path, mirror: Mirror | None) -> Path | None:
    """The folder of the checkpoint to go back to; damaged ones are left out, and one that is only a copy is fetched."""
    own = {name_of(facts.step): facts for facts in facts_of(folder)}
    copied = mirror.facts() if mirror else {}
    found = copied | own
    jumps = [entry["to_step"] for entry in state.skipped if "to_step" in entry]
    while found:
        chosen = choose_target(
            list(found.values()),
            trouble_since=state.step - state.guard.in_a_row,
            tried=jumps[-1] if jumps else None,
        )
        if chosen is None:
            return None
        name = name_of(chosen.step)
        damage = damage_of(folder / name) if name in own else "absent"
        if damage and mirror and name in copied:
            damage = mirror.fetch(name, folder)
        if not damage:
            return folder / name
        say(f"{folder / name} is damaged ({damage}); trying the one before it.")
        del found[name]
    return None


def _hopeless(state: TrainState, why: str) -> str:
    steps: list[dict[str, Any]] = [entry for entry in state.skipped if "to_step" not in entry]
    trouble = steps[-state.guard.in_a_row :]
    told = "; ".join(f"step {entry['step']:,}: {entry['reason']}, from {entry['first_key']!r}" for entry in trouble[:5])
    more = f" and {len(trouble) - 5} more" if len(trouble) > 5 else ""
    return (
        f"{state.guard.in_a_row} steps in a row could not be used ({told}{more}), and {why}. The learning rate was "
        f"{trouble[-1]['learning_rate']:.3g}; the weights are as before these steps. Try a lower --learning-rate, more "
        "--warmup-steps, --precision fp32, or look at these samples with vlm inspect; then go on from a checkpoint "
        "with --resume (and --allow for what you change)."
    )
