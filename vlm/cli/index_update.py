"""Put the rows of an embeddings folder into an index, in the place of those with the same uid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.index_add import show_change


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index update`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Folder that `vlm embed` made with the same model; rows with a new uid are added."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Replace and add, then say what there is."""
    from vlm.index.changes import NewRows
    from vlm.index.writer import IndexWriter

    new = NewRows.of_folder(arguments.embeddings)
    with IndexWriter(arguments.index) as writer:
        change = writer.update(new)
    show_change(change, arguments.index, as_json=arguments.json)
