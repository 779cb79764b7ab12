"""What an index holds, and what it was made from."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.console import show_fields, show_json, show_table


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index info`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Show the facts, and a line for each segment."""
    from vlm.index.reader import Index

    facts = asdict(Index.open(arguments.index).info())
    if arguments.json:
        show_json(facts)
        return
    segments, evidence = facts.pop("segments"), facts.pop("evidence")
    show_fields({name.replace("_", " "): value for name, value in facts.items()})
    if segments:
        show_table(list(segments[0]), [list(segment.values()) for segment in segments], title="segments")
    if "why" in evidence:
        show_fields({"why this kind": evidence["why"]})
