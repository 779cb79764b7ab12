"""The same work in several processes of this machine, each of which knows its number as if torchrun had started it."""

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

Given = TypeVar("Given")


def run_in_processes(work: Callable[[Given], None], given: Given, number: int) -> None:
    """Call `work(given)` in so many new processes; when one fails, the others are ended.

    Raises:
        VlmError: one failed.
    """
    level = logging.getLogger("vlm").getEffectiveLevel()
    spawn = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        spawn.Process(target=_run_one, args=(work, given, rank, number, level)) for rank in range(number)
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
    message = f"Process {rank} of {number} {how}; what was finished is kept, and the same command goes on from there."
    return UsageError(message) if code == UsageError.exit_code else VlmError(message)


def _run_one(work: Callable[[Given], None], given: Given, rank: int, number: int, level: int) -> None:
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(rank)}
    try:
        with log_to_stderr(level):
            work(given)
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
