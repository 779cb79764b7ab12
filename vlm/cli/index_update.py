"""Put the rows of an embeddings folder into an index, in the place of those with the same uid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.index_add import show_commit_info


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index update`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Folder that `vlm embed` made with the same model; rows with a new uid are added."""

    where: str = ""
    """Replace only what this filter chooses, as "split = 'old' and width < 64"; other rows of EMBEDDINGS, new ones too,
    are left out and counted."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Replace and add, then say what there is."""
    from vlm.index.filters import parse_filter
    from vlm.index.writer import IndexWriter, InsertBatch

    condition = parse_filter(arguments.where) if arguments.where else None
    new = InsertBatch.from_folder(arguments.embeddings)
    with IndexWriter(arguments.index) as writer:
        allowed_rows = writer.snapshot.catalogue.where(condition) if condition else None
        info = writer.update(new, allowed_rows=allowed_rows)
    show_commit_info(info, arguments.index, as_json=arguments.json)
