#!/usr/bin/env python
"""Every comparison with a peer in a short form, in one run of under an hour; records figures for docs/ and README.

    benchmarks/run --all [--only NAME …] [--out FOLDER] [--tiny] [--json]

Each comparison is a process of its own with a time limit; one that fails or has no data is told and left out, and the
exit code is then 1. Its ratios go to FOLDER/NAME.json (default: benchmarks/results) with command, date, machine and
versions; `python scripts/write_docs.py` makes docs/benchmark-results.md and README's table of them. With --tiny, at
the smallest sizes, it shows that every comparison runs; its figures mean nothing.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError, VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say
from parts.suite_entries import BEFORE, ENTRIES, Entry

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "faiss-cpu", "transformers", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the run of all comparisons."""

    only: tuple[str, ...] = ()
    """Names of the comparisons to run; none runs all."""

    patience: float = 1.0
    """Factor of the time limits, for a machine that is busy or slow."""

    out: Path = BENCHMARKS / "results"
    """Folder of the records, one file for each comparison."""

    tiny: bool = False
    """The smallest sizes, to see that all comparisons run; --out must name another folder."""

    json: bool = False
    """Print the records as JSON."""


def run(arguments: Arguments) -> int:
    """Run the comparisons one after the other; returns the exit code."""
    if arguments.tiny and arguments.out == Arguments.out:
        raise UsageError("--tiny gives no figures to keep; name another folder by --out.")
    entries = _entries(arguments.only)
    arguments.out.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        minutes = arguments.patience * entry.minutes
        say(f"{number + 1} of {len(entries)}: {entry.name}, at most {minutes:g} minutes …")
        record = _run_entry(entry, entry.tiny if arguments.tiny else entry.arguments, minutes)
        records.append(record)
        if not record["problem"]:
            # written at once, so that an interrupted run keeps what it has
            text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
            (arguments.out / f"{entry.name}.json").write_text(text, encoding="utf-8")
    if arguments.json:
        show_json(records)
    else:
        _show(records)
    return 1 if any(record["problem"] for record in records) else 0


def _entries(names: Sequence[str]) -> list[Entry]:
    known = {entry.name: entry for entry in ENTRIES}
    for name in names:
        if name not in known:
            raise UsageError(f"--only {name}: there is no such comparison; there are {', '.join(known)}.")
    return [known[name] for name in names or known]


def _run_entry(entry: Entry, words: str, minutes: float) -> dict[str, Any]:
    """The record of one comparison; `problem` says why it has no figures."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = _result_of(entry.name, words, Path(folder), minutes)
            ratios, problem = [asdict(ratio) for ratio in entry.ratios(result)], ""
        except VlmError as error:
            ratios, problem = [], str(error)
        except Exception as error:
            # whatever fails in one comparison, the others still run
            ratios, problem = [], f"{entry.name} failed: {type(error).__name__}: {error}"
    if problem:
        say(problem)
    return {
        "name": entry.name,
        "stage": entry.stage,
        "peers": entry.peers,
        "command": f"benchmarks/run {entry.name} {words}".replace("{before}", "BEFORE").replace("{folder}", "FOLDER"),
        "date": date.today().isoformat(),
        "seconds": round(time.monotonic() - began),
        "machine": _machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "problem": problem,
        "ratios": ratios,
    }


def _result_of(name: str, arguments: str, folder: Path, minutes: float) -> Any:
    """What the comparison prints as JSON."""
    places = {"folder": folder / "work"}
    if "{before}" in arguments:
        places["before"] = folder / "before"
        _checkout(BEFORE, places["before"])
    words = shlex.split(arguments.format(**places))
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words, "--json"]
    # a session of its own: servers and sides that it started end with it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        raise VlmError(f"{name} was ended after its {minutes:g} minutes; --patience allows more.") from None
    finally:
        _end_group(process)
        if "before" in places:
            remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(places["before"])]
            subprocess.run(remove, check=False)
    if process.returncode:
        raise VlmError(f"{name} ended with exit code {process.returncode}; its messages stand above.")
    return json.loads(printed)


def _checkout(commit: str, folder: Path) -> None:
    command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(folder), commit]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise VlmError(f"commit {commit} cannot be checked out: {done.stderr.strip()}")


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a comparison and what it has left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
    }


def _show(records: Sequence[dict[str, Any]]) -> None:
    rows: list[list[object]] = []
    for record in records:
        if record["problem"]:
            rows.append([record["stage"], record["peers"], record["problem"], "–", record["seconds"]])
        for ratio in record["ratios"]:
            values = [float(value) for value in ratio["values"]]
            spread = f"{min(values):.2f}–{max(values):.2f}"
            rows.append([record["stage"], ratio["peer"], ratio["what"], spread, record["seconds"]])
    show_table(["stage", "compared with", "what", "times better", "whole, s"], rows)


if __name__ == "__main__":
    try:
        sys.exit(run(tyro.cli(Arguments, description=__doc__)))
    except VlmError as error:
        sys.exit(print_error(str(error), error.exit_code))
