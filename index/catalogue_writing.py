"""How a catalogue is written: whole by a build, in one transaction by each change, and brought back after a crash.

A row has the generations in which it was born and in which it died; one that lives dies in `LATEST`. A reader of
generation g sees the rows with born <= g < died, so that a change shows only once the manifest says g.
"""

import contextlib
import json
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.samples import Captions
from vlm.errors import VlmError
from vlm.files import sync_folder
from vlm.index import facts
from vlm.index.layout import CURE, WritePoint, unhindered
from vlm.index.parts import Origin, captions_from_json
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
{facts.SCHEMA}
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
            raise VlmError(f"{source} and the segments beside it have different rows; {CURE}.")


def change_catalogue(
    path: Path,
    *,
    generation: int,
    born: Iterable[tuple[int, Origin]] = (),
    died: Int64[Array, " N"],
    reached: WritePoint = unhindered,
) -> None:
    """Let rows die and others be born, all or none.

    Raises:
        VlmError: two living rows would have the same uid, or the disk is full; nothing has changed.
    """
    with _opened(path) as database:
        dying = ((generation, row) for row in died.tolist())
        database.executemany(f"UPDATE rows SET died = ? WHERE row = ? AND died = {LATEST}", dying)
        reached(f"{path.name} within its transaction")
        insert_rows(database, born, generation=generation)
        reached(f"{path.name} before its commit")


def restore_catalogue(path: Path, *, generation: int) -> None:
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


def is_ahead(path: Path, *, generation: int) -> bool:
    """Whether there is something for `restore_catalogue` to take back."""
    born = "SELECT 1 FROM rows WHERE born > ?1 AND died >= 0"
    died = f"SELECT 1 FROM rows WHERE died > ?1 AND died < {LATEST}"
    with _opened(path) as database:
        return bool(database.execute(f"SELECT EXISTS ({born}) OR EXISTS ({died})", (generation,)).fetchone()[0])


def last_row(path: Path) -> int:
    """The highest number that a row has here, hidden ones too; -1 if there is none."""
    with _opened(path) as database:
        return database.execute("SELECT coalesce(max(row), -1) FROM rows").fetchone()[0]


@contextlib.contextmanager
def _new(path: Path, *, beside: Path | None = None) -> Iterator[sqlite3.Connection]:
    """A new catalogue in its one transaction; its indexes are made on leaving. beside: attached as `old`."""
    with _explaining(path), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
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
    sync_folder(path.parent)


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
        facts.insert_facts(database, block)
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
        _explaining(path),
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
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise VlmError(f"Two embeddings have the same uid ({error}); embed again with distinct keys.") from error
    except sqlite3.Error as error:
        if not path.is_file() or error.sqlite_errorcode & 0xFF in _DAMAGED:
            raise VlmError(f"{path} is missing or damaged ({error}); {CURE}.") from error
        raise VlmError(
            f"{path} cannot be written: {error}; if the disk is full, make room on it and try again."
        ) from error
