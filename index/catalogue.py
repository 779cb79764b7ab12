"""The catalogue of an index as one generation sees it: SQLite with what each row is, its facts and its words."""

import contextlib
import json
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm.errors import VlmError
from vlm.index.catalogue_writing import LATEST, as_words, digest_of
from vlm.index.layout import CURE
from vlm.index.parts import Origin, captions_from_json
from vlm.index.where import Condition, rows_where
from vlm.tensors import Array, Int64

# a writer holds the file alone only while it commits
_PATIENCE_SECONDS = 60.0
_NAMES_AT_ONCE = 10_000
_SELECT = """
SELECT row, uid, key, address AS shard, number, image_offset, image_size, caption_number, captions, metadata, digest
FROM rows JOIN shards ON shards.id = rows.shard
"""


@dataclass(frozen=True, kw_only=True)
class Entry(Origin):
    """One row of an index: its number, which is never given again, and what it was made from."""

    row: int


class Catalogue:
    """An open catalogue, for reading only; may be used from several threads.

    generation: the rows it shows are those that were born by then and had not died; later changes are not seen.
    """

    def __init__(self, path: Path, generation: int = LATEST - 1) -> None:
        self.path, self.generation = path, generation
        self._file = _File(path)

    def at(self, generation: int) -> "Catalogue":
        """The same open file as another generation sees it."""
        other = object.__new__(Catalogue)
        other.path, other.generation, other._file = self.path, generation, self._file
        return other

    def is_current(self) -> bool:
        """Whether the open file is still the one of this name."""
        return self._file.is_current()

    def close(self) -> None:
        """Release the file, for every generation; left alone, it goes with the last of them."""
        self._file.database.close()

    def __len__(self) -> int:
        # one statement, because a writer may commit between two
        query = (
            "SELECT (SELECT count(*) FROM rows) - (SELECT count(*) FROM rows WHERE born > ?1)"
            f" - (SELECT count(*) FROM rows WHERE died <= ?1 AND died < {LATEST} AND born <= ?1)"
        )
        with self._reading() as database:
            return database.execute(query, (self.generation,)).fetchone()[0]

    def count_hidden(self) -> int:
        """How many rows are kept that this generation does not see."""
        with self._reading() as database:
            return len(self._hidden(database))

    def entries(self, rows: Sequence[int]) -> list[Entry]:
        """The entries of the given row numbers, in their order, dead or alive.

        Raises:
            VlmError: one is not there.
        """
        found = self._select("WHERE row IN (SELECT value FROM json_each(?))", json.dumps(sorted(set(rows))))
        by_row = {entry.row: entry for entry in found}
        missing = next((row for row in rows if row not in by_row), None)
        if missing is not None:
            raise VlmError(f"{self.path} has no row {missing:,}, which a segment has; {CURE}.")
        return [by_row[row] for row in rows]

    def find(self, uid: str) -> Entry | None:
        """The entry of this uid, if there is one."""
        return next(iter(self._select("WHERE uid = ? AND born <= ? AND died > ?", uid, *self._now)), None)

    def rows_of(self, uids: Iterable[str]) -> dict[str, int]:
        """The row of each uid that there is."""
        names, found = list(uids), {}
        query = "SELECT uid, row FROM rows WHERE uid IN (SELECT value FROM json_each(?)) AND born <= ? AND died > ?"
        with self._reading() as database:
            for first in range(0, len(names), _NAMES_AT_ONCE):
                block = json.dumps(names[first : first + _NAMES_AT_ONCE])
                found |= dict(database.execute(query, (block, *self._now)).fetchall())
        return found

    def rows(self) -> Int64[Array, " N"]:
        """All row numbers, rising."""
        with self._reading() as database:
            everyone = np.array([row for (row,) in database.execute("SELECT row FROM rows")], np.int64)
            return np.setdiff1d(everyone, self._hidden(database), assume_unique=True)

    def where(self, condition: Condition) -> Int64[Array, " N"]:
        """The numbers of the rows a condition chooses, rising.

        Raises:
            UsageError: it names a field that no row has, or compares numbers with texts.
        """
        with self._reading() as database:
            return np.setdiff1d(rows_where(database, condition), self._hidden(database), assume_unique=True)

    def search_text(self, words: str, top: int) -> list[Entry]:
        """The entries whose captions hold all the words, best first (BM25; ties by row).

        Case and accents do not matter; nothing in `words` is an operator.
        """
        phrases = [f'"{as_words(word)}"' for word in words.replace('"', " ").split()]
        if not phrases:
            return []
        with self._reading() as database:
            found = database.execute(
                "SELECT row FROM captions_text JOIN rows ON row = captions_text.rowid WHERE captions_text MATCH ?"
                " AND born <= ? AND died > ? ORDER BY rank, row LIMIT ?",
                (" ".join(phrases), *self._now, top),
            ).fetchall()
        return self.entries([row for (row,) in found])

    def facts_of(self, rows: Sequence[int]) -> dict[int, set[tuple[str, int | float | str]]]:
        """The field and value of each fact of the given rows; reads the whole table of facts."""
        found: dict[int, set[tuple[str, int | float | str]]] = {row: set() for row in rows}
        query = (
            "SELECT row, name, value FROM facts JOIN fields ON id = field WHERE row IN (SELECT value FROM json_each(?))"
        )
        with self._reading() as database:
            for row, name, value in database.execute(query, (json.dumps(list(rows)),)):
                found[row].add((name, value))
        return found

    def faults(self) -> Iterator[str]:
        """What is not as it was written: SQLite's own check, then each row against its digest."""
        query, last = f"{_SELECT} WHERE row > ? ORDER BY row LIMIT {_NAMES_AT_ONCE}", -1
        with self._reading() as database:
            for (found,) in database.execute("PRAGMA integrity_check").fetchall():
                if found != "ok":
                    yield f"{self.path.name}: {found}"
            # block by block, so that a writer may commit in between
            while block := database.execute(query, (last,)).fetchall():
                last = block[-1]["row"]
                for values in map(dict, block):
                    if values.pop("digest") != digest_of(*list(values.values())[1:]):
                        yield f"{self.path.name}: row {values['row']:,} ({values['uid']}) is not as it was written"

    @property
    def _now(self) -> tuple[int, int]:
        return self.generation, self.generation

    def _hidden(self, database: sqlite3.Connection) -> Int64[Array, " N"]:
        """The rows there are that this generation does not see."""
        # the second condition is the one of the partial index on `died`
        query = f"SELECT row FROM rows WHERE born > ? UNION SELECT row FROM rows WHERE died <= ? AND died < {LATEST}"
        return np.array([row for (row,) in database.execute(query, self._now)], np.int64)

    def _select(self, condition: str, *values: str | int) -> list[Entry]:
        with self._reading() as database:
            return [_entry(row) for row in database.execute(_SELECT + condition, values)]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _explaining(self.path):
            yield self._file.database


