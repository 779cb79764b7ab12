"""Copies of checkpoints at another address, whole for whoever reads them: `state.json` comes last and goes first."""

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from vlm.console import say
from vlm.errors import UsageError, VlmError
from vlm.storage.remote import Patience, describe, judge, open_system
from vlm.storage.urls import is_remote, local_path, protocol_of
from vlm.train.checkpoint.format import (
    STATE,
    Facts,
    damage_of,
    name_of,
    remove_checkpoint,
    remove_leavings,
    steps_to_remove,
)

Answer = TypeVar("Answer")

_READ_ONLY = frozenset({"http", "https", "hf"})


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """The folder ADDRESS/RUN, in which checkpoints lie as they do in the run's own.

    stop: set to end waits between tries.
    """

    address: str
    run: str
    patience: Patience = field(default_factory=Patience)
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if is_remote(self.address) and protocol_of(self.address) in _READ_ONLY:
            raise UsageError(f"checkpoint_to = {self.address!r} cannot be written to; give a folder, s3:// or gs://.")

    @property
    def place(self) -> str:
        """The address of the folder."""
        return f"{self.address.rstrip('/')}/{self.run}"

    def names(self) -> list[str]:
        """The whole checkpoints there, oldest first."""
        return sorted(name for name, files in self._files().items() if STATE in files)

    def facts(self) -> dict[str, Facts]:
        """What the whole checkpoints there say of themselves, by name, oldest first."""
        found: dict[str, Facts] = {}
        for name in self.names():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short by a kill
                found[name] = Facts.of(json.loads(self._read(f"{name}/{STATE}")))
        return found

    def upload(self, checkpoint: Path) -> None:
        """Copy a checkpoint there, in place of one of the same name."""

        def put(system: Any, root: str) -> None:
            target = f"{root}/{checkpoint.name}"
            _drop(system, target)
            files = [file for file in checkpoint.iterdir() if file.is_file()]
            for file in sorted(files, key=lambda file: (file.name == STATE, file.name)):
                system.put_file(str(file), f"{target}/{file.name}")

        self._patiently("written to", put)

    def write(self, name: str, content: str) -> None:
        """Write a small file beside the checkpoints."""
        self._patiently("written to", lambda system, root: system.pipe_file(f"{root}/{name}", content.encode()))

    def remove(self, name: str) -> None:
        """Remove a checkpoint there, if there is one."""
        self._patiently("written to", lambda system, root: _drop(system, f"{root}/{name}"))

    def prune(self, *, keep: int, best: int | None, in_use: int) -> None:
        """Remove what is not kept, by the same rule as in the run's own folder, and what a kill left half-copied."""
        facts = self.facts()
        surplus = steps_to_remove(list(facts.values()), keep=keep, best=best, in_use=(in_use,))
        half_copied = self._files().keys() - facts.keys() - {name_of(in_use)}
        for name in sorted({*map(name_of, surplus), *half_copied}):
            self.remove(name)

    def fetch(self, name: str, folder: Path) -> str:
        """Copy a checkpoint from there to `folder`, in place of one of the same name; what is wrong with it, if so."""
        final, beside = folder / name, folder / f".{name}.part"
        folder.mkdir(parents=True, exist_ok=True)
        remove_leavings(folder)
        beside.mkdir()

        def get(system: Any, root: str) -> None:
            for file in self._files()[name]:
                system.get_file(f"{root}/{name}/{file}", str(beside / file))

        self._patiently("read", get)
        damage = damage_of(beside)
        if not damage:
            if final.exists():
                remove_checkpoint(final)
            beside.rename(final)
        remove_leavings(folder)
        return damage

    def _files(self) -> dict[str, set[str]]:
        """The files there of each checkpoint, whole or not."""

        def find(system: Any, root: str) -> dict[str, set[str]]:
            system.invalidate_cache()
            found: dict[str, set[str]] = {}
            for path in system.glob(f"{root}/step-*/*"):
                _, name, file = path.rstrip("/").rsplit("/", 2)
                found.setdefault(name, set()).add(file)
            return found

        return self._patiently("listed", find)

    def _read(self, name: str) -> bytes:
        return self._patiently("read", lambda system, root: system.cat_file(f"{root}/{name}"))

    def _patiently(self, verb: str, work: Callable[[Any, str], Answer]) -> Answer:
        attempt = 0
        while True:
            try:
                return work(*_open(self.place))
            except VlmError:
                raise
            except Exception as error:
                attempt += 1
                if judge(error) != "again" or attempt >= self.patience.attempts or self.stop.is_set():
                    tries = f"{attempt} attempt{'s' if attempt > 1 else ''}"
                    raise VlmError(f"{self.place} cannot be {verb} ({tries}): {describe(error)}") from error
                self.stop.wait(min(self.patience.longest_wait, self.patience.first_wait * 2.0 ** (attempt - 1)))


