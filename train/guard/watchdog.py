"""A run that hangs ends, saying where: which process, doing what, with which workers reading which shards."""

import contextlib
import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import psutil

from vlm.console import say

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