class _File:
    """A connection, shared by the generations that are read through it, and closed with the last of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explaining(path):
            # not mode=ro: what a killed writer left half done must be rolled back before anything can be read
            uri = f"{path.absolute().as_uri()}?mode=rw"
            self.database = sqlite3.connect(
                uri, uri=True, check_same_thread=False, timeout=_PATIENCE_SECONDS, isolation_level=None
            )
            weakref.finalize(self, self.database.close)
            self.database.row_factory = sqlite3.Row
            self.database.execute("PRAGMA query_only = ON")
            (pages,) = self.database.execute("PRAGMA page_count").fetchone()
            (page_bytes,) = self.database.execute("PRAGMA page_size").fetchone()
            self._identity = _identity(path)
        if path.stat().st_size < pages * page_bytes:
            raise VlmError(f"{path} is damaged: {path.stat().st_size:,} of {pages * page_bytes:,} bytes; {CURE}.")

    def is_current(self) -> bool:
        return self.path.exists() and _identity(self.path) == self._identity


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise VlmError(f"{path} cannot be read ({error}); {CURE}.") from error


def _entry(row: sqlite3.Row) -> Entry:
    values = dict(row)
    del values["digest"]
    values["captions"] = captions_from_json(values["captions"])
    values["metadata"] = json.loads(values["metadata"])
    return Entry(**values)
