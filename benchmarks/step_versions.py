#!/usr/bin/env python
"""Whether a training step has become slower: this checkout and another one, in pairs.

    benchmarks/run step_versions --before CHECKOUT --data SHARDS [--pairs 18] [--json]

Both sides run in processes of their own and are asked in turn, first one, then the other, for the same steps on one
batch; what is compared is processor time, which other programs on the machine disturb least. Shown is the median of the
pairs' ratios with its 95% interval (order statistics).
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from math import comb
from pathlib import Path

import tyro

from vlm.cli.main import print_error
from vlm.console import show_json, show_table
from vlm.errors import UsageError, VlmError

sys.path.insert(0, str(Path(__file__).parent))
from parts.measure_process import Side
from parts.messages import say

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A kind of step."""

    name: str
    objective: str
    architecture: str = "tiny"
    micro: int = 0


SETTINGS = (
    Setting(name="clip", objective="clip"),
    Setting(name="clip in four parts", objective="clip", micro=16),
    Setting(name="siglip", objective="siglip"),
    Setting(name="coca", objective="clip + 2*caption", architecture="tiny-coca"),
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the comparison."""

    before: Path
    """Checkout to compare with, e.g. of git worktree add."""

    data: str
    """Shards that the batch is taken from."""

    pairs: int = 18
    """Pairs of measurements of each kind of step."""

    steps: int = 3
    """Steps of a measurement."""

    batch: int = 64
    """Batch size."""

    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Seconds of a step before and now, medians; the median of the pairs' ratios now / before with its interval."""

    name: str
    before: float
    now: float
    ratio: float
    low: float
    high: float


def run(arguments: Arguments) -> None:
    """Measure in pairs, show."""
    if not (arguments.before / "vlm").is_dir():
        raise UsageError(f"before = {str(arguments.before)!r} is no checkout: it has no folder vlm.")
    if arguments.pairs < 6:
        raise UsageError(f"pairs = {arguments.pairs}: a 95% interval of a median needs at least 6.")
    compared: list[Compared] = []
    with tempfile.TemporaryDirectory() as folder, side_of(arguments.before) as before, side_of(ROOT) as now:
        for setting in SETTINGS:
            say(setting.name)
            compared.append(_compare(arguments, setting, before, now, folder))
    if arguments.json:
        show_json({"pairs": arguments.pairs, "steps": [vars(entry) for entry in compared]})
        return
    rows: list[list[object]] = []
    for entry in compared:
        interval = f"{entry.ratio:.3f} [{entry.low:.3f}, {entry.high:.3f}]"
        rows.append([entry.name, f"{1e3 * entry.before:.1f} ms", f"{1e3 * entry.now:.1f} ms", interval])
    show_table(["step", "before", "now", "ratio"], rows, title=f"{arguments.pairs} pairs, processor time")


def side_of(checkout: Path) -> Side:
    """A process with one thread that imports the library of a checkout."""
    return Side(sys.executable, "version_steps.py", threads=1, checkout=checkout)


def _compare(arguments: Arguments, setting: Setting, before: Side, now: Side, folder: str) -> Compared:
    request = {"objective": setting.objective, "architecture": setting.architecture, "micro": setting.micro}
    request |= {"batch": arguments.batch, "shards": arguments.data, "folder": folder}
    seconds: dict[str, list[float]] = {"before": [], "now": []}
    for number in range(arguments.pairs):
        sides = [("before", before), ("now", now)]
        # which one is first changes from pair to pair, so that a drift of the machine favours neither
        for name, side in sides if number % 2 else reversed(sides):
            seconds[name].append(side.ask(**request, steps=arguments.steps)["seconds"] / arguments.steps)
    ratios = sorted(now / before for before, now in zip(seconds["before"], seconds["now"], strict=True))
    low, high = median_interval(ratios)
    return Compared(
        name=setting.name,
        before=statistics.median(seconds["before"]),
        now=statistics.median(seconds["now"]),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
    )


def median_interval(ordered: list[float]) -> tuple[float, float]:
    """An interval that holds the median with at least 95%: the r-th least and the r-th largest, by the binomial law.

    >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (1.0, 6.0)
    """
    number = len(ordered)
    rank = 0
    below = 0.0
    while 2 * (below + comb(number, rank) / 2**number) <= 0.05:
        below += comb(number, rank) / 2**number
        rank += 1
    return ordered[rank - 1], ordered[number - rank]


if __name__ == "__main__":
    try:
        run(tyro.cli(Arguments))
    except VlmError as error:
        raise SystemExit(print_error(str(error), error.exit_code)) from None
