#!/usr/bin/env python
"""Mixed load on vlm serve for a long time: searches, adds, deletes, compactions, reloads, damaged versions.

    benchmarks/run serving_soak [--minutes 30] [--rows 20000] [--searchers 6] [--json]

Nothing may fail but what is asked to; after an answered addition its row is found, after a deletion it is gone; answers
equal those of the index opened directly; while the newest version is damaged the one before answers; memory and
the number of open files stay flat.
Exit code 1 if any of that is not so. In one minute: --minutes 1 --rows 5000.
"""

import asyncio
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.embedding_data import Network, write_model
from parts.messages import say
from parts.serving_data import write_corpus
from parts.soak_clients import Soak

TOKEN = "soak"
MOST_FAULTS_SHOWN = 10
MOST_NEW_FILES = 40
DISTINCT_TEXTS = 1000


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the soak."""

    minutes: float = 30.0
    """Minutes of load."""

    rows: int = 20_000
    """Number of vectors at the start."""

    searchers: int = 6
    """Number of concurrent clients that search."""

    compaction_seconds: float = 20.0
    """Pause between compactions."""

    damage_seconds: float = 30.0
    """Pause between damaged versions."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> int:
    """Soak, print what was seen; the exit code."""
    with tempfile.TemporaryDirectory() as name:
        result = _soak(arguments, Path(name))
    result["command"] = shlex.join(["benchmarks/run", "serving_soak", *sys.argv[1:]])
    if arguments.json:
        show_json(result)
    else:
        show_table(["what", "count"], sorted(result["counts"].items()), title="Answered as they should be")
        show_table(["what", "value"], [[name, f"{value:.2f}"] for name, value in result["memory"].items()])
        for fault in result["faults"][:MOST_FAULTS_SHOWN]:
            print(fault)
        print(f"\n{len(result['faults'])} faults\n{result['command']}")
    return 1 if result["faults"] else 0


def _soak(arguments: Arguments, folder: Path) -> dict[str, Any]:
    network = Network(width=128, layers=2)
    say(f"Writing the model and {arguments.rows:,} vectors …")
    model, _, _ = write_model(network, folder)
    corpus = write_corpus(folder, rows=arguments.rows, dimension=network.width, model=model)
    with _running(corpus.index, folder / "server.log") as (address, process):
        say(f"{arguments.minutes:g} minutes of load on {address} …")
        # few enough for the server's cache of texts to be full after the first quarter
        captions = corpus.captions[:DISTINCT_TEXTS]
        soak = Soak(address=address, index=corpus.index, captions=captions, vectors=corpus.queries, token=TOKEN)
        memory, open_files = asyncio.run(_load(soak, arguments, process))
    log = (folder / "server.log").read_text(errors="replace")
    faults = list(soak.seen.faults)
    if "Traceback" in log:
        faults.insert(0, f"the server's log has a traceback, which ends: {_end_of_traceback(log)}")
    if open_files[-1] > open_files[0] + MOST_NEW_FILES:
        faults.append(f"the server holds {open_files[-1]} files open, {open_files[0]} at the start")
    if process.returncode:
        faults.append(f"the server ended with {process.returncode}: {log[-1000:]}")
    figures = _memory_figures(memory) | {"open files, at most": float(max(open_files))}
    return {"counts": dict(soak.seen.counts), "memory": figures, "faults": faults}


def _end_of_traceback(log: str) -> str:
    """The last calls of the first traceback, and its error."""
    lines = log[log.index("Traceback") :].splitlines()
    last = next((number for number, line in enumerate(lines[1:], 1) if line[:1] != " "), len(lines) - 1)
    return "\n".join(lines[max(0, last - 12) : last + 1])


async def _load(
    soak: Soak, arguments: Arguments, process: subprocess.Popen[bytes]
) -> tuple[list[tuple[float, float]], list[int]]:
    """Run all clients; memory of the server in MB by the second, and the files it holds open."""
    tasks = [asyncio.create_task(soak.search_on(seed)) for seed in range(arguments.searchers)]
    tasks += [asyncio.create_task(soak.change_on()), asyncio.create_task(soak.compare_on())]
    tasks.append(asyncio.create_task(_every(soak, arguments.compaction_seconds, soak.compact_now)))
    tasks.append(asyncio.create_task(_every(soak, arguments.damage_seconds, lambda: soak.damage_for(1.0))))
    server = psutil.Process(process.pid)
    began = time.monotonic()
    memory: list[tuple[float, float]] = []
    open_files: list[int] = []
    while time.monotonic() - began < 60 * arguments.minutes and process.poll() is None:
        await asyncio.sleep(1)
        memory.append((time.monotonic() - began, server.memory_full_info().uss / 1e6))
        open_files.append(server.num_fds())
    soak.is_over.set()
    await asyncio.gather(*tasks)
    return memory, open_files


async def _every(soak: Soak, seconds: float, act: Any) -> None:
    while not soak.is_over.is_set():
        try:
            await asyncio.wait_for(soak.is_over.wait(), seconds)
        except TimeoutError:
            await act()


def _memory_figures(memory: list[tuple[float, float]]) -> dict[str, float]:
    """Memory in MB at the end of the first quarter and of the whole, its peak, and its growth in MB an hour in between.

    The first quarter warms up: caches fill, and the allocator grows to what the load needs.
    """
    times, sizes = np.array(memory).T
    steady = times > times[-1] / 4
    slope = np.polyfit(times[steady], sizes[steady], 1)[0]
    return {
        "after the first quarter MB": sizes[steady][0],
        "at the end MB": sizes[-1],
        "peak MB": sizes.max(),
        "growth MB/h": 3600 * slope,
    }


@contextmanager
def _running(index: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLM_WRITE_TOKEN": TOKEN}
    command = [sys.executable, "-m", "vlm", "serve", f"bench={index}", "--port", "0"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        while not (started := re.search(r"at (http://[^;]+);", log.read_text(errors="replace"))):
            if process.poll() is not None:
                raise VlmError(f"The server ended: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.05)
        yield started[1], process
    finally:
        process.terminate()
        process.wait(timeout=60)


if __name__ == "__main__":
    try:
        sys.exit(run(tyro.cli(Arguments, description=__doc__)))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
