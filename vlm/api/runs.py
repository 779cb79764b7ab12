"""`vlm.list_runs` and `vlm.compare_runs`: what training runs have come to; reads their folders, without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlm.config import config_differences
from vlm.errors import UsageError, os_errors_explained
from vlm.files import check_parent_exists
from vlm.results import Result, json_values
from vlm.train.history import BEST_METRICS, RunRecord, find_runs, read_run
from vlm.train.presets import PRESETS
from vlm.train.recipes import Recipe, ReferenceComparison, compare_with_reference, find_recipe, matching_recipe

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
class RunOverview(Result):
    """Progress, quality and throughput of a run; None where unknown.

    run: its path in the folder that was listed. best: the step of its best validation metrics, and these.
    peak_source: what MFU is measured against.
    """

    run: str
    state: str
    preset: str
    architecture: str | None
    objective: str | None
    step: int
    planned_steps: int | None
    samples: float | None
    loss: float | None
    best: dict[str, float] | None
    samples_per_second: float | None
    data_wait: float | None
    mfu: float | None
    peak_source: str | None
    seconds: float | None


@dataclass(frozen=True)
class RunList:
    """The runs of a folder, oldest first."""

    runs: tuple[RunOverview, ...]

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[RunOverview]:
        return iter(self.runs)

    def to_json(self) -> list[dict[str, Any]]:
        """What `vlm runs --json` prints."""
        return [run.to_json() for run in self.runs]


@os_errors_explained()
def list_runs(folder: str | Path = "runs") -> RunList:
    """The training runs in a folder, at any depth, as `vlm runs` lists them.

    Raises:
        UsageError: there is no such folder.
    """
    root = Path(folder)
    return RunList(tuple(_overview(read_run(path), root) for path in find_runs(root)))


def _overview(record: RunRecord, root: Path) -> RunOverview:
    configuration = record.configuration
    best = record.best()
    return RunOverview(
        run=record.name if record.folder == root else str(record.folder.relative_to(root)),
        state=record.state,
        preset=matching_recipe(configuration),
        # a configuration of an older version may lack groups
        architecture=configuration.get("model", {}).get("architecture"),
        objective=configuration.get("objective", {}).get("objective"),
        step=record.step,
        # 0 where a run does not record it
        planned_steps=record.planned_steps or None,
        samples=record.last("seen"),
        loss=record.last("loss"),
        best={name: best[name] for name in ("step", *BEST_METRICS)} if best else None,
        samples_per_second=record.typical("samples_per_second"),
        data_wait=record.typical("data_wait"),
        mfu=record.typical("mfu"),
        # MFU rests on an assumed peak of the hardware: where it was taken from belongs to it
        peak_source=record.telemetry.get("peak_source"),
        seconds=record.last("seconds"),
    )


@dataclass(frozen=True, kw_only=True)
class RunComparison(Result):
    """Runs side by side: the settings in which they differ, their metrics, and the verdict of a recipe on each.

    settings, figures: by name, a value for each run; a recipe's settings come first. comparisons: of each run with
    each reference curve of the recipe.
    """

    runs: tuple[str, ...]
    settings: dict[str, list[Any]]
    figures: dict[str, list[float | None]]
    comparisons: tuple[tuple[ReferenceComparison, ...], ...] = ()
    recipe: str = ""
    records: tuple[RunRecord, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """What `vlm runs compare --json` prints."""
        verdicts: list[list[dict[str, Any]]] = []
        # comparisons are empty without a recipe, hence not strict
        for record, of_run in zip(self.records, self.comparisons, strict=False):
            verdicts.append([_comparison_to_json(comparison, record) for comparison in of_run])
        values = {"runs": self.runs, "settings": self.settings, "figures": self.figures, "verdicts": verdicts}
        return json_values(values)

    def verdicts(self) -> list[str]:
        """The verdict of the recipe on each run in sentences, with its sources; none without a recipe."""
        lines: list[str] = []
        for name, record, of_run in zip(self.runs, self.records, self.comparisons, strict=False):
            lines += _describe_comparisons(name, record, of_run)
        return lines

    def draw(self, out: str | Path) -> None:
        """Plot the curves of all runs into a PNG, in front of the recipe's prediction intervals.

        Raises:
            UsageError: the folder of `out` does not exist.
        """
        # here: matplotlib is loaded by those who draw
        from vlm.train.plots import draw_comparison

        path = Path(out)
        check_parent_exists(path)
        recipe = find_recipe(self.recipe) if self.recipe else None
        draw_comparison(
            {name: record.measured() for name, record in zip(self.runs, self.records, strict=True)},
            path,
            title=" · ".join(self.runs) + (f"   against {self.recipe}" if self.recipe else ""),
            references=recipe.reference_curves if recipe else (),
            steps=max(record.planned_steps for record in self.records),
        )


@os_errors_explained()
def compare_runs(runs: Sequence[str | Path], *, to: str = "") -> RunComparison:
    """Compare training runs with each other or with a recipe's reference curves, as `vlm runs compare` does.

    Args:
        runs: run folders: two or more, or one with a recipe.
        to: the recipe.

    Raises:
        UsageError: there is nothing to compare with, one of them is not a run, or there is no such recipe.
    """
    if len(runs) < (1 if to else 2):
        raise UsageError("One run cannot be compared with itself: name another, or a recipe by --to.")
    recipe = find_recipe(to) if to else None
    # a run named twice would be two equal columns
    records = tuple(map(read_run, map(Path, dict.fromkeys(map(str, runs)))))
    comparisons = tuple(_compare_with_references(record, recipe) for record in records) if recipe else ()
    return RunComparison(
        runs=_short_names([record.folder for record in records]),
        settings=_differing_settings(records, recipe),
        figures=_collect_figures(records),
        comparisons=comparisons,
        recipe=recipe.preset if recipe else "",
        records=records,
    )


def _short_names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The folders' own names if they differ, else their paths."""
    names = tuple(folder.name for folder in folders)
    return names if len(set(names)) == len(names) else tuple(map(str, folders))


