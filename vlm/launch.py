"""Run a function in several processes on this machine that find each other, as torchrun's do."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, Generic, TypeVar

from vlm.console import log_to_stderr
from vlm.errors import UsageError, VlmError, explain_os_error

logger = logging.getLogger(__name__)

Argument = TypeVar("Argument")
Value = TypeVar("Value")

_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# time to save for processes that are told to end; one that waits for a lost peer never hears of it
_END_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Report(Generic[Value]):
    """What became of the work of a process: a value, a sentence for the user, or a failure nobody foresaw."""

    value: Value | None = None
    exit_code: int = 0
    message: str = ""
    failure: str = ""


def run_in_processes(work: Callable[[Argument], Value], argument: Argument, number: int) -> list[Value]:
    """Call `work(argument)` in `number` new processes; what each returns, by rank.

    Each has the environment variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). If one
    fails, the others are ended. SIGTERM, SIGINT and SIGUSR1 are passed on, so that the processes can save.

    Raises:
        VlmError: one failed; its own message, once, whatever the others make of losing it.
    """
    # a spawned process starts without the handlers of this one
    level = logging.getLogger("vlm").getEffectiveLevel()
    # not forked: CUDA and FAISS threads do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    group = _group_environment(number)
    processes: list[BaseProcess] = []
    pending: dict[Connection, int] = {}
    try:
        for rank in range(number):
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_run_one, args=(work, argument, sender, level))
            # as they start, since torch reads some of them when it is imported
            with environment(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}):
                process.start()
            # the process has the only other end, so that its death is an end of file here
            sender.close()
            processes.append(process)
            pending[receiver] = rank
        with _forwarding(processes):
            return _collect(processes, pending)
    finally:
        _end(processes)


def _collect(processes: Sequence[BaseProcess], pending: dict[Connection, int]) -> list[Any]:
    reports: dict[int, Report[Any]] = {}
    while pending:
        for receiver in wait(list(pending)):
            assert isinstance(receiver, Connection)
            rank = pending.pop(receiver)
            reports[rank] = _receive(receiver, processes[rank])
        # all that have reported by now: the first to end is often not the one that caused it
        failed = {rank: report for rank, report in reports.items() if report.exit_code}
        if failed:
            raise _failure(failed, len(processes))
    return [reports[rank].value for rank in range(len(processes))]


def _receive(receiver: Connection, process: BaseProcess) -> Report[Any]:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
    code = process.exitcode or 1
    if code < 0:
        how = f"was killed by signal {-code}; finished work is kept. Rerun the same command to resume."
    else:
        how = f"failed with exit code {code} before it began; a script calls this under if __name__ == '__main__'."
    return Report(failure=how, exit_code=1)


def _failure(failed: Mapping[int, Report[Any]], number: int) -> VlmError:
    # a message is the cause; what nobody foresaw is often the loss of the process that had it
    rank, report = min(failed.items(), key=lambda item: bool(item[1].failure))
    if report.failure:
        return VlmError(f"Process {rank} of {number} {report.failure}")
    message = f"{report.message} (From process {rank} of {number}; the others were ended.)"
    return UsageError(message) if report.exit_code == UsageError.exit_code else VlmError(message)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(_END_SECONDS)
        # one that hangs in a collective call does not hear SIGTERM
        if process.is_alive():
            process.kill()
            process.join()


def _group_environment(number: int) -> dict[str, str]:
    """What all processes of a group are told."""
    with socket.socket() as probe:
        # port 0: the system names one that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        # else each of them would use all cores
        group["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // number))
    return group


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables while the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _forwarding(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Pass signals on to the processes; a second SIGINT ends this one, and thereby them."""
    if threading.current_thread() is not threading.main_thread():
        # signals are handled in the main thread alone
        yield
        return
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        for process in processes:
            if process.pid is not None and process.is_alive():
                # a terminal sends SIGINT to all of them itself, and a second one would end them without saving
                os.kill(process.pid, signal.SIGTERM if number == signal.SIGINT else number)

    previous = {number: signal.signal(number, forward) for number in _FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run_one(work: Callable[[Argument], Value], argument: Argument, sender: Connection, level: int) -> None:
    # a parent killed by SIGKILL forwards nothing, and the processes would go on without it
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    with log_to_stderr(level):
        report = report_of(work, argument)
    sender.send(report)
    sender.close()
    sys.exit(report.exit_code)


def report_of(work: Callable[[Argument], Value], argument: Argument) -> Report[Value]:
    """Do the work; what became of it, in a form that another process can be sent."""
    try:
        return Report(value=work(argument))
    except VlmError as error:
        return Report(message=str(error), exit_code=error.exit_code)
    except OSError as error:
        return Report(message=explain_os_error(error), exit_code=1)
    except KeyboardInterrupt:
        return Report(message="Interrupted; finished work is kept. Rerun the same command to resume.", exit_code=1)
    # as text, since an exception of another library may not travel by pickle
    except Exception:
        return Report(failure=f"failed:\n{traceback.format_exc()}", exit_code=1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
