"""Delete rows of an index, by their uids or by a filter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlm.cli.index_add import show_commit_info
from vlm.console import read_text
from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line of `vlm index delete`."""

    index: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    """Folder that `vlm index build` made."""

    uid: tuple[str, ...] = ()
    """Rows to delete; one that is not there is an error, and nothing is deleted."""

    uids: Path | None = None
    """A file with the uids, one a line; - is standard input."""

    where: str = ""
    """Delete what this filter chooses, as "split = 'old' and width < 64"."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: Arguments) -> None:
    """Delete, then say what is left."""
    from vlm.index.filters import parse_filter
    from vlm.index.writer import IndexWriter

    uids = [*arguments.uid, *(_read_uids(arguments.uids) if arguments.uids else ())]
    if bool(uids) == bool(arguments.where):
        raise UsageError("Say what to delete: either uids (--uid A B or --uids FILE) or a filter (--where).")
    condition = parse_filter(arguments.where) if arguments.where else None
    with IndexWriter(arguments.index) as writer:
        if condition is None:
            info = writer.delete(uids)
        else:
            info = writer.delete_rows(writer.snapshot.catalogue.where(condition))
    show_commit_info(info, arguments.index, as_json=arguments.json)


def _read_uids(path: Path) -> list[str]:
    uids = [line for line in read_text(path).split("\n") if line]
    if not uids:
        raise UsageError(f"{path} holds no uid: one a line was expected; nothing was deleted.")
    return uids
