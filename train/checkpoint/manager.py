"""When a checkpoint is due, how it is saved while training continues, and how a state is restored from one.

`CheckpointWriter` copies the state to host memory and returns; a thread writes it to disk, removes old checkpoints and
passes it on to the remote store, which holds copies at another address (fsspec). Restoring works whatever the number of
processes then and now.
"""

import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from torch import Tensor

from vlm.console import pluralize
from vlm.data.sample_ledger import Ledger
from vlm.errors import UsageError, VlmError
from vlm.models.load import WEIGHTS
from vlm.storage import Retry, RetryPolicy, describe_error, is_remote, local_path, open_system, protocol_of
from vlm.train.checkpoint.checkpoint_files import (
    AVERAGES,
    BEST,
    EMA_WEIGHTS,
    HEADS,
    OPTIMIZER,
    STATE,
    CheckpointInfo,
    PinnedBuffers,
    Snapshot,
    checkpoint_name,
    find_damage,
    list_checkpoint_infos,
    list_checkpoints,
    read_checkpoint_values,
    remove_checkpoint,
    remove_partial_checkpoints,
    steps_to_remove,
    take_snapshot,
    write_best,
    write_checkpoint,
)
from vlm.train.distributed import copy_full_tensor, shard_like
from vlm.train.state import TrainState

logger = logging.getLogger(__name__)


Result = TypeVar("Result")

_READ_ONLY = frozenset({"http", "https", "hf"})


@dataclass(frozen=True, kw_only=True)
class RemoteCheckpointStore:
    """The folder ADDRESS/RUN, in which checkpoints lie as they do in the run's own folder.

    A copy counts once its `state.json` is there, which is uploaded last and removed first: so whoever lists the copies
    sees whole checkpoints only.

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


@dataclass
class CheckpointSchedule:
    """Due by steps, by minutes, or both.

    every: steps between checkpoints. minutes: between checkpoints in addition; 0 goes by steps alone.
    last_saved_seconds: when the last was taken, on the clock of `is_due`.
    """

    every: int
    minutes: float = 0.0
    last_saved_seconds: float = 0.0

    def is_scheduled(self, step: int) -> bool:
        """Whether one is due by its step: the same in every part of an interrupted run."""
        return step % self.every == 0

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether one is due. Clocks differ between processes, so these agree on it by `any_across_processes`.

        seconds: time spent in the run so far.

        >>> schedule = CheckpointSchedule(every=100, minutes=1)
        >>> [schedule.is_due(step, seconds) for step, seconds in ((99, 59), (99, 60), (100, 1))]
        [False, True, True]
        """
        is_late = self.minutes > 0 and seconds - self.last_saved_seconds >= 60 * self.minutes
        return self.is_scheduled(step) or is_late

    def mark_saved(self, seconds: float) -> None:
        """One was taken now."""
        self.last_saved_seconds = seconds


