"""What training runs have come to: `vlm runs` lists them, `vlm runs compare` compares them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.cli.options import JsonOption
from vlm.console import format_duration, show_json, show_table
from vlm.errors import UsageError

if TYPE_CHECKING:
    from vlm.train.history import RunRecord
    from vlm.train.recipes import Recipe, ReferenceComparison

logger = logging.getLogger(__name__)

LAST = (
    "loss",
    "text_to_image_recall@1",
    "text_to_image_recall@10",
    "image_to_text_recall@1",
    "image_to_text_recall@10",
    "logit_scale",
    "seen",
    "seconds",
)
"""Metrics compared by their last value."""

TYPICAL = ("samples_per_second", "data_wait", "mfu", "memory_bytes", "gradient_norm")
"""Metrics compared by their median."""


@dataclass(frozen=True, kw_only=True)
class ListRuns:
    """List the training runs in a directory with progress, quality and throughput."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Directory of the runs, searched recursively."""

    json: JsonOption = False

    def run(self) -> None:
        """Read the runs and show a row for each."""
        from vlm.train.history import find_runs, read_run

        records = list(map(read_run, find_runs(self.folder)))
        summaries = [summarize_run(record, self.folder) for record in records]
        if self.json:
            show_json(summaries)
            return
        if not records:
            start = f"vlm train tiny --data SHARDS --run {self.folder}/a"
            logger.info(f"There is no run in {self.folder}. Start one: {start}")
            return
        columns = ["run", "state", "model", "objective", "step", "samples", "loss"]
        columns += ["best t→i @1 / 10, %", "samples/s", "MFU", "time"]
        show_table(columns, list(map(_run_row, summaries)))
        # the last two by time are most often what one wants to compare
        latest = " ".join(str(record.folder) for record in records[-2:])
        logger.info(f"Compare: vlm runs compare {latest} --out compare.png")


def summarize_run(record: "RunRecord", root: Path) -> dict[str, Any]:
    """Progress, quality and throughput of a run; None where unknown."""
    from vlm.train.history import BEST_METRICS
    from vlm.train.recipes import matching_recipe

    configuration = record.configuration
    best = record.best()
    # a configuration of an older version may lack groups
    return {
        "run": record.name if record.folder == root else str(record.folder.relative_to(root)),
        "state": record.state,
        "preset": matching_recipe(configuration),
        "architecture": configuration.get("model", {}).get("architecture"),
        "objective": configuration.get("objective", {}).get("objective"),
        "step": record.step,
        "planned_steps": record.planned_steps or None,
        "samples": record.last("seen"),
        "loss": record.last("loss"),
        "best": {name: best[name] for name in ("step", *BEST_METRICS)} if best else None,
        "samples_per_second": record.typical("samples_per_second"),
        "data_wait": record.typical("data_wait"),
        "mfu": record.typical("mfu"),
        # MFU rests on an assumed peak of the hardware: where it was taken from belongs to it
        "peak_source": record.telemetry.get("peak_source"),
        "seconds": record.last("seconds"),
    }