def _differing_settings(records: Sequence[RunRecord], recipe: Recipe | None) -> dict[str, list[Any]]:
    """The settings in which runs differ from each other or from the recipe, whose value then comes first."""
    configurations = [asdict(PRESETS[recipe.preset][1])] if recipe else []
    for record in records:
        configurations.append(record.configuration)
    return config_differences(configurations)


def _collect_figures(records: Sequence[RunRecord]) -> dict[str, list[float | None]]:
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


def _compare_with_references(record: RunRecord, recipe: Recipe) -> tuple[ReferenceComparison, ...]:
    if recipe.reference_curves and not record.planned_steps:
        raise UsageError(f"{record.folder} does not record how many steps it was to have; resume it with --resume.")
    lines = record.measured()
    return tuple(compare_with_reference(curve, lines, record.planned_steps) for curve in recipe.reference_curves)


def _describe_comparisons(name: str, record: RunRecord, comparisons: Sequence[ReferenceComparison]) -> list[str]:
    """The verdict on a run, with its sources."""
    if not comparisons:
        cure = "train three seeds of it, then python scripts/write_docs.py --baselines"
        return [f"{name}: this recipe has no reference curves yet; {cure}"]
    summaries: list[str] = []
    num_compared = 0
    num_better = 0
    num_worse = 0
    for comparison in comparisons:
        summaries.append(f"  {comparison.summary(record.planned_steps)} Source: {comparison.reference.source}.")
        num_compared += comparison.compared
        for departure in comparison.departures:
            num_better += departure.is_better
            num_worse += not departure.is_better
    # one metric that is worse decides, whatever the others are
    if not num_compared:
        verdict = "nothing to compare yet"
    elif num_worse:
        verdict = "NOT as expected: worse than its reference curves"
    elif num_better:
        verdict = "better than expected"
    else:
        verdict = "as expected, within its reference curves"
    lines = [f"{name}: {verdict}.", *summaries]
    if record.state != "finished":
        lines.append(f"  It is {record.state} at step {record.step:,} of {record.planned_steps:,}; this is so far.")
    return lines


def _comparison_to_json(comparison: ReferenceComparison, record: RunRecord) -> dict[str, Any]:
    departures: list[dict[str, Any]] = []
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
