"""Copies of a run's checkpoints at another address (fsspec), uploaded in the background.

A copy counts once its `state.json` is there, which is uploaded last and removed first: so whoever lists the copies sees
whole checkpoints only.
"""

import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from vlm.console import pluralize
from vlm.errors import UsageError, VlmError
from vlm.storage import Retry, RetryPolicy, describe_error, is_remote, local_path, open_system, protocol_of
from vlm.train.checkpoint.format import (
    STATE,
    CheckpointInfo,
    checkpoint_name,
    find_damage,
    remove_checkpoint,
    remove_partial_checkpoints,
    steps_to_remove,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_READ_ONLY = frozenset({"http", "https", "hf"})


@dataclass(frozen=True, kw_only=True)
class RemoteCheckpointStore:
    """The folder ADDRESS/RUN, in which checkpoints lie as they do in the run's own folder.

    stop: set to end waits between attempts.
    """

    address: str
    run: str
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if is_remote(self.address) and protocol_of(self.address) in _READ_ONLY:
            raise UsageError(f"checkpoint_to = {self.address!r} cannot be written to; give a folder, s3:// or gs://.")

    @property
    def url(self) -> str:
        """The address of the folder."""
        return f"{self.address.rstrip('/')}/{self.run}"

    def names(self) -> list[str]:
        """The whole checkpoints there, oldest first."""
        return sorted(name for name, files in self._files().items() if STATE in files)

    def infos(self) -> dict[str, CheckpointInfo]:
        """What the whole checkpoints there say of themselves, by name, oldest first."""
        infos: dict[str, CheckpointInfo] = {}
        for name in self.names():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short by a kill
                infos[name] = CheckpointInfo.of(json.loads(self._read(f"{name}/{STATE}")))
        return infos

    def upload(self, checkpoint: Path) -> None:
        """Copy a checkpoint there, replacing one of the same name."""

        def put(system: Any, root: str) -> None:
            target = f"{root}/{checkpoint.name}"
            # an earlier, damaged copy must not complete this one's files
            _remove_folder(system, target)
            files = [file for file in checkpoint.iterdir() if file.is_file()]
            # the state last: a copy cut short lacks it, and does not count as a checkpoint
            files.sort(key=lambda file: (file.name == STATE, file.name))
            for file in files:
                system.put_file(str(file), f"{target}/{file.name}")

        self._with_retries("written to", put)

    def write(self, name: str, content: str) -> None:
        """Write a small file next to the checkpoints."""
        self._with_retries("written to", lambda system, root: system.pipe_file(f"{root}/{name}", content.encode()))

    def remove(self, name: str) -> None:
        """Remove a checkpoint there, if there is one."""
        self._with_retries("written to", lambda system, root: _remove_folder(system, f"{root}/{name}"))

    def prune(self, *, keep: int, best: int | None, in_use: int) -> None:
        """Remove what is not kept, by the same rule as in the run's own folder, and what a kill left half-copied."""
        infos = self.infos()
        surplus_steps = steps_to_remove(list(infos.values()), keep=keep, best=best, in_use=(in_use,))
        surplus = set(map(checkpoint_name, surplus_steps))
        partial_uploads = self._files().keys() - infos.keys() - {checkpoint_name(in_use)}
        for name in sorted(surplus | partial_uploads):
            self.remove(name)

    def fetch(self, name: str, folder: Path) -> str:
        """Copy a checkpoint from there to `folder`, replacing one of the same name; returns its damage, if any."""
        final = folder / name
        partial = folder / f".{name}.part"
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_checkpoints(folder)
        partial.mkdir()

        def get(system: Any, root: str) -> None:
            for file in self._files()[name]:
                system.get_file(f"{root}/{name}/{file}", str(partial / file))

        self._with_retries("read", get)
        damage = find_damage(partial)
        if not damage:
            if final.exists():
                remove_checkpoint(final)
            partial.rename(final)
        remove_partial_checkpoints(folder)
        return damage

    def _files(self) -> dict[str, set[str]]:
        """The files there of each checkpoint, whole or not."""

        def find(system: Any, root: str) -> dict[str, set[str]]:
            # fsspec caches listings, and other processes write here too
            system.invalidate_cache()
            files: dict[str, set[str]] = {}
            for path in system.glob(f"{root}/step-*/*"):
                _, name, file = path.rstrip("/").rsplit("/", 2)
                files.setdefault(name, set()).add(file)
            return files

        return self._with_retries("listed", find)

    def _read(self, name: str) -> bytes:
        return self._with_retries("read", lambda system, root: system.cat_file(f"{root}/{name}"))

    def _with_retries(self, verb: str, work: Callable[[Any, str], Result]) -> Result:
        """The result of `work`, given a file system and this folder in it; `verb` names it in the error."""
        # no limit on the time: one attempt at a large checkpoint may take many minutes
        retry = Retry(self.url, replace(self.retry_policy, seconds=math.inf), stop=self.stop)
        while True:
            try:
                return work(*_open_filesystem(self.url))
            except VlmError:
                raise
            except Exception as error:
                if not retry.wait(error):
                    attempts = pluralize(retry.num_failures, "attempt")
                    raise VlmError(f"{self.url} cannot be {verb} ({attempts}): {describe_error(error)}") from error


class Uploader:
    """Copies finished checkpoints to a remote store in a thread; a newer one that waits replaces an older one.

    A failure is logged at once and does not end the run, since the checkpoint is safe in the run's folder; the next
    checkpoint is tried again.
    """

    def __init__(self, remote_store: RemoteCheckpointStore, *, keep: int) -> None:
        self._remote_store = remote_store
        self._keep = keep
        self._pending: tuple[Path, int | None, str] | None = None
        self._uploading = ""
        self._failure = ""
        self._is_closing = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint uploads", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path, *, best: int | None, marker: str) -> None:
        """Copy this checkpoint next. best: step of the best. marker: content of `best.json`, if any."""
        with self._condition:
            # an older one that still waits is dropped: the newest is what a resume needs
            self._pending = (checkpoint, best, marker)
            self._condition.notify_all()

    @property
    def in_use(self) -> list[int]:
        """Steps of the checkpoints that are being uploaded, or will be."""
        with self._condition:
            names = [self._uploading, self._pending[0].name if self._pending else ""]
            return [int(name.rpartition("-")[2]) for name in names if name]

    def wait(self) -> None:
        """Until nothing is left to copy."""
        with self._condition:
            self._condition.wait_for(lambda: not self._uploading and self._pending is None)

    def remove_after(self, step: int) -> None:
        """Remove the copies of later steps: the run rolled back. Where that fails, they are replaced later."""
        self.wait()
        try:
            for name in self._remote_store.names():
                if name > checkpoint_name(step):
                    self._remote_store.remove(name)
        except VlmError as error:
            logger.warning(f"{error}. Training continues.")

    def cancel(self) -> None:
        """Copy nothing more, and wait for nothing."""
        self._remote_store.stop.set()

    def close(self) -> None:
        """Copy what is left.

        Raises:
            VlmError: the last checkpoint could not be copied.
        """
        self.wait()
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        self._thread.join()
        if self._failure:
            raise VlmError(
                f"{self._failure}. The run's own folder has every checkpoint; copy it by hand, or correct the "
                "address and resume with --resume."
            )

    def _work(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._pending is not None or self._is_closing)
                if self._pending is None:
                    return
                checkpoint, best, marker = self._pending
                self._pending = None
                # set under the lock, so that `in_use` protects the folder without a gap
                self._uploading = checkpoint.name
            try:
                self._copy(checkpoint, best, marker)
                self._failure = ""
            except Exception as error:
                self._failure = f"{checkpoint} could not be copied: {error}"
                logger.warning(f"{self._failure}. Training continues; the next checkpoint is tried again.")
            finally:
                with self._condition:
                    self._uploading = ""
                    self._condition.notify_all()

    def _copy(self, checkpoint: Path, best: int | None, marker: str) -> None:
        self._remote_store.upload(checkpoint)
        if marker:
            self._remote_store.write("best.json", marker)
        step = int(checkpoint.name.rpartition("-")[2])
        self._remote_store.prune(keep=self._keep, best=best, in_use=step)


def _open_filesystem(url: str) -> tuple[Any, str]:
    if is_remote(url):
        return open_system(url)
    # object stores need no folders, local ones do
    return LocalFileSystem(auto_mkdir=True), str(Path(local_path(url)).absolute())


def _remove_folder(system: Any, target: str) -> None:
    """Remove a folder, beginning with the file that makes it count."""
    system.invalidate_cache()
    if not system.exists(target):
        return
    if system.exists(f"{target}/{STATE}"):
        system.rm_file(f"{target}/{STATE}")
    if system.exists(target):
        system.rm(target, recursive=True)
