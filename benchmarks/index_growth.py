#!/usr/bin/env python
"""Cost of an index as it grows: build, search, filter, add, delete, compact, check, each in its own process.

    benchmarks/run index_growth [--rows 10000 100000 1000000 --dimension 512 --kind ivf] [--keep FOLDER] [--json]

Each step has two threads and 8 GiB: the system limits its allocations (RLIMIT_DATA), and the reported peak includes
memory-mapped file pages. With --keep an interrupted run resumes after its last complete step.
"""

import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vlm.console import show_json, show_table
from vlm.files import write_text
from vlm.index.autotune.trial import parse_bytes

sys.path.insert(0, str(Path(__file__).parent))
from parts.growth_tables import growth_table, needs_table, searches_table, steps_table
from parts.measure_process import Side
from parts.messages import say

STEPS = ("draw", "build", "search", "add", "delete", "search again", "compact", "check")
Steps = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the index size benchmark."""

    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Numbers of rows, ascending."""

    dimension: int = 512
    """Dimension of the synthetic vectors."""

    kind: str = "ivf"
    """Index type, the same at every size so that costs can be compared."""

    changed: int = 10_000
    """Number of rows added, and of rows deleted: half of those old, half new."""

    questions: int = 300
    """Number of text queries, searched one by one."""

    threads: int = 2
    """Threads of FAISS and numpy."""

    memory: str = "8GiB"
    """Allocation limit of a step."""

    keep: Path | None = None
    """Folder for rows, indexes and results, from which an interrupted run resumes."""

    seed: int = 0
    """Random seed of the synthetic vectors."""

    json: bool = False
    """Print the results as JSON."""


def run(arguments: Arguments) -> None:
    """Run the measurements and print the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.keep or Path(name)
        result = {str(rows): _measure(arguments, rows, folder / f"{arguments.kind}-{rows}") for rows in arguments.rows}
    if arguments.json:
        show_json(result)
    else:
        _show(result, arguments)


def _measure(arguments: Arguments, rows: int, folder: Path) -> Steps:
    """Run the steps that are missing; returns the results of all."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "steps.json"
    done: Steps = json.loads(kept.read_text()) if kept.is_file() else {}
    limit = parse_bytes(arguments.memory)
    for step in STEPS:
        if step in done:
            continue
        say(f"{rows:,} rows: {step} …")
        with Side(sys.executable, "growth_steps.py", threads=arguments.threads) as side:
            found = side.ask(
                do=step,
                folder=str(folder.resolve()),
                rows=rows,
                dimension=arguments.dimension,
                kind=arguments.kind,
                changed=arguments.changed,
                questions=arguments.questions,
                seed=arguments.seed,
                threads=arguments.threads,
                memory_bytes=limit,
            )
        if "failed" in found:
            sys.exit(f"{step} of {rows:,} rows failed: {found['failed']}")
        found["kept_limit"] = found["peak_mb"] * 1e6 <= limit
        done[step] = found
        write_text(kept, json.dumps(done, indent=1))
    return done


def _show(result: dict[str, Steps], arguments: Arguments) -> None:
    measured = {int(rows): steps for rows, steps in result.items()}
    what = f"{arguments.dimension} dimensions, {arguments.kind}, {arguments.threads} threads, {arguments.memory}"
    show_table(*steps_table(measured), title=f"Steps: {what}; files in the page cache")
    show_table(*growth_table(measured), title="Cost per item, and the power of the number of rows with which it grows")
    show_table(*searches_table(measured), title="One text query for 10 rows with their catalog entries")
    if len(measured) > 1:
        columns, cells, reckoning = needs_table(measured, dimension=arguments.dimension)
        show_table(columns, cells, title="On paper")
        print(reckoning)
    print(f"To repeat: {shlex.join(['benchmarks/run', 'index_growth', *sys.argv[1:]])}")


if __name__ == "__main__":
    run(tyro.cli(Arguments))