def _run_row(summary: dict[str, Any]) -> list[str]:
    from vlm.train.history import BEST_METRICS

    steps = f"{summary['step']:,}"
    if summary["planned_steps"]:
        steps += f" of {summary['planned_steps']:,}"
    best = "–"
    if summary["best"]:
        recalls = [f"{100 * summary['best'][name]:.1f}" for name in reversed(BEST_METRICS)]
        best = f"{' / '.join(recalls)} at {summary['best']['step']:,}"
    return [
        summary["run"],
        f"stopped at {summary['step']:,}" if summary["state"] == "stopped" else summary["state"],
        summary["preset"] or summary["architecture"] or "?",
        summary["objective"] or "?",
        steps,
        _format_or_dash(summary["samples"], ",.0f"),
        _format_or_dash(summary["loss"], ".3f"),
        best,
        _format_or_dash(summary["samples_per_second"], ",.0f"),
        _format_or_dash(summary["mfu"], ".0%"),
        "–" if summary["seconds"] is None else format_duration(summary["seconds"]),
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
        """Read, compare, plot, show."""
        if len(self.runs) < (1 if self.to else 2):
            raise UsageError("One run cannot be compared with itself: name another, or a recipe by --to.")
        from vlm.train.history import read_run
        from vlm.train.recipes import find_recipe

        recipe = find_recipe(self.to) if self.to else None
        # a run named twice would be two equal columns
        records = list(map(read_run, dict.fromkeys(self.runs)))
        names = _short_names([record.folder for record in records])
        comparisons = [compare_with_references(record, recipe) for record in records] if recipe else []
        settings = differing_settings(records, recipe)
        figures = collect_figures(records)
        if self.out:
            plot(self.out, names, records, recipe)
        if self.json:
            verdicts: list[list[dict[str, Any]]] = []
            # comparisons are empty without a recipe, hence not strict
            for record, of_run in zip(records, comparisons, strict=False):
                verdicts.append([_comparison_to_json(comparison, record) for comparison in of_run])
            show_json({"runs": names, "settings": settings, "figures": figures, "verdicts": verdicts})
            return
        recipe_column = [f"recipe {recipe.preset}"] if recipe else []
        show_table(["setting", *recipe_column, *names], _table_rows(settings), title="settings that differ")
        show_table(["metric", *names], _table_rows(figures), title="last loss and val metrics; median throughput")
        for name, record, of_run in zip(names, records, comparisons, strict=False):
            print("\n".join(describe_comparisons(name, record, of_run)))
        if self.out:
            logger.info(f"Curves: {self.out}")


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names if they differ, else their paths."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def differing_settings(records: "Sequence[RunRecord]", recipe: "Recipe | None") -> dict[str, list[Any]]:
    """The settings in which runs differ from each other or from the recipe, whose value then comes first."""
    from vlm.config import config_differences
    from vlm.train.presets import PRESETS

    recipe_config = [asdict(PRESETS[recipe.preset][1])] if recipe else []
    return config_differences([*recipe_config, *(record.configuration for record in records)])


def collect_figures(records: "Sequence[RunRecord]") -> dict[str, list[float | None]]:
    """The metrics of each run by name; metrics that no run has are omitted."""
    figures: dict[str, list[float | None]] = {}
    for name in LAST:
        figures[name] = [record.last(name) for record in records]
    # medians, since single steps wait for evaluations and checkpoints
    for name in TYPICAL:
        figures[f"{name}, usual"] = [record.typical(name) for record in records]
    for record in records:
        for name in record.figures:
            figures[name] = [other.figures.get(name) for other in records]
    return {name: values for name, values in figures.items() if values.count(None) < len(values)}


def compare_with_references(record: "RunRecord", recipe: "Recipe") -> "list[ReferenceComparison]":
    """Compare a run with each reference curve of a recipe.

    Raises:
        UsageError: the planned number of steps is unknown.
    """
    from vlm.train.recipes import compare_with_reference

    if recipe.reference_curves and not record.planned_steps:
        raise UsageError(f"{record.folder} does not record how many steps it was to have; resume it with --resume.")
    return [compare_with_reference(curve, record.measured(), record.planned_steps) for curve in recipe.reference_curves]


def describe_comparisons(name: str, record: "RunRecord", comparisons: "Sequence[ReferenceComparison]") -> list[str]:
    """The verdict on a run for people, with its sources."""
    if not comparisons:
        cure = "train three seeds of it, then python scripts/write_docs.py --baselines"
        return [f"{name}: this recipe has no reference curves yet; {cure}"]
    departures = list(chain.from_iterable(comparison.departures for comparison in comparisons))
    # one metric that is worse decides, whatever the others are
    if not any(comparison.compared for comparison in comparisons):
        verdict = "nothing to compare yet"
    elif not all(departure.is_better for departure in departures):
        verdict = "NOT as expected: worse than its reference curves"
    elif departures:
        verdict = "better than expected"
    else:
        verdict = "as expected, within its reference curves"
    lines = [f"{name}: {verdict}."]
    for comparison in comparisons:
        lines.append(f"  {comparison.summary(record.planned_steps)} Source: {comparison.reference.source}.")
    if record.state != "finished":
        lines.append(f"  It is {record.state} at step {record.step:,} of {record.planned_steps:,}; this is so far.")
    return lines


def plot(path: Path, names: Sequence[str], records: "Sequence[RunRecord]", recipe: "Recipe | None") -> None:
    """Plot the curves of all runs in one figure, in front of the recipe's prediction intervals."""
    from vlm.files import check_parent_exists
    from vlm.train.plots import draw_comparison

    check_parent_exists(path)
    curves = {name: record.measured() for name, record in zip(names, records, strict=True)}
    draw_comparison(
        curves,
        path,
        title=" · ".join(names) + (f"   against {recipe.preset}" if recipe else ""),
        references=recipe.reference_curves if recipe else (),
        steps=max(record.planned_steps for record in records),
    )


def _comparison_to_json(comparison: "ReferenceComparison", record: "RunRecord") -> dict[str, Any]:
    departures = []
    for departure in comparison.departures:
        # shares of the run's own schedule, since reference runs may be longer or shorter
        step = round(departure.share * record.planned_steps)
        departures.append(asdict(departure) | {"step": step})
    return {
        "metric": comparison.reference.metric,
        "kind": comparison.reference.kind,
        "source": comparison.reference.source,
        "compared": comparison.compared,
        "departures": departures,
    }


def _table_rows(table: dict[str, list[Any]]) -> list[list[str]]:
    return [[name, *(_format_value(name, value) for value in values)] for name, values in table.items()]


def _format_value(name: str, value: Any) -> str:
    from vlm.train.history import format_metric

    if value is None:
        return "–"
    return format_metric(name, value) if isinstance(value, float) else str(value)
