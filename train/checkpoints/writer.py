"""Saving without waiting: the state is copied in memory, a thread writes it, removes old ones, and hands it on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from vlm.console import say
from vlm.data.ledger import Ledger
from vlm.errors import VlmError
from vlm.train.checkpoints.files import (
    BEST,
    facts_of,
    list_checkpoints,
    name_of,
    remove_checkpoint,
    remove_leavings,
    write_best,
    write_checkpoint,
)
from vlm.train.checkpoints.mirror import Mirror, Uploads
from vlm.train.checkpoints.retention import steps_to_remove
from vlm.train.checkpoints.snapshot import HostMemory, Snapshot, take_snapshot
from vlm.train.state import TrainState


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; made on every process, though only the main one writes.

    What goes wrong in the thread is raised by the next `save`, `check`, `wait` or `close`. On leaving it as a context,
    what is under way is finished, also where an error ends the run.
    keep: checkpoints kept, besides the best and the one a rewind goes to.
    """

    def __init__(self, folder: Path, *, keep: int, mirror: Mirror | None = None, is_main: bool = True) -> None:
        self._folder, self._keep, self._is_main = folder, keep, is_main
        self._host = HostMemory()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._uploads = Uploads(mirror, keep=keep) if mirror and is_main else None
        self.last_saved: int | None = None
        if is_main:
            remove_leavings(folder)

    def save(self, state: TrainState, *, ledger: Ledger, is_regular: bool) -> None:
        """Copy the state as it is now and write it in the background; all processes call it at the same step.

        A checkpoint still being written is waited for. ledger: that of all processes. is_regular: due by its step.

        Raises:
            VlmError: this one does not fit, or the one before could not be written.
        """
        self.wait()
        snapshot = take_snapshot(state, self._host, ledger=ledger, is_regular=is_regular, is_main=self._is_main)
        if snapshot is not None:
            self._writing = self._thread.submit(self._write, snapshot)

    def check(self) -> None:
        """Raise what went wrong, if the thread has come to an end; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint is on disk.

        Raises:
            VlmError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def go_back(self, step: int) -> None:
        """Remove the checkpoints after a step, here and where they were copied to: the run went back there."""
        self.wait()
        if not self._is_main:
            return
        if self._uploads:
            self._uploads.drop_after(step)
        for path in reversed(list_checkpoints(self._folder)):
            if path.name > name_of(step):
                remove_checkpoint(path)

    def close(self) -> None:
        """Wait for what is being written and copied; nothing can be saved afterwards, and closing again does nothing.

        Raises:
            VlmError: it could not be.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            uploads, self._uploads = self._uploads, None
            if uploads:
                uploads.close()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        if issubclass(kind, KeyboardInterrupt) and self._uploads:
            self._uploads.abandon()
        try:
            self.close()
        except VlmError as error:  # said, so as not to hide what ended the run
            say(f"\n{error}")

    def _write(self, snapshot: Snapshot) -> None:
        path = write_checkpoint(self._folder, snapshot)
        self.last_saved = snapshot.step
        best = snapshot.best.step if snapshot.best else None
        write_best(self._folder, snapshot.best)
        if self._uploads:
            marker = (self._folder / BEST).read_text(encoding="utf-8") if snapshot.best else ""
            self._uploads.add(path, best=best, marker=marker)
        in_use = [snapshot.step, *(self._uploads.in_use if self._uploads else ())]
        for step in steps_to_remove(facts_of(self._folder), keep=self._keep, best=best, in_use=in_use):
            remove_checkpoint(self._folder / name_of(step))
