"""A part of a benchmark in its own process, terminated at a time limit; results up to then are kept."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

Row = dict[str, Any]
Part = Callable[..., Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a part. problem: why they are incomplete; empty if they are complete."""

    rows: list[Row]
    seconds: float
    problem: str = ""
    ran_out_of_time: bool = False


def run_limited(part: Part, *arguments: Any, limit_s: float) -> Outcome:
    """Run a generator in a fork of this process, which has done the imports but not initialised the GPU."""
    context, began = multiprocessing.get_context("fork"), time.monotonic()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(sending, part, arguments))
    process.start()
    sending.close()
    rows: list[Row] = []
    problem, ran_out_of_time = f"terminated after its {limit_s:.0f} s", True
    while receiving.poll(max(0.0, began + limit_s - time.monotonic())):
        try:
            row, said = receiving.recv()
        except EOFError:
            said = "its process was killed"
            row = None
        if row is None:
            problem, ran_out_of_time = said, False
            break
        rows.append(row)
    assert process.pid is not None
    _end(process.pid)
    process.join()
    return Outcome(rows=rows, seconds=time.monotonic() - began, problem=problem, ran_out_of_time=ran_out_of_time)


def _send_rows(sending: Connection, part: Part, arguments: tuple[Any, ...]) -> None:
    said = ""
    try:
        for row in part(*arguments):
            sending.send((row, ""))
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
    sending.send((None, said))


def _end(pid: int) -> None:
    """Kill a process and its children."""
    try:
        process = psutil.Process(pid)
        started = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for one in (*started, process):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