class Uploads:
    """Copies finished checkpoints to a mirror in a thread; the newest one waiting takes the place of an older one.

    A failure is said at once and does not end the run, since the checkpoint is safe in the run's folder; the next
    checkpoint is tried again.
    """

    def __init__(self, mirror: Mirror, *, keep: int) -> None:
        self._mirror, self._keep = mirror, keep
        self._waiting: tuple[Path, int | None, str] | None = None
        self._busy = ""
        self._failure = ""
        self._is_closing = False
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoint uploads", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path, *, best: int | None, marker: str) -> None:
        """Copy this checkpoint next. best: step of the best. marker: content of `best.json`, if any."""
        with self._turn:
            self._waiting = (checkpoint, best, marker)
            self._turn.notify_all()

    @property
    def in_use(self) -> list[int]:
        """Steps of the checkpoints that are being read, or will be."""
        with self._turn:
            names = [self._busy, self._waiting[0].name if self._waiting else ""]
            return [int(name.rpartition("-")[2]) for name in names if name]

    def wait(self) -> None:
        """Until nothing is left to copy."""
        with self._turn:
            self._turn.wait_for(lambda: not self._busy and self._waiting is None)

    def drop_after(self, step: int) -> None:
        """Forget the copies of later steps: the run went back. Where that fails, they are written over later."""
        self.wait()
        try:
            for name in self._mirror.names():
                if name > name_of(step):
                    self._mirror.remove(name)
        except VlmError as error:
            say(f"\n{error}. Training goes on.")

    def abandon(self) -> None:
        """Copy nothing more, and wait for nothing."""
        self._mirror.stop.set()

    def close(self) -> None:
        """Copy what is left.

        Raises:
            VlmError: the last checkpoint could not be copied.
        """
        self.wait()
        with self._turn:
            self._is_closing = True
            self._turn.notify_all()
        self._thread.join()
        if self._failure:
            raise VlmError(
                f"{self._failure}. The run's own folder has every checkpoint; copy it by hand, or mend the address "
                "and go on with --resume."
            )

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._waiting is not None or self._is_closing)
                if self._waiting is None:
                    return
                (checkpoint, best, marker), self._waiting = self._waiting, None
                self._busy = checkpoint.name
            try:
                self._copy(checkpoint, best, marker)
                self._failure = ""
            except Exception as error:
                self._failure = f"{checkpoint} could not be copied: {error}"
                say(f"\n{self._failure}. Training goes on; the next checkpoint is tried again.")
            finally:
                with self._turn:
                    self._busy = ""
                    self._turn.notify_all()

    def _copy(self, checkpoint: Path, best: int | None, marker: str) -> None:
        self._mirror.upload(checkpoint)
        if marker:
            self._mirror.write("best.json", marker)
        step = int(checkpoint.name.rpartition("-")[2])
        self._mirror.prune(keep=self._keep, best=best, in_use=step)


def _open(place: str) -> tuple[Any, str]:
    if is_remote(place):
        return open_system(place)
    return LocalFileSystem(auto_mkdir=True), str(Path(local_path(place)).absolute())


def _drop(system: Any, target: str) -> None:
    """Remove a folder, beginning with the file that makes it count."""
    system.invalidate_cache()
    if not system.exists(target):
        return
    if system.exists(f"{target}/{STATE}"):
        system.rm_file(f"{target}/{STATE}")
    if system.exists(target):
        system.rm(target, recursive=True)
