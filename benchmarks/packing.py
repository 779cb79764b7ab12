#!/usr/bin/env python
"""How fast `vlm pack` is, every image verified, against another checkout; both must write the same bytes.

    git worktree add ../before COMMIT
    benchmarks/run packing SOURCE --before ../before [--rounds 7] [--options "--kind classes"] [--json]

Both checkouts pack the same source in turn, each time in a new process into a new folder, the one first that was last
before. Images a second are those of packing alone, as the command tells them, and of the whole command; shown are the
medians of each side and of the ratios of the rounds. CPU seconds are more certain on a shared machine.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from vlm.console import show_json, show_table

sys.path.insert(0, str(Path(__file__).parent))
from parts.messages import say
from parts.result_comparison import compare_folders

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("images/s of packing", "images/s, whole command", "CPU seconds")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark of packing."""

    source: tyro.conf.Positional[Path]
    """What is packed."""

    before: Path
    """Another checkout, to compare with."""

    rounds: int = 7
    """Rounds; in each both checkouts pack once."""

    options: str = ""
    """Further options of vlm pack."""

    json: bool = False
    """Print the results as JSON."""


def main(arguments: Arguments) -> None:
    """Pack, compare, show."""
    trees = {"before": arguments.before.resolve(), "now": ROOT}
    costs: dict[str, list[tuple[float, ...]]] = {side: [] for side in trees}
    for number in range(arguments.rounds + 1):
        with tempfile.TemporaryDirectory() as temporary:
            for side in sorted(trees, reverse=bool(number % 2)):
                folder = Path(temporary) / side
                folder.mkdir()
                cost = _pack(trees[side], folder, arguments)
                # the first round only warms the caches of files
                if number:
                    costs[side].append(cost)
            for _, difference in compare_folders(Path(temporary) / "before", Path(temporary) / "now"):
                if difference:
                    sys.exit(f"The checkouts pack different bytes: {difference}")
        say(f"round {number} of {arguments.rounds}")
    results: dict[str, Any] = {}
    for place, field in enumerate(FIELDS):
        before, now = ([cost[place] for cost in costs[side]] for side in trees)
        ratios = [one / other for one, other in zip(now, before, strict=True)]
        results[field] = {"before": median(before), "now": median(now), "ratio": median(ratios), "ratios": ratios}
    if arguments.json:
        show_json(results)
        return
    rows: list[list[Any]] = []
    for field, result in results.items():
        digits = 2 if field == FIELDS[-1] else 0
        cells = [f"{result[side]:,.{digits}f}" for side in trees]
        low, high = min(result["ratios"]), max(result["ratios"])
        rows.append([field, *cells, f"{result['ratio']:.2f} ({low:.2f}–{high:.2f})"])
    show_table(["", *trees, "ratio"], rows, title=f"{arguments.rounds} rounds, the same bytes in all")


def _pack(tree: Path, folder: Path, arguments: Arguments) -> tuple[float, ...]:
    """Pack once, into `folder/shards`; the values of `FIELDS`."""
    words = ["pack", str(arguments.source.resolve()), "shards", "--json", *shlex.split(arguments.options)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    before = os.times()
    started = time.perf_counter()
    # -P: the folder it is started in is not searched for modules
    command = [sys.executable, "-P", "-m", "vlm", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{tree}: vlm {shlex.join(words)} failed: {done.stderr[-500:]}")
    after = os.times()
    summary = json.loads(done.stdout)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return summary["pairs_per_second"], summary["samples"] / wall, cpu


if __name__ == "__main__":
    main(tyro.cli(Arguments))
