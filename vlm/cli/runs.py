"""List the runs below a folder: how far each is, how good and how fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vlm.console import say, show_json, show_table

if TYPE_CHECKING:
    from vlm.train.history import RunRecord


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
    facts = [facts_of(record, arguments.folder) for record in records]
    if arguments.json:
        show_json(facts)
        return
    if not facts:
        say(
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
    show_table(columns, [row_of(fact) for fact in facts])
    say(f"Side by side: vlm runs compare {' '.join(str(record.folder) for record in records[-2:])} --out compare.png")


def facts_of(record: "RunRecord", root: Path) -> dict[str, Any]:
    """What a run is, with names; None where it is not known."""
    from vlm.train.history import BEST_OF
    from vlm.train.recipes import recipe_of

    configuration = record.configuration
    best = record.best()
    return {
        "run": record.name if record.folder == root else str(record.folder.relative_to(root)),
        "state": record.state,
        "preset": recipe_of(configuration),
        "architecture": configuration.get("model", {}).get("architecture"),
        "objective": configuration.get("objective", {}).get("objective"),
        "step": record.step,
        "planned_steps": record.planned_steps or None,
        "samples": record.last("seen"),
        "loss": record.last("loss"),
        "best": {name: best[name] for name in ("step", *BEST_OF)} if best else None,
        "samples_per_second": record.usual("samples_per_second"),
        "data_wait": record.usual("data_wait"),
        "mfu": record.usual("mfu"),
        "peak_source": record.telemetry.get("peak_source"),
        "seconds": record.last("seconds"),
    }


def row_of(fact: dict[str, Any]) -> list[str]:
    """The facts as cells."""
    from vlm.console import duration
    from vlm.train.history import BEST_OF

    steps = f"{fact['step']:,}" + (f" of {fact['planned_steps']:,}" if fact["planned_steps"] else "")
    best = fact["best"]
    return [
        fact["run"],
        f"stopped at {fact['step']:,}" if fact["state"] == "stopped" else fact["state"],
        fact["preset"] or fact["architecture"] or "?",
        fact["objective"] or "?",
        steps,
        _shown(fact["samples"], ",.0f"),
        _shown(fact["loss"], ".3f"),
        " / ".join(f"{100 * best[name]:.1f}" for name in reversed(BEST_OF)) + f" at {best['step']:,}" if best else "–",
        _shown(fact["samples_per_second"], ",.0f"),
        _shown(fact["mfu"], ".0%"),
        duration(fact["seconds"]) if fact["seconds"] is not None else "–",
    ]


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
