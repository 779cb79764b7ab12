"""Read all of an index and say whether it is as it was written and holds together."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_fields, show_json, show_table
from vlm.errors import UsageError, VlmError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index check`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    sample: int = 1000
    """Rows whose facts and distances are computed anew."""

    seed: int = 0
    """Of the sample."""

    json: bool = False
    """Print the report as JSON."""


def run(arguments: Arguments) -> None:
    """Check; a fault makes the command fail."""
    from vlm.index.verify import check_index

    if arguments.sample < 1:
        raise UsageError(f"--sample {arguments.sample} does not fit: one row at least is looked at.")
    report = check_index(arguments.index, sample=arguments.sample, seed=arguments.seed)
    if arguments.json:
        show_json(asdict(report))
    else:
        facts = {name: value for name, value in asdict(report).items() if name not in ("faults", "strays")}
        show_fields(facts | {"strays": len(report.strays), "faults": len(report.faults)})
        if report.faults:
            show_table(["part", "fault"], [[fault.part, fault.what] for fault in report.faults])
    if report.faults:
        raise VlmError(
            f"{arguments.index} has {len(report.faults)} faults; build the index again with vlm index build, or put "
            "back a copy of the damaged files."
        )
