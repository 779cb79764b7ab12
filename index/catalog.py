"""How a catalogue is written: whole by a build, in one transaction by each change, and brought back after a crash.

A row has the generations in which it was born and in which it died; one that lives dies in `LATEST`. A reader of
generation g sees the rows with born <= g < died, so that a change shows only once the manifest says g.

The catalogue of an index as one generation sees it: SQLite with what each row is, its facts and its words.
"""

import contextlib
import json
import re
import sqlite3
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.samples import Captions
from vlm.errors import VlmError
from vlm.files import fsync_folder
from vlm.index import metadata
from vlm.index.embeddings import Origin, captions_from_json
from vlm.index.filters import Condition, matching_rows
from vlm.index.layout import REBUILD_HINT, FailPoint, no_failpoint
from vlm.tensors import Array, Int64

LATEST = 2**63 - 1
_ROWS_AT_ONCE = 10_000
_PATIENCE_SECONDS = 60.0
# the first is said of a file without our tables
_DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# changed pages up to so many KiB are kept in memory, so that readers are held up only by the commit itself
_CACHE_KIBIBYTES = 262_144
# `captions_text` keeps no copy of the text (content=''), only the words; its rowid is the row
_SCHEMA = f"""
CREATE TABLE rows (
    row INTEGER PRIMARY KEY,
    uid TEXT NOT NULL,
    key TEXT NOT NULL,
    shard INTEGER NOT NULL REFERENCES shards(id),
    number INTEGER NOT NULL,
    image_offset INTEGER NOT NULL,
    image_size INTEGER NOT NULL,
    caption_number INTEGER,
    captions TEXT NOT NULL,
    metadata TEXT NOT NULL,
    digest INTEGER NOT NULL,
    born INTEGER NOT NULL,
    died INTEGER NOT NULL DEFAULT {LATEST}
);
CREATE TABLE shards (id INTEGER PRIMARY KEY, address TEXT NOT NULL UNIQUE);
CREATE VIRTUAL TABLE captions_text USING fts5(text, content='', tokenize='unicode61 remove_diacritics 2');
{metadata.SCHEMA}
"""
# made once the rows are there: sorted in one go
_INDEXES = (
    "CREATE UNIQUE INDEX rows_uid ON rows(uid, died)",
    "CREATE INDEX rows_born ON rows(born)",
    f"CREATE INDEX rows_died ON rows(died) WHERE died < {LATEST}",
)
_INSERT = f"INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {LATEST})"
# facts in the order of their table, so that each is put behind the one before
_COPY = (
    "INSERT INTO main.shards SELECT * FROM old.shards",
    "INSERT INTO main.fields SELECT * FROM old.fields",
    "INSERT INTO main.rows SELECT row, uid, key, shard, number, image_offset, image_size, caption_number, captions,"
    f" metadata, digest, :generation, {LATEST} FROM old.rows WHERE born <= :seen AND died > :seen ORDER BY row",
    "INSERT INTO main.facts SELECT field, value, row FROM old.facts WHERE row NOT IN"
    " (SELECT row FROM old.rows WHERE born > :seen UNION ALL"
    f" SELECT row FROM old.rows WHERE died <= :seen AND died < {LATEST}) ORDER BY field, value, row",
    "INSERT INTO main.captions_text(rowid, text) SELECT row, words(captions) FROM main.rows",
)
# Chinese and Japanese are written without spaces: each of their characters counts as a word, neighbours as a phrase
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


def write_catalogue(path: Path, rows: Iterable[tuple[int, Origin]], *, generation: int = 1) -> int:
    """Write a new catalogue of rows with their numbers, born in `generation`; how many there are.

    Raises:
        VlmError: two rows have the same uid, or the disk is full.
    """
    with _new(path) as database:
        return insert_rows(database, rows, generation=generation)


def copy_catalogue(source: Path, path: Path, rows: Int64[Array, " N"], *, seen: int, generation: int) -> None:
    """Write a new catalogue of the rows that generation `seen` sees in another one, born in `generation`.

    rows: their numbers as the segments have them, rising.

    Raises:
        VlmError: the other catalogue has other rows, is damaged, or the disk is full.
    """
    with _new(path, beside=source) as database:
        database.create_function("words", 1, _words_of, deterministic=True)
        for statement in _COPY:
            database.execute(statement, {"seen": seen, "generation": generation})
        listed = [row for (row,) in database.execute("SELECT row FROM main.rows ORDER BY row")]
        if not np.array_equal(listed, rows):
            raise VlmError(f"{source} and the segments beside it have different rows; {REBUILD_HINT}.")


