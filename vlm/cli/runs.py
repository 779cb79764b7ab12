"""List the runs below a folder: how far each is, how good and how fast."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.console import show_json, show_table

if TYPE_CHECKING:
    from vlm.train.history import RunRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm runs`."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Folder that the runs lie in, however deep."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Read the runs and show a line for each."""
    from vlm.train.history import find_runs, read_run

    records = [read_run(folder) for folder in find_runs(arguments.folder)]
    facts = [summarize(record, arguments.folder) for record in records]
    if arguments.json:
        show_json(facts)
        return
    if not facts:
        logger.info(
            f"There is no run in {arguments.folder}. Begin one: vlm train tiny --data SHARDS --run {arguments.folder}/a"
        )
        return
    columns = [
        "run",
        "state",
        "what",
        "objective",
        "step",
        "samples",
        "loss",
        "best t→i @1 / 10",
        "samples/s",
        "MFU",
        "time",
    ]
    show_table(columns, [row_of(summary) for summary in facts])
    latest = " ".join(str(record.folder) for record in records[-2:])
    logger.info(f"Compare: vlm runs compare {latest} --out compare.png")


def summarize(record: "RunRecord", root: Path) -> dict[str, Any]:
    """What a run is, with names; None where it is not known."""
    from vlm.train.history import BEST_METRICS
    from vlm.train.recipes import matching_recipe

    configuration = record.configuration
    best = record.best()
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
        "peak_source": record.telemetry.get("peak_source"),
        "seconds": record.last("seconds"),
    }


def row_of(summary: dict[str, Any]) -> list[str]:
    """The facts as cells."""
    from vlm.console import format_duration
    from vlm.train.history import BEST_METRICS

    steps = f"{summary['step']:,}" + (f" of {summary['planned_steps']:,}" if summary["planned_steps"] else "")
    best = summary["best"]
    return [
        summary["run"],
        f"stopped at {summary['step']:,}" if summary["state"] == "stopped" else summary["state"],
        summary["preset"] or summary["architecture"] or "?",
        summary["objective"] or "?",
        steps,
        _shown(summary["samples"], ",.0f"),
        _shown(summary["loss"], ".3f"),
        " / ".join(f"{100 * best[name]:.1f}" for name in reversed(BEST_METRICS)) + f" at {best['step']:,}"
        if best
        else "–",
        _shown(summary["samples_per_second"], ",.0f"),
        _shown(summary["mfu"], ".0%"),
        format_duration(summary["seconds"]) if summary["seconds"] is not None else "–",
    ]


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
