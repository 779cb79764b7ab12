"""Results of work on numbers, in their order, by processes forked from this one.

Python's lock lets threads share a process's work only where C does it. A forked process has what the work needs (an
open source, tables) without a copy or a pickle; only results travel, by a pipe from each process.
"""

import gc
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import current_process, get_context
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

from vlm.errors import VlmError

Made = TypeVar("Made")
_Part = tuple[list[Made], BaseException | None, bool]
"""Results of a batch, the error that came after them, and whether the batch is done."""

_FIRST_BATCH = 32
# less than a pipe holds, so that a process goes on with the next batch while its results wait
_BATCH_BYTES = 1 << 20
_BATCHES_AHEAD = 2
# of results that wait to be used, and batches of each process; a process whose results are not taken waits
_MAX_WAITING_BYTES = 64 << 20
_MAX_PENDING = 8
# the most that Linux lets a user have; of 64 KiB a process would be woken sixteen times for a batch
_PIPE_BYTES = 1 << 20


def can_fork() -> bool:
    """Whether processes forked here run safely: on Linux, from a process without threads of Python.

    A fork copies the locks that other threads hold, and nobody releases them in the copy. The thread of tqdm, which
    redraws progress bars, holds none that the work needs.
    """
    if sys.platform != "linux" or current_process().daemon:
        return False
    others = [thread for thread in threading.enumerate() if not type(thread).__module__.startswith("tqdm.")]
    return others == [threading.main_thread()]


def map_forked(
    work: Callable[[int], Made], numbers: range, *, processes: int, size_of: Callable[[Made], int], max_batch: int = 256
) -> Generator[Made, None, None]:
    """The result of the work for each number, in their order.

    What the work raises comes after the results of the numbers before. Closing the generator ends the processes at
    once; those whose parent was killed end by themselves, before their next number. Batches are aligned to powers of
    two, so that rows which are read in blocks are read once. Where the system has no room for the processes (memory,
    open files), this one does the work alone.

    size_of: bytes of a result, so that few large ones are under way at once. max_batch: numbers that a process is given
        at once, a power of two.

    Raises:
        VlmError: a process was killed.
    """
    # the first one here: what is made once it is needed (tables of names) is inherited, not made by each
    yield work(numbers[0])
    workers: list[_Worker] = []
    schedule = _Schedule[Made](workers, numbers[1:], max_batch)
    receiver = threading.Thread(target=schedule.receive, name="results", daemon=True)
    try:
        is_begun = _fork_all(workers, processes, work, size_of)
        if is_begun:
            receiver.start()
        yield from schedule.results() if is_begun else map(work, numbers[1:])
    finally:
        for worker in workers:
            worker.kill()
        schedule.close()
        if receiver.ident is not None:
            receiver.join()
        for worker in workers:
            worker.close()


@dataclass
class _Batch(Generic[Made]):
    """size: in numbers. parts: what has come of it and is not yet used, and the bytes of each."""

    worker: "_Worker"
    size: int
    parts: "deque[tuple[_Part[Made], int]]" = field(default_factory=deque)
    num_bytes: int = 0


@dataclass
class _Worker:
    """A process: batches to it, and what it makes of them in the order in which they were sent."""

    process: Any
    requests: Connection
    results: Connection
    batches: deque[_Batch[Any]] = field(default_factory=deque)

    def kill(self) -> None:
        """End it at once, even where it is stopped or hangs: what it has not sent is of no use."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Give back what this process holds of it, once it has ended."""
        # of its end nobody learns where SIGCHLD is ignored, as some supervisors leave it to their children
        with suppress(ValueError):
            self.process.close()
        self.requests.close()
        self.results.close()