def update_catalogue(
    path: Path,
    *,
    generation: int,
    inserted: Iterable[tuple[int, Origin]] = (),
    deleted: Int64[Array, " N"],
    failpoint: FailPoint = no_failpoint,
) -> None:
    """Let rows die and others be born, all or none.

    Raises:
        VlmError: two living rows would have the same uid, or the disk is full; nothing has changed.
    """
    with _opened(path) as database:
        deletions = ((generation, row) for row in deleted.tolist())
        database.executemany(f"UPDATE rows SET died = ? WHERE row = ? AND died = {LATEST}", deletions)
        failpoint(f"{path.name} within its transaction")
        insert_rows(database, inserted, generation=generation)
        failpoint(f"{path.name} before its commit")


def roll_back_catalogue(path: Path, *, generation: int) -> None:
    """Take back what was committed here by a change whose manifest was never written.

    Rows born later are hidden for good (their numbers and words stay until `compact`), rows that died later live.

    Raises:
        VlmError: the file is damaged or the disk is full.
    """
    with _opened(path) as database:
        # a number of its own for each, because uid and `died` together must be unique
        database.execute("UPDATE rows SET died = -row - 1 WHERE born > ? AND died >= 0", (generation,))
        query = f"UPDATE rows SET died = {LATEST} WHERE died > ? AND died < {LATEST} AND born <= ?"
        database.execute(query, (generation, generation))


def has_uncommitted_changes(path: Path, *, generation: int) -> bool:
    """Whether there is something for `restore_catalogue` to take back."""
    inserted = "SELECT 1 FROM rows WHERE born > ?1 AND died >= 0"
    deleted = f"SELECT 1 FROM rows WHERE died > ?1 AND died < {LATEST}"
    with _opened(path) as database:
        return bool(database.execute(f"SELECT EXISTS ({inserted}) OR EXISTS ({deleted})", (generation,)).fetchone()[0])


def max_row(path: Path) -> int:
    """The highest number that a row has here, hidden ones too; -1 if there is none."""
    with _opened(path) as database:
        return database.execute("SELECT coalesce(max(row), -1) FROM rows").fetchone()[0]


@contextlib.contextmanager
def _new(path: Path, *, beside: Path | None = None) -> Iterator[sqlite3.Connection]:
    """A new catalogue in its one transaction; its indexes are made on leaving. beside: attached as `old`."""
    with _writing_errors(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        # no journal: a file that is not finished is never named by a manifest
        database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = FULL; {_SCHEMA}")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        if beside:
            database.execute("ATTACH ? AS old", (str(beside),))
        database.execute("BEGIN")
        yield database
        for index in _INDEXES:
            database.execute(index)
        database.execute("INSERT INTO captions_text(captions_text) VALUES ('optimize')")
        database.execute("COMMIT")
    fsync_folder(path.parent)


def insert_rows(database: sqlite3.Connection, rows: Iterable[tuple[int, Origin]], *, generation: int) -> int:
    """Add rows with their facts and words; how many. Nothing is committed."""
    numbered, count = iter(rows), 0
    shards: dict[str, int] = dict(database.execute("SELECT address, id FROM shards"))
    while block := list(islice(numbered, _ROWS_AT_ONCE)):
        for address in {origin.shard: None for _, origin in block}:
            if address not in shards:
                shards[address] = len(shards)
                database.execute("INSERT INTO shards VALUES (?, ?)", (shards[address], address))
        lines = [(number, *_values(origin, shards[origin.shard]), generation) for number, origin in block]
        texts = [(number, _words(origin.captions)) for number, origin in block]
        database.executemany(_INSERT, lines)
        database.executemany("INSERT INTO captions_text(rowid, text) VALUES (?, ?)", texts)
        metadata.insert_metadata_fields(database, block)
        count += len(block)
    return count


def digest_of(*values: str | int | None) -> int:
    """CRC-32 of what a row says of its origin, in the order of `Origin`'s fields."""
    return zlib.crc32("\0".join(map(str, values)).encode(errors="surrogatepass"))


def as_words(text: str) -> str:
    """The text with each Chinese or Japanese character as a word of its own."""
    return _IDEOGRAPH.sub(r" \1 ", text)


def _values(origin: Origin, shard: int) -> tuple[Any, ...]:
    place = (origin.number, origin.image_offset, origin.image_size, origin.caption_number)
    described = tuple(json.dumps(value, ensure_ascii=False) for value in (origin.captions, origin.metadata))
    digest = digest_of(origin.uid, origin.key, origin.shard, *place, *described)
    return (origin.uid, origin.key, shard, *place, *described, digest)


def _words(captions: Captions) -> str:
    return "\n".join(as_words(text) for texts in captions.values() for text in texts)


def _words_of(captions: str) -> str:
    return _words(captions_from_json(captions))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A catalogue inside a transaction that is committed on leaving, or rolled back."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with (
        _writing_errors(path),
        contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_PATIENCE_SECONDS)) as database,
    ):
        database.execute("PRAGMA synchronous = FULL")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def _writing_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise VlmError(f"Two embeddings have the same uid ({error}); embed again with distinct keys.") from error
    except sqlite3.Error as error:
        if not path.is_file() or error.sqlite_errorcode & 0xFF in _DAMAGED:
            raise VlmError(f"{path} is missing or damaged ({error}); {REBUILD_HINT}.") from error
        raise VlmError(
            f"{path} cannot be written: {error}; if the disk is full, make room on it and try again."
        ) from error


