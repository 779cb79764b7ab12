"""What training runs have come to: `vlm runs` lists them, `vlm runs compare` compares them."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.cli.options import JsonOption
from vlm.console import format_duration, quoted, show_json, show_table

if TYPE_CHECKING:
    from vlm.api.runs import RunOverview

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ListRuns:
    """List the training runs in a directory with progress, quality and throughput."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Directory of the runs, searched recursively."""

    json: JsonOption = False

    def run(self) -> None:
        """Read the runs and show a row for each."""
        from vlm.api.runs import list_runs

        runs = list_runs(self.folder)
        if self.json:
            show_json(runs.to_json())
            return
        if not runs:
            start = f"vlm train tiny --data SHARDS --run {quoted(self.folder / 'a')}"
            logger.info(f"There is no run in {self.folder}. Start one: {start}")
            return
        columns = ["run", "state", "model", "objective", "step", "samples", "loss"]
        columns += ["best t→i @1 / 10, %", "samples/s", "MFU", "time"]
        show_table(columns, list(map(_run_row, runs)))
        # the last two by time are most often what one wants to compare
        latest = " ".join(quoted(self.folder / run.run) for run in runs.runs[-2:])
        logger.info(f"Compare: vlm runs compare {latest} --out compare.png")


def _run_row(run: "RunOverview") -> list[str]:
    from vlm.train.history import BEST_METRICS

    steps = f"{run.step:,}"
    if run.planned_steps:
        steps += f" of {run.planned_steps:,}"
    best = "–"
    if run.best:
        recalls = [f"{100 * run.best[name]:.1f}" for name in reversed(BEST_METRICS)]
        best = f"{' / '.join(recalls)} at {run.best['step']:,}"
    return [
        run.run,
        f"stopped at {run.step:,}" if run.state == "stopped" else run.state,
        run.preset or run.architecture or "?",
        run.objective or "?",
        steps,
        _format_or_dash(run.samples, ",.0f"),
        _format_or_dash(run.loss, ".3f"),
        best,
        _format_or_dash(run.samples_per_second, ",.0f"),
        _format_or_dash(run.mfu, ".0%"),
        "–" if run.seconds is None else format_duration(run.seconds),
    ]


def _format_or_dash(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


@dataclass(frozen=True, kw_only=True)
class CompareRuns:
    """Compare training runs with each other, or with the reference curves of their recipe.

    Shows the settings in which they differ, and their last, best and typical metrics; --out plots their curves in one
    figure. With --to, reports whether, where and in which direction a run leaves the prediction interval of its
    reference curves.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folders: two or more, or one with --to."""

    to: str = ""
    """Recipe whose reference curves the runs are compared with."""

    out: Path | None = None
    """PNG file to plot the curves into."""

    json: JsonOption = False

    def run(self) -> None:
        """Compare, plot, show."""
        from vlm.api.runs import compare_runs

        comparison = compare_runs(self.runs, to=self.to)
        if self.out:
            comparison.draw(self.out)
        if self.json:
            show_json(comparison)
            return
        recipe_column = [f"recipe {comparison.recipe}"] if comparison.recipe else []
        columns = ["setting", *recipe_column, *comparison.runs]
        show_table(columns, _table_rows(comparison.settings), title="settings that differ")
        title = "last loss and val metrics; median throughput"
        show_table(["metric", *comparison.runs], _table_rows(comparison.figures), title=title)
        for line in comparison.verdicts():
            print(line)
        if self.out:
            logger.info(f"Curves: {self.out}")


def _table_rows(table: dict[str, list[Any]]) -> list[list[str]]:
    rows: list[list[str]] = []
    for name, values in table.items():
        rows.append([name, *map(partial(_format_value, name), values)])
    return rows


def _format_value(name: str, value: Any) -> str:
    from vlm.train.history import format_metric

    if value is None:
        return "–"
    return format_metric(name, value) if isinstance(value, float) else str(value)