class _Schedule(Generic[Made]):
    """Which process works on what, and what waits for the batches before it.

    A thread receives (`receive`), so that processes go on while the consumer of the results waits for a disk.
    """

    def __init__(self, workers: list[_Worker], numbers: range, max_batch: int) -> None:
        self._workers = workers
        self._numbers = numbers
        self._place = numbers.start
        self._max_batch = max_batch
        self._batch_size = min(_FIRST_BATCH, max_batch)
        # the batches from the one on whose results are needed next, and all below, for both threads
        self._changed = threading.Condition()
        self._pending: deque[_Batch[Made]] = deque()
        self._waiting_bytes = 0
        self._failure: BaseException | None = None
        self._lost: _Worker | None = None
        self._is_closed = False

    def close(self) -> None:
        """End `receive`, once the processes have ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def results(self) -> Iterator[Made]:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_news)
                if not self._pending:
                    return
                batch = self._pending[0]
                if not batch.parts:
                    raise self._failure or _explain_loss(self._lost)
                (made, failure, is_last), num_bytes = batch.parts.popleft()
                self._waiting_bytes -= num_bytes
                if is_last:
                    self._pending.popleft()
                    self._assign()
                self._changed.notify_all()
            yield from made
            if failure is not None:
                raise failure

    def _has_news(self) -> bool:
        has_ended = self._failure is not None or self._lost is not None
        return has_ended or self._is_all_received() or bool(self._pending and self._pending[0].parts)

    def _is_all_received(self) -> bool:
        return self._place == self._numbers.stop and not any(worker.batches for worker in self._workers)

    def receive(self) -> None:
        """Give the processes batches and take their results, until all are here or a process has ended."""
        try:
            with self._changed:
                self._assign()
            while busy := self._wait_for_room():
                by_results = {worker.results: worker for worker in busy}
                for results in wait(list(by_results)):
                    assert isinstance(results, Connection)
                    self._take_from(by_results[results])
        except BaseException as error:  # for whoever takes the results to raise
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_for_room(self) -> list[_Worker]:
        """The processes that may send now: all at work, or that of the batch needed next where too much waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_stopped() or self._may_receive())
            if self._has_stopped():
                return []
            return [self._pending[0].worker] if self._is_full() else [one for one in self._workers if one.batches]

    def _has_stopped(self) -> bool:
        return self._is_closed or self._lost is not None or self._is_all_received()

    def _may_receive(self) -> bool:
        if self._is_full():
            return not self._pending[0].parts
        return any(worker.batches for worker in self._workers)

    def _is_full(self) -> bool:
        return self._waiting_bytes > _MAX_WAITING_BYTES

    def _take_from(self, worker: _Worker) -> None:
        try:
            message = worker.results.recv_bytes()
        except (EOFError, OSError):
            with self._changed:
                self._lost = worker
                self._changed.notify_all()
            return
        part: _Part[Made] = pickle.loads(message)
        with self._changed:
            batch = worker.batches[0]
            batch.parts.append((part, len(message)))
            batch.num_bytes += len(message)
            self._waiting_bytes += len(message)
            if part[-1]:
                worker.batches.popleft()
                fitting = _power_below(_BATCH_BYTES * batch.size // batch.num_bytes)
                self._batch_size = min(fitting, self._max_batch)
            self._assign()
            self._changed.notify_all()

    def _assign(self) -> None:
        """Give each process something to do, and something to go on with."""
        while self._place < self._numbers.stop and len(self._pending) < _MAX_PENDING * len(self._workers):
            worker = min(self._workers, key=lambda worker: len(worker.batches))
            if len(worker.batches) >= _BATCHES_AHEAD:
                return
            # smaller ones towards the end, so that no process is at work on a long one when the others are done
            share = (self._numbers.stop - self._place) // (_BATCHES_AHEAD * len(self._workers))
            size = min(self._batch_size, _power_below(share))
            stop = min((self._place // size + 1) * size, self._numbers.stop)
            with suppress(BrokenPipeError):  # its death is the end of its results as well
                worker.requests.send((self._place, stop))
            batch: _Batch[Made] = _Batch(worker, stop - self._place)
            worker.batches.append(batch)
            self._pending.append(batch)
            self._place = stop


def _power_below(number: int) -> int:
    """The largest power of two up to a number; 1 for less than that."""
    return 1 << (max(number, 1).bit_length() - 1)


def _explain_loss(worker: _Worker | None) -> VlmError:
    assert worker is not None
    worker.process.join()
    code = worker.process.exitcode
    # None where SIGCHLD is ignored
    how = "ended" if code is None else f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return VlmError(
        f"One of the working processes {how}, most likely out of memory; finished work is kept. Rerun the "
        "same command to resume, with fewer processes if it happens again: taskset -c 0 vlm … uses one core."
    )


def _fork_all(
    workers: list[_Worker], processes: int, work: Callable[[int], Made], size_of: Callable[[Made], int]
) -> bool:
    """Start the processes; none is left where the system has no room for all of them, and this is False."""
    try:
        for _ in range(processes):
            workers.append(_fork(work, size_of, workers))
    except OSError:
        while workers:
            worker = workers.pop()
            worker.kill()
            worker.close()
    return bool(workers)


def _fork(work: Callable[[int], Made], size_of: Callable[[Made], int], earlier: list[_Worker]) -> _Worker:
    theirs, requests = Pipe(duplex=False)
    results, sender = Pipe(duplex=False)
    # imported here, for Windows has no such module
    import fcntl

    with suppress(OSError):  # a user's pipes are limited together
        fcntl.fcntl(sender, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    # the parent's ends, of which a copy in another process would hide the parent's death
    inherited = [requests, results]
    for worker in earlier:
        inherited += [worker.requests, worker.results]
    process = get_context("fork").Process(
        target=_serve, args=(work, size_of, theirs, sender, inherited, os.getpid()), name="vlm-worker", daemon=True
    )
    with _signals_blocked(), warnings.catch_warnings():
        # of threads of libraries (Arrow, BLAS) Python warns too, from 3.12 on
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    sender.close()
    return _Worker(process, requests, results)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Hold signals back while a process starts, which does not answer them as its parent does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(
    work: Callable[[int], Made],
    size_of: Callable[[Made], int],
    requests: Connection,
    results: Connection,
    inherited: list[Connection],
    parent: int,
) -> None:
    # terminals and batch systems send these to all processes of a command; its end, however it comes, ends this one
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for end in inherited:
        end.close()
    # objects from before the fork stay; each collection would visit them all, and copy their pages by writing to them
    gc.freeze()

    def work_for_parent(number: int) -> Made:
        # the end of the pipe tells it too, but only after a batch, which takes minutes where images are slow to decode
        if os.getppid() != parent:
            os._exit(1)
        return work(number)

    with suppress(EOFError, BrokenPipeError):
        while True:
            for part in _parts(work_for_parent, size_of, range(*requests.recv())):
                results.send_bytes(pickle.dumps(part, pickle.HIGHEST_PROTOCOL))


def _parts(work: Callable[[int], Made], size_of: Callable[[Made], int], numbers: range) -> "Iterator[_Part[Made]]":
    made: list[Made] = []
    num_bytes = 0
    for number in numbers:
        if num_bytes > _BATCH_BYTES:
            yield made, None, False
            made, num_bytes = [], 0
        try:
            result = work(number)
        except BaseException as error:
            yield made, _portable(error), True
            return
        made.append(result)
        num_bytes += size_of(result)
    yield made, None, True


def _portable(error: BaseException) -> BaseException:
    """The error as it can be sent, with the place where it was raised."""
    trace = "".join(traceback.format_exception(error))
    error.add_note(f"In a working process:\n{trace}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the classes of other libraries make of it
        return RuntimeError(trace)
    return error