# a writer holds the file alone only while it commits

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
            raise VlmError(f"{self.path} has no row {missing:,}, which a segment has; {REBUILD_HINT}.")
        return [by_row[row] for row in rows]

    def find(self, uid: str) -> Entry | None:
        """The entry of this uid, if there is one."""
        return next(iter(self._select("WHERE uid = ? AND born <= ? AND died > ?", uid, *self._visible_at)), None)

    def rows_by_uid(self, uids: Iterable[str]) -> dict[str, int]:
        """The row of each uid that there is."""
        names, found = list(uids), {}
        query = "SELECT uid, row FROM rows WHERE uid IN (SELECT value FROM json_each(?)) AND born <= ? AND died > ?"
        with self._reading() as database:
            for first in range(0, len(names), _NAMES_AT_ONCE):
                block = json.dumps(names[first : first + _NAMES_AT_ONCE])
                found |= dict(database.execute(query, (block, *self._visible_at)).fetchall())
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
            return np.setdiff1d(matching_rows(database, condition), self._hidden(database), assume_unique=True)

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
                (" ".join(phrases), *self._visible_at, top),
            ).fetchall()
        return self.entries([row for (row,) in found])

    def metadata_fields(self, rows: Sequence[int]) -> dict[int, set[tuple[str, int | float | str]]]:
        """The field and value of each fact of the given rows; reads the whole table of metadata."""
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
    def _visible_at(self) -> tuple[int, int]:
        return self.generation, self.generation

    def _hidden(self, database: sqlite3.Connection) -> Int64[Array, " N"]:
        """The rows there are that this generation does not see."""
        # the second condition is the one of the partial index on `died`
        query = f"SELECT row FROM rows WHERE born > ? UNION SELECT row FROM rows WHERE died <= ? AND died < {LATEST}"
        return np.array([row for (row,) in database.execute(query, self._visible_at)], np.int64)

    def _select(self, condition: str, *values: str | int) -> list[Entry]:
        with self._reading() as database:
            return [_entry(row) for row in database.execute(_SELECT + condition, values)]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _reading(self.path):
            yield self._file.database


class _File:
    """A connection, shared by the generations that are read through it, and closed with the last of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path):
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
            raise VlmError(
                f"{path} is damaged: {path.stat().st_size:,} of {pages * page_bytes:,} bytes; {REBUILD_HINT}."
            )

    def is_current(self) -> bool:
        return self.path.exists() and _identity(self.path) == self._identity


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise VlmError(f"{path} cannot be read ({error}); {REBUILD_HINT}.") from error


def _entry(row: sqlite3.Row) -> Entry:
    values = dict(row)
    del values["digest"]
    values["captions"] = captions_from_json(values["captions"])
    values["metadata"] = json.loads(values["metadata"])
    return Entry(**values)
