"""The journal of a folder of shards that is being written: a line for each that is whole."""

import json
from pathlib import Path
from typing import Protocol, TypeVar

from vlm.errors import VlmError
from vlm.files import read_lines, write_text


class Written(Protocol):
    """What a line tells at least: the shard's file name and its size."""

    @property
    def name(self) -> str:
        """File name, in the journal's folder."""
        ...

    @property
    def bytes(self) -> int:
        """Size of the file."""
        ...


Entry = TypeVar("Entry", bound=Written)


def read_journal(journal: Path, kind: type[Entry]) -> list[Entry]:
    """The shards an earlier run finished, in the journal's folder; a line it could not finish is removed.

    Raises:
        VlmError: one of them is no longer there as it was.
    """
    lines = read_lines(journal)
    if journal.exists():
        write_text(journal, "".join(line + "\n" for line in lines))
    shards = [kind(**json.loads(line)) for line in lines]
    for shard in shards:
        path = journal.parent / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise VlmError(f"{path} was changed since it was written; remove {journal.parent} and repeat the command.")
    return shards