def any_across_processes(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Which of the flags are set in any process, in one exchange."""
    if not dist.is_initialized():
        return list(flags)
    # as integers: not every backend reduces booleans
    votes = torch.tensor(list(map(int, flags)), device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return list(map(bool, votes.tolist()))


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time; made on every process, though only the main one writes.

    What goes wrong in the thread is raised by the next `save`, `check`, `wait` or `close`. On leaving it as a context,
    what is under way is finished, also where an error ends the run.

    keep: checkpoints kept, in addition to the best and the one a rollback goes to.
    uploader: copies each checkpoint to the remote store; None without one, and on other processes.
    """

    def __init__(
        self, folder: Path, *, keep: int, remote_store: RemoteCheckpointStore | None = None, is_main: bool = True
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._is_main = is_main
        self._host = PinnedBuffers()
        # one worker, so that checkpoints are written in their order
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.uploader = Uploader(remote_store, keep=keep) if remote_store and is_main else None
        if is_main:
            remove_partial_checkpoints(folder)

    def save(self, state: TrainState, *, ledger: Ledger, is_scheduled: bool) -> None:
        """Copy the state as it is now and write it in the background; all processes call it at the same step.

        A checkpoint still being written is waited for.

        ledger: that of all processes. is_scheduled: whether it is due by its step.

        Raises:
            VlmError: this one does not fit, or the one before could not be written.
        """
        # memory for one snapshot at a time
        self.wait()
        snapshot = take_snapshot(state, self._host, ledger=ledger, is_scheduled=is_scheduled, is_main=self._is_main)
        if snapshot is not None:
            self._writing = self._thread.submit(self._write, snapshot)

    def check(self) -> None:
        """Raise what went wrong, if the thread is done; never waits."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is on disk.

        Raises:
            VlmError: it could not be written.
        """
        writing = self._writing
        self._writing = None  # first, so that an error is raised once
        if writing is not None:
            writing.result()

    def roll_back(self, step: int) -> None:
        """Remove the checkpoints after a step, here and in the remote store: the run rolled back to it."""
        self.wait()
        if not self._is_main:
            return
        if self.uploader:
            self.uploader.remove_after(step)
        # newest first: a kill in between leaves no checkpoint of the old course that is newer than a removed one
        for path in reversed(list_checkpoints(self._folder)):
            if path.name > checkpoint_name(step):
                remove_checkpoint(path)

    def close(self) -> None:
        """Wait for what is being written and uploaded; nothing can be saved afterwards. Closing again does nothing.

        Raises:
            VlmError: it could not be written or uploaded.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            uploader = self.uploader
            self.uploader = None
            if uploader:
                uploader.close()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        if issubclass(kind, KeyboardInterrupt) and self.uploader:
            self.uploader.cancel()
        try:
            self.close()
        except VlmError as error:  # logged, so as not to hide what ended the run
            logger.error(str(error))

    def _write(self, snapshot: Snapshot) -> None:
        """What the thread does: write, mark the best, pass on to the uploader, remove old checkpoints."""
        path = write_checkpoint(self._folder, snapshot)
        write_best(self._folder, snapshot.best)
        best_step = snapshot.best.step if snapshot.best else None
        in_use = [snapshot.step]
        if self.uploader:
            marker = (self._folder / BEST).read_text(encoding="utf-8") if snapshot.best else ""
            self.uploader.add(path, best=best_step, marker=marker)
            in_use += self.uploader.in_use

        infos = list_checkpoint_infos(self._folder)
        for step in steps_to_remove(infos, keep=self._keep, best=best_step, in_use=in_use):
            remove_checkpoint(self._folder / checkpoint_name(step))


def restore_newest(
    folder: Path, state: TrainState, *, remote_store: RemoteCheckpointStore | None = None, is_main: bool = True
) -> bool:
    """Restore the newest undamaged checkpoint, of the folder or the remote store, into `state`; False if there is none.

    All processes call it; the main one chooses.

    Raises:
        VlmError: all checkpoints are damaged, or the remote store cannot be listed.
    """
    path = broadcast_path(lambda: newest_intact_checkpoint(folder, remote_store), is_main=is_main)
    if path is None:
        return False
    restore(path, state, is_main=is_main)
    return True


def newest_intact_checkpoint(folder: Path, remote_store: RemoteCheckpointStore | None = None) -> Path | None:
    """The newest checkpoint all of whose files have their checksums; one only in the remote store is fetched."""
    if folder.is_dir():
        remove_partial_checkpoints(folder)
    local = {path.name for path in list_checkpoints(folder)}
    remote = _remote_names(folder, remote_store)
    # names sort by step, since they are padded with zeros
    for name in sorted(local | remote, reverse=True):
        damage = find_damage(folder / name) if name in local else "absent"
        if damage and name in local:
            fallback = "its copy" if name in remote else "the one before"
            logger.warning(f"{folder / name} is damaged ({damage}); trying {fallback}.")
        if damage and remote_store and name in remote:
            logger.info(f"Fetching {name} from {remote_store.url}.")
            damage = remote_store.fetch(name, folder)
            if damage:
                logger.warning(
                    f"The copy of {name} in {remote_store.url} is damaged ({damage}); trying the one before it."
                )
        if not damage:
            return folder / name

    if local or remote:
        raise VlmError(
            f"All {len(local | remote)} checkpoints in {folder} are damaged; start the run again in another folder."
        )
    return None


def _remote_names(folder: Path, remote_store: RemoteCheckpointStore | None) -> set[str]:
    """The checkpoints in the remote store; if it cannot be reached, those of the folder must do."""
    if remote_store is None:
        return set()
    try:
        return set(remote_store.names())
    except VlmError as error:
        if not list_checkpoints(folder):
            raise
        logger.warning(f"{error}; using the checkpoints in {folder}.")
        return set()


def broadcast_path(choose: Callable[[], Path | None], *, is_main: bool) -> Path | None:
    """What the main process chooses, on all; an error it raises is raised by all."""
    if not dist.is_initialized():
        return choose()
    outcome: list[Path | VlmError | None] = [None]
    if is_main:
        try:
            outcome = [choose()]
        except VlmError as error:
            outcome = [error]
    # an error goes along, or the other processes would wait for ever
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], VlmError):
        raise outcome[0]
    return outcome[0]


def restore(path: Path, state: TrainState, *, is_main: bool = True) -> None:
    """Read a checkpoint into the state; its ledger, that of all processes, is continued by the main one.

    Raises:
        VlmError: it does not belong to this network and these heads.
    """
    values = read_checkpoint_values(path)
    state.load_values(values)
    state.ledger = Ledger.from_values(values["ledger"]) if is_main else Ledger()

    weights = load_file(path / WEIGHTS)
    _load_tensors(state.network.state_dict(), weights, path / WEIGHTS)
    heads = state.task.heads.state_dict()
    if heads or (path / HEADS).is_file():
        _load_tensors(heads, _load_if_exists(path / HEADS), path / HEADS)
    if state.ema_weights is not None:
        if not (path / EMA_WEIGHTS).is_file():
            logger.warning(f"{path} holds no EMA weights; the EMA starts from its weights.")
        _load_tensors(state.ema_weights, _load_if_exists(path / EMA_WEIGHTS) or weights, path / EMA_WEIGHTS)
    if state.averages is not None:
        if (path / AVERAGES).is_file():
            _load_tensors(state.averages.tensors(), load_file(path / AVERAGES), path / AVERAGES)
        else:
            logger.warning(f"{path} holds no averages of samples; each starts from the sample's next batch.")
    _restore_optimizer(state, load_file(path / OPTIMIZER))


def _load_if_exists(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.is_file() else {}


def _load_tensors(targets: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path) -> None:
    differing = sorted(targets.keys() ^ saved.keys())
    if not differing:
        differing = [name for name in targets if targets[name].shape != saved[name].shape]
    if differing:
        raise VlmError(f"{path} is not of the network being trained: {', '.join(differing[:3])} differ.")
    for name, target in targets.items():
        copy_full_tensor(target, saved[name])


def _restore_optimizer(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Give each trained parameter its saved state, in the same shards as the parameter itself."""
    saved: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        saved.setdefault(parameter_name, {})[key] = tensor

    names = {parameter: name for name, parameter in state.task.named_parameters()}
    # state of weights that are trained no longer must not stay
    state.optimizer.state.clear()
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            own = saved.pop(names[parameter], {})
            if own:
                state.optimizer.state[parameter] = {key: shard_like(own[key], parameter) for key in own}
    if saved:
        raise VlmError(f"The checkpoint's optimizer has a state of {next(iter(saved))}, which is not trained now.")
