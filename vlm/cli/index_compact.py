"""Write all living rows of an index into one segment, trained anew; the dead ones are gone then."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.index_add import show_commit_info


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index compact`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    kind: str = ""
    """Another kind from now on, by its own rule; empty keeps kind and tuning."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Compact, then say what there is."""
    from vlm.index.ann.index_type import TuningParams
    from vlm.index.writer import IndexWriter

    with IndexWriter(arguments.index) as writer:
        info = writer.compact(kind=arguments.kind, tuning=TuningParams() if arguments.kind else None)
    show_commit_info(info, arguments.index, as_json=arguments.json)
