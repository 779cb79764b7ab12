"""Set runs side by side, or one against the band its recipe is expected to stay in.

Shown are the settings in which they differ and the last, the best and the usual values; --out draws their curves over
one another. With --to the answer is whether, where and in which direction a run leaves the band.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.console import show_json, show_table
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
USUAL = ("samples_per_second", "data_wait", "mfu", "memory_bytes", "gradient_norm")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm runs compare`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folders; two or more, or one with --to."""

    to: str = ""
    """Recipe whose band the runs are held against."""

    out: Path | None = None
    """Draw the curves into this PNG."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Read, compare, draw, show.

    Raises:
        UsageError: there is too little to compare, or no such run or recipe.
    """
    if len(arguments.runs) < (1 if arguments.to else 2):
        raise UsageError("One run cannot be compared with itself: name another, or a recipe by --to.")
    from vlm.train.history import read_run
    from vlm.train.recipes import find_recipe

    recipe = find_recipe(arguments.to) if arguments.to else None
    records = [read_run(folder) for folder in dict.fromkeys(arguments.runs)]
    names = short_names([record.folder for record in records])
    comparisons = [compare_with_references(record, recipe) for record in records] if recipe else []
    settings = differing_settings(records, recipe)
    figures = figures_of(records)
    if arguments.out:
        draw(arguments.out, names, records, recipe)
    if arguments.json:
        told = [
            [_plain(comparison, record) for comparison in own]
            for own, record in zip(comparisons, records, strict=False)
        ]
        show_json({"runs": names, "settings": settings, "figures": figures, "verdicts": told})
        return
    others = [f"recipe {recipe.preset}"] if recipe else []
    show_table(["setting", *others, *names], _rows(settings), title="where the settings differ")
    show_table(["figure", *names], _rows(figures), title="last on val and of the loss; median of speed and the like")
    for name, record, own in zip(names, records, comparisons, strict=False):
        print("\n".join(sentences(name, record, own)))
    if arguments.out:
        logger.info(f"Curves: {arguments.out}")


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where these differ, else their paths."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def differing_settings(records: "Sequence[RunRecord]", recipe: "Recipe | None") -> dict[str, list[Any]]:
    """The settings in which runs differ, among themselves or from the recipe, which then comes first."""
    from dataclasses import asdict

    from vlm.config import config_differences
    from vlm.train.presets import PRESETS

    first = [asdict(PRESETS[recipe.preset][1])] if recipe else []
    return config_differences([*first, *(record.configuration for record in records)])


def figures_of(records: "Sequence[RunRecord]") -> dict[str, list[float | None]]:
    """What each run came to, by metric; metrics that none has are left out."""
    rows = {name: [record.last(name) for record in records] for name in LAST}
    rows |= {f"{name}, usual": [record.typical(name) for record in records] for name in USUAL}
    for name in dict.fromkeys(name for record in records for name in record.figures):
        rows[name] = [record.figures.get(name) for record in records]
    return {name: values for name, values in rows.items() if any(value is not None for value in values)}


def compare_with_references(record: "RunRecord", recipe: "Recipe") -> "list[ReferenceComparison]":
    """A run against each band of a recipe.

    Raises:
        UsageError: nobody knows how long the run was to be.
    """
    from vlm.train.recipes import compare_with_reference

    if recipe.bands and not record.planned_steps:
        raise UsageError(f"{record.folder} does not say how many steps it was to have; go on with it by --resume.")
    return [compare_with_reference(band, record.measured(), record.planned_steps) for band in recipe.bands]


def sentences(name: str, record: "RunRecord", comparisons: "Sequence[ReferenceComparison]") -> list[str]:
    """The verdict on a run for people, with its sources."""
    if not comparisons:
        cure = "train three seeds of it, then python scripts/write_docs.py --baselines"
        return [f"{name}: this recipe has no reference curves yet; {cure}"]
    compared = [comparison for comparison in comparisons if comparison.compared]
    worse = [comparison for comparison in compared if any(not out.is_better for out in comparison.departures)]
    better = [comparison for comparison in compared if comparison.departures and comparison not in worse]
    total = "nothing to compare yet"
    if compared:
        total = "as expected, inside its bands"
        total = "better than expected" if better else total
        total = "NOT as expected: it leaves its band on the worse side" if worse else total
    lines = [f"{name}: {total}."]
    for comparison in comparisons:
        lines.append(f"  {comparison.summary(record.planned_steps)} Source: {comparison.band.source}.")
    if record.state != "finished":
        lines.append(f"  It is {record.state} at step {record.step:,} of {record.planned_steps:,}; this is so far.")
    return lines


def draw(path: Path, names: Sequence[str], records: "Sequence[RunRecord]", recipe: "Recipe | None") -> None:
    """The curves over one another, with the bands of the recipe behind them."""
    from vlm.files import check_parent_exists
    from vlm.train.plots import draw_comparison

    check_parent_exists(path)
    draw_comparison(
        {name: record.measured() for name, record in zip(names, records, strict=True)},
        path,
        title=" · ".join(names) + (f"   against {recipe.preset}" if recipe else ""),
        bands=recipe.bands if recipe else (),
        steps=max(record.planned_steps for record in records),
    )


def _plain(comparison: "ReferenceComparison", record: "RunRecord") -> dict[str, Any]:
    from dataclasses import asdict

    told = asdict(comparison)
    return {
        "metric": comparison.band.metric,
        "kind": comparison.band.kind,
        "source": comparison.band.source,
        "compared": comparison.compared,
        "departures": [out | {"step": round(out["share"] * record.planned_steps)} for out in told["departures"]],
    }


def _rows(table: dict[str, list[Any]]) -> list[list[str]]:
    return [[name, *("–" if value is None else _cell(value) for value in values)] for name, values in table.items()]


def _cell(value: Any) -> str:
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
