"""Run a function in several processes on this machine, with the environment variables of torchrun."""

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from vlm.cli.main import log_to_stderr, print_error
from vlm.errors import UsageError, VlmError

Argument = TypeVar("Argument")


def run_in_processes(work: Callable[[Argument], None], argument: Argument, number: int) -> None:
    """Call `work(argument)` in `number` new processes; if one fails, the others are terminated.

    Raises:
        VlmError: one failed.
    """
    # a spawned process starts without the handlers of this one
    level = logging.getLogger("vlm").getEffectiveLevel()
    # not forked: CUDA and FAISS threads do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        spawn.Process(target=_run_one, args=(work, argument, rank, number, level)) for rank in range(number)
    ]
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in wait(list(running)):
                ended = running.pop(sentinel)  # pyright: ignore[reportArgumentType]
                ended.join()
                if ended.exitcode:
                    raise _failure(ended.exitcode, processes.index(ended), number)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()


def _failure(code: int, rank: int, number: int) -> VlmError:
    how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    message = f"Process {rank} of {number} {how}; finished work is kept. Rerun the same command to resume."
    return UsageError(message) if code == UsageError.exit_code else VlmError(message)


def _run_one(work: Callable[[Argument], None], argument: Argument, rank: int, number: int, level: int) -> None:
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)}
    try:
        with log_to_stderr(level):
            work(argument)
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
    except OSError as error:
        sys.exit(print_error(str(error), 1))
    except KeyboardInterrupt:
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
