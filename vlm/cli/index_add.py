"""Add the rows of an embeddings folder to an index; searches go on meanwhile."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm.console import show_fields, show_json

if TYPE_CHECKING:
    from vlm.index.writer import CommitInfo

logger = logging.getLogger(__name__)

# from here on dead rows cost a search more than a compaction is put off for
_MANY_DEAD = 0.2


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index add`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    embeddings: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EMBEDDINGS")]
    """Folder that `vlm embed` made with the same model."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Add, then say what there is."""
    from vlm.index.writer import IndexWriter, InsertBatch

    new = InsertBatch.from_folder(arguments.embeddings)
    with IndexWriter(arguments.index) as writer:
        info = writer.add(new)
    show_commit_info(info, arguments.index, as_json=arguments.json)


def show_commit_info(info: "CommitInfo", index: Path, *, as_json: bool) -> None:
    """What a change did, and whether it is time to compact."""
    if as_json:
        show_json(asdict(info))
        return
    show_fields(asdict(info))
    if info.dead > _MANY_DEAD * (info.dead + info.rows):
        logger.info(f"Next: vlm index compact {index}, for {info.dead:,} dead rows are passed over by each search.")
