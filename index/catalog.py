"""The catalogue of an index: SQLite with the origin of each row, its metadata fields and the words of its captions.

A row has the version that inserted it (`born`) and the one that deleted it (`died`, `LATEST` while it is live). A
reader of version g sees the rows with born <= g < died, so a change shows only once the manifest says g. A build writes
the catalogue whole, each change in one transaction; after a crash, rows that no manifest knows are hidden again.

Captions are searched so that lodz finds Łódź, strasse straße, and 狗 finds 小狗: SQLite's tokenizer ignores case, and
accents that Unicode writes as marks. Letters such as ł, ø and ß are letters of their own to it; they are spelled out
here (anyascii), as are compatibility forms (full-width, ligatures). In scripts that are written without spaces, or that
attach particles to a word (Hangul), each character counts as a word, and the characters of a search word as a phrase.
"""

import contextlib
import json
import os
import re
import shutil
import sqlite3
import threading
import unicodedata
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from anyascii import anyascii
from pyroaring import BitMap

from vlm.data.samples import Captions
from vlm.errors import VlmError
from vlm.files import fsync_folder
from vlm.index.embeddings_folder import Origin, captions_from_json
from vlm.index.engine_base import EngineCatalogue, Entry, RowSelection, row_set
from vlm.index.facets import FieldSummary, ValueCount, count_values, summarize_fields
from vlm.index.filter_language import Condition, matching_rows
from vlm.index.index_files import REBUILD_HINT, FailPoint, no_failpoint
from vlm.index.metadata import SCHEMA as METADATA_SCHEMA
from vlm.index.metadata import field_types, insert_metadata_fields, sanitize_text
from vlm.index.row_bitmaps import (
    bitmap_faults,
    bitmaps_claimed,
    fetch_bitmap,
    has_bitmaps,
    row_ids,
    update_bitmaps,
    write_bitmaps,
)
from vlm.tensor_types import Array, Int64

WORDS_VERSION = 1
"""Kept in the catalogue as SQLite's user_version. In one of version 0 only `split_ideographs` was applied."""

# with 々 and 〇, which count as letters of Chinese and Japanese, and ー, which lengthens a vowel
_UNSPACED = re.compile(
    r"([\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    r"\u1100-\u11ff\uac00-\ud7af"  # Hangul
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"  # Thai, Lao, Burmese, Khmer
)
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


class _Spelling(dict[int, str]):
    """For `str.translate`: Latin letters in ASCII, all else as it is; each character is looked up once."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        is_latin = code > 127 and unicodedata.name(character, "").startswith("LATIN ")
        self[code] = anyascii(character) if is_latin else character
        return self[code]


_SPELLING = _Spelling()


def fold(text: str) -> str:
    """The text as it is indexed and searched.

    >>> fold("Łódź, Straße"), fold("小狗"), fold("ﬁsh in ＡＢＣ")
    ('Lodz, Strasse', ' 小  狗 ', 'fish in ABC')
    """
    if text.isascii():
        return text
    folded = unicodedata.normalize("NFKC", text).translate(_SPELLING)
    return folded if folded.isascii() else _UNSPACED.sub(r" \1 ", folded)


def split_ideographs(text: str) -> str:
    """The text with each Chinese or Japanese character as a word, as catalogues of version 0 have it."""
    return _IDEOGRAPH.sub(r" \1 ", text)


LATEST = 2**63 - 1
_ROWS_AT_ONCE = 10_000
# a writer holds the file alone only while it commits
_LOCK_TIMEOUT_SECONDS = 60.0
# the first is raised for a file without our tables
_DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# changed pages of up to this size stay in memory, so that readers wait only for the commit itself
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
{METADATA_SCHEMA}
"""
# made after the rows: one sort is faster than ordered inserts
_INDEXES = (
    "CREATE UNIQUE INDEX rows_uid ON rows(uid, died)",
    "CREATE INDEX rows_born ON rows(born)",
    f"CREATE INDEX rows_died ON rows(died) WHERE died < {LATEST}",
)
_INSERT = f"INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {LATEST})"
# metadata in the order of its table, so that each row is appended to the one before
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
# in two terms, since all rows are counted in an index of few bytes a row, and the hidden ones are few
_COUNT = (
    "SELECT (SELECT count(*) FROM rows) - (SELECT count(*) FROM rows WHERE born > ?1)"
    f" - (SELECT count(*) FROM rows WHERE died <= ?1 AND died < {LATEST} AND born <= ?1)"
)
_SET_WORDS_VERSION = f"PRAGMA user_version = {WORDS_VERSION}"


def write_catalogue(path: Path, rows: Iterable[tuple[int, Origin]], *, generation: int = 1) -> int:
    """Write a new catalogue of numbered rows, inserted by version `generation`; how many there are.

    Raises:
        VlmError: two rows have the same uid, or the disk is full.
    """
    with _new(path, generation) as database:
        return insert_rows(database, rows, generation=generation)


def copy_catalogue(source: Path, path: Path, rows: Int64[Array, " N"], *, seen: int, generation: int) -> None:
    """Write a new catalogue of the rows that version `seen` has in another one, inserted by version `generation`.

    rows: their numbers as the segments have them, ascending.

    Raises:
        VlmError: the other catalogue has other rows, is damaged, or the disk is full.
    """
    with _new(path, generation, old_catalogue=source) as database:
        database.create_function("words", 1, _words_of, deterministic=True)
        for statement in _COPY:
            database.execute(statement, {"seen": seen, "generation": generation})
        # a compaction is the moment at which a mismatch would otherwise be made permanent
        listed = _first_column(database.execute("SELECT row FROM main.rows ORDER BY row"))
        if not np.array_equal(listed, rows):
            raise VlmError(f"{source} and its segments have different rows; {REBUILD_HINT}.")


def update_catalogue(
    path: Path,
    *,
    generation: int,
    inserted: Iterable[tuple[int, Origin]] = (),
    deleted: Int64[Array, " N"],
    failpoint: FailPoint = no_failpoint,
) -> None:
    """Delete rows and insert others, all or none.

    Raises:
        VlmError: two live rows would have the same uid, or the disk is full; nothing has changed.
    """
    with _opened(path) as database, bitmaps_claimed(database, path.name, path.name):
        deletions = ((generation, row) for row in deleted.tolist())
        database.executemany(f"UPDATE rows SET died = ? WHERE row = ? AND died = {LATEST}", deletions)
        failpoint(f"{path.name} within its transaction")
        insert_rows(database, inserted, generation=generation)
        _record_count(database, generation)
        failpoint(f"{path.name} before its commit")


@contextlib.contextmanager
def edited_copy(source: Path, path: Path, *, generation: int) -> Iterator[sqlite3.Connection]:
    """A copy of a catalogue under another name, in a transaction that ends with the block.

    generation: of the version that it is for.

    Raises:
        VlmError: it is damaged, or the disk is full.
    """
    shutil.copyfile(source, path)
    with _opened(path) as database, bitmaps_claimed(database, source.name, path.name):
        yield database
        _record_count(database, generation)
    # the copied pages too, which SQLite did not write
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    fsync_folder(path.parent)


def _record_count(database: sqlite3.Connection, generation: int) -> None:
    """Keep the number of rows of a version: to count them takes the longest of what opening an index takes."""
    database.execute("CREATE TABLE IF NOT EXISTS counts (generation INTEGER PRIMARY KEY, rows INTEGER NOT NULL)")
    database.execute("DELETE FROM counts WHERE generation < ?", (generation - 1,))
    database.execute(f"INSERT OR REPLACE INTO counts SELECT ?1, ({_COUNT})", (generation,))


def roll_back_catalogue(path: Path, *, generation: int) -> None:
    """Undo a change that was committed here but whose manifest was never written.

    Rows that it inserted are hidden for good (their numbers and words stay until `compact`), rows that it deleted are
    live again.

    Raises:
        VlmError: the file is damaged or the disk is full.
    """
    with _opened(path) as database:
        restore_rows(database, generation=generation)


def restore_rows(database: sqlite3.Connection, *, generation: int) -> None:
    """Hide the rows that later versions inserted, and show those that they deleted; nothing is committed."""
    # a negative number, which no version reaches, and a different one for each: (uid, died) is unique
    database.execute("UPDATE rows SET died = -row - 1 WHERE born > ? AND died >= 0", (generation,))
    query = f"UPDATE rows SET died = {LATEST} WHERE died > ? AND died < {LATEST} AND born <= ?"
    database.execute(query, (generation, generation))


def has_uncommitted_changes(path: Path, *, generation: int) -> bool:
    """Whether there is something for `roll_back_catalogue` to undo."""
    inserted = "SELECT 1 FROM rows WHERE born > ?1 AND died >= 0"
    deleted = f"SELECT 1 FROM rows WHERE died > ?1 AND died < {LATEST}"
    with _opened(path) as database:
        return bool(database.execute(f"SELECT EXISTS ({inserted}) OR EXISTS ({deleted})", (generation,)).fetchone()[0])


def max_row(path: Path) -> int:
    """The highest row number, hidden rows included; -1 if there is none."""
    with _opened(path) as database:
        return database.execute("SELECT coalesce(max(row), -1) FROM rows").fetchone()[0]


@contextlib.contextmanager
def _new(path: Path, generation: int, *, old_catalogue: Path | None = None) -> Iterator[sqlite3.Connection]:
    """A new catalogue in its only transaction; its indexes are made on leaving. old_catalogue: attached as `old`."""
    with (
        _sqlite_errors_as_ours(path, is_writing=True),
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database,
    ):
        # no journal: a file that is not finished is never named by a manifest
        database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = FULL; {_SCHEMA}; {_SET_WORDS_VERSION}")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        if old_catalogue:
            database.execute("ATTACH ? AS old", (str(old_catalogue),))
        database.execute("BEGIN")
        yield database
        for index in _INDEXES:
            database.execute(index)
        write_bitmaps(database, path.name)
        _record_count(database, generation)
        # merges the pieces of the full-text index into one, which is faster to search
        database.execute("INSERT INTO captions_text(captions_text) VALUES ('optimize')")
        database.execute("COMMIT")
    fsync_folder(path.parent)


def insert_rows(database: sqlite3.Connection, rows: Iterable[tuple[int, Origin]], *, generation: int) -> int:
    """Insert rows with their metadata fields and words; how many. Nothing is committed."""
    remaining = iter(rows)
    count = 0
    folding = _folding(database)
    shards: dict[str, int] = dict(database.execute("SELECT address, id FROM shards"))
    while block := list(islice(remaining, _ROWS_AT_ONCE)):
        lines: list[tuple[Any, ...]] = []
        texts: list[tuple[int, str]] = []
        for number, origin in block:
            if origin.shard not in shards:
                shards[origin.shard] = len(shards)
                database.execute("INSERT INTO shards VALUES (?, ?)", (shards[origin.shard], origin.shard))
            lines.append((number, *_values(origin, shards[origin.shard]), generation))
            texts.append((number, _words(origin.captions, folding)))
        database.executemany(_INSERT, lines)
        database.executemany("INSERT INTO captions_text(rowid, text) VALUES (?, ?)", texts)
        update_bitmaps(database, insert_metadata_fields(database, block))
        count += len(block)
    return count


def crc32_of(*values: str | int | None) -> int:
    """Checksum of a row's origin, given in the order of `Origin`'s fields: it finds damage, and is no identity."""
    return zlib.crc32("\0".join(map(str, values)).encode(errors="surrogatepass"))


def digest_of(origin: Origin) -> int:
    """The checksum of a row's origin, as the catalogue stores it."""
    return _values(origin, 0)[-1]


# `json.dumps` makes an encoder for every call with an option
_to_json = json.JSONEncoder(ensure_ascii=False).encode


def _values(origin: Origin, shard: int) -> tuple[Any, ...]:
    """The columns of a row from uid to digest. shard: the id of its shard."""
    location = (origin.number, origin.image_offset, origin.image_size, origin.caption_number)
    captions = _to_json(origin.captions)
    metadata_json = _to_json(origin.metadata)
    digest = crc32_of(origin.uid, origin.key, origin.shard, *location, captions, metadata_json)
    return (origin.uid, origin.key, shard, *location, captions, metadata_json, digest)


def _folding(database: sqlite3.Connection) -> Callable[[str], str]:
    """How this catalogue has its words: one that was written before words were folded stays as it was."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return fold if version >= WORDS_VERSION else split_ideographs


def _words(captions: Captions, folding: Callable[[str], str]) -> str:
    lines: list[str] = []
    for texts in captions.values():
        lines += map(folding, texts)
    return "\n".join(lines)


def _words_of(captions: str) -> str:
    return _words(captions_from_json(captions), fold)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A catalogue inside a transaction that is committed on leaving, or rolled back."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with (
        _sqlite_errors_as_ours(path, is_writing=True),
        contextlib.closing(
            sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_LOCK_TIMEOUT_SECONDS)
        ) as database,
    ):
        database.execute("PRAGMA synchronous = FULL")
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIBIBYTES}")
        # the write lock at once, so that a lock held elsewhere is met before any work
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def _sqlite_errors_as_ours(path: Path, *, is_writing: bool) -> Iterator[None]:
    """Raise SQLite's errors as VlmError with their cure."""
    try:
        yield
    except sqlite3.Error as error:
        if not is_writing:
            raise VlmError(f"{path} cannot be read ({error}); {REBUILD_HINT}.") from error
        if isinstance(error, sqlite3.IntegrityError):
            raise VlmError(f"Two embeddings have the same uid ({error}); embed again with distinct keys.") from error
        if not path.is_file() or error.sqlite_errorcode & 0xFF in _DAMAGED:
            raise VlmError(f"{path} is missing or damaged ({error}); {REBUILD_HINT}.") from error
        raise VlmError(
            f"{path} cannot be written: {error}; if the disk is full, make room on it and try again."
        ) from error


_NAMES_AT_ONCE = 10_000
_SELECT = """
SELECT row, uid, key, address AS shard, number, image_offset, image_size, caption_number, captions, metadata, digest
FROM rows JOIN shards ON shards.id = rows.shard
"""


class Catalogue(EngineCatalogue):
    """An open catalogue, for reading only; several threads may use it.

    generation: the version whose rows it shows; later changes are not seen.
    """

    def __init__(self, path: Path, generation: int = LATEST - 1) -> None:
        self.path = path
        self.generation = generation
        self._file = _File(path)

    def at(self, generation: int) -> "Catalogue":
        """The same open file as another version sees it."""
        other = object.__new__(Catalogue)
        other.path = self.path
        other.generation = generation
        other._file = self._file
        return other

    def is_current(self) -> bool:
        """Whether the open file still has this name."""
        return self._file.is_current()

    def close(self) -> None:
        """Close the file for every version that shares it; otherwise it is closed with the last of them."""
        self._file.database.close()

    def __len__(self) -> int:
        # one statement, because a writer may commit between two
        with self._reading() as database:
            return database.execute(_COUNT, (self.generation,)).fetchone()[0]

    def recorded_count(self) -> int | None:
        """The number of rows that the change which made this version recorded; None: an older program made it."""
        with self._reading() as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'counts'").fetchone():
                return None
            found = database.execute("SELECT rows FROM counts WHERE generation = ?", (self.generation,)).fetchone()
            return found[0] if found else None

    def count_hidden(self) -> int:
        """Number of rows in the file that this version does not see."""
        with self._reading() as database:
            return len(self._hidden(database))

    def entries(self, rows: Sequence[int]) -> list[Entry]:
        """The entries of the given rows, in their order, live or deleted.

        Raises:
            VlmError: one is missing.
        """
        # one JSON text, because SQLite limits the number of parameters
        selected = self._select("WHERE row IN (SELECT value FROM json_each(?))", json.dumps(sorted(set(rows))))
        by_row = {entry.row: entry for entry in selected}
        entries = []
        for row in rows:
            if row not in by_row:
                raise VlmError(f"{self.path} has no row {row:,}, which a segment has; {REBUILD_HINT}.")
            entries.append(by_row[row])
        return entries

    def find(self, uid: str) -> Entry | None:
        """The entry of this uid, if there is one."""
        return next(iter(self._select("WHERE uid = ? AND born <= ? AND died > ?", uid, *self._visible_at)), None)

    def rows_by_uid(self, uids: Iterable[str]) -> dict[str, int]:
        """The row of each of these uids that exists."""
        names = list(uids)
        rows: dict[str, int] = {}
        query = "SELECT uid, row FROM rows WHERE uid IN (SELECT value FROM json_each(?)) AND born <= ? AND died > ?"
        with self._reading() as database:
            for first in range(0, len(names), _NAMES_AT_ONCE):
                block = json.dumps(names[first : first + _NAMES_AT_ONCE])
                rows |= dict(database.execute(query, (block, *self._visible_at)).fetchall())
        return rows

    def rows(self) -> Int64[Array, " N"]:
        """All row numbers, ascending."""
        with self._reading() as database:
            return row_ids(fetch_bitmap(database, "SELECT row FROM rows") - self._hidden(database))

    def where(self, condition: Condition, *, optional_fields: Collection[str] = ()) -> BitMap:
        """The rows that a condition selects.

        optional_fields: may be named although no row has them, and then match none.

        Raises:
            UsageError: it names another field that no row has, or compares numbers with texts.
        """
        with self._reading() as database:
            agree = has_bitmaps(database, self.path.name)
            rows = matching_rows(database, condition, optional_fields=optional_fields, use_bitmaps=agree)
            return rows - self._hidden(database)

    def distinct_values(self, field: str, limit: int) -> list[int | float | str]:
        """The first values of a field in their order, numbers before texts, those of deleted rows among them."""
        # from each value to the next by the primary key, instead of reading the field's value in every row; the field
        # as a plain number, because SQLite looks up a minimum in an index only without a join
        query = (
            "WITH RECURSIVE found(value) AS (SELECT min(value) FROM facts WHERE field = ?1 UNION ALL"
            " SELECT (SELECT min(value) FROM facts WHERE field = ?1 AND value > found.value)"
            " FROM found WHERE found.value IS NOT NULL"
            ") SELECT value FROM found WHERE value IS NOT NULL LIMIT ?2"
        )
        with self._reading() as database:
            number = _field_id(database, field)
            return list(map(itemgetter(0), database.execute(query, (number, limit))))

    def values_like(self, field: str, text: str, limit: int) -> list[str]:
        """The texts of a field that differ from this one at most in the case of A to Z; reads the whole field."""
        # wildcards of LIKE; the backslash comes first, or those put before the others would be doubled
        escaped = text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        query = "SELECT DISTINCT value FROM facts WHERE field = ? AND value LIKE ? ESCAPE '\\' LIMIT ?"
        with self._reading() as database:
            found = database.execute(query, (_field_id(database, field), escaped, limit))
            return [value for (value,) in found if isinstance(value, str)]

    def field_names(self) -> list[str]:
        """The metadata fields that have values, by name, those of deleted rows among them."""
        with self._reading() as database:
            return list(field_types(database))

    def field_values(self, field: str) -> list[tuple[int | float | str, int]]:
        """Each value of a field with its row."""
        query = "SELECT value, row FROM facts WHERE field = ?"
        with self._reading() as database:
            hidden = self._hidden(database)
            found = database.execute(query, (_field_id(database, field),))
            return [(value, row) for value, row in found if row not in hidden]

    def addresses(self) -> list[str]:
        """The address of each shard and image file, those of deleted rows among them."""
        with self._reading() as database:
            return list(map(itemgetter(0), database.execute("SELECT address FROM shards")))

    def image_ends(self) -> dict[str, int]:
        """By the address of each shard or image file the byte at which its last image ends, 0 without images."""
        query = (
            "SELECT address, max(image_offset + image_size) FROM rows JOIN shards ON shards.id = rows.shard"
            " WHERE born <= ? AND died > ? GROUP BY address ORDER BY min(row)"
        )
        with self._reading() as database:
            return dict(database.execute(query, self._visible_at).fetchall())

    def sample_numbers(self, address: str) -> list[int]:
        """The positions in a shard of the samples that have a row."""
        query = (
            "SELECT number FROM rows WHERE shard = (SELECT id FROM shards WHERE address = ?) AND born <= ? AND died > ?"
        )
        with self._reading() as database:
            return _first_column(database.execute(query, (address, *self._visible_at)))

    def search_text(self, words: str, top: int) -> list[Entry]:
        """The entries whose captions contain all the words, best first (BM25; ties by row).

        Case, accents and spelling variants of Latin letters are ignored (`vlm.index.catalog`); nothing in `words`
        is an operator.
        """
        return self.entries(list(map(itemgetter(0), self.rank_text(words, top))))

    def rank_text(self, words: str, top: int) -> list[tuple[int, float]]:
        """As `search_text`, but the rows, each with its BM25 score as SQLite has it: the lowest is the best."""
        with self._reading() as database:
            folding = _folding(database)
            # in quotes, a word is a phrase to FTS5 and never an operator; folded first, for a full-width quote folds
            phrases: list[str] = []
            for word in sanitize_text(words).replace('"', " ").split():
                folded = folding(word).replace('"', " ")
                phrases.append(f'"{folded}"')
            if not phrases:
                return []
            cursor = database.execute(
                "SELECT row, rank FROM captions_text JOIN rows ON row = captions_text.rowid WHERE captions_text MATCH ?"
                " AND born <= ? AND died > ? ORDER BY rank, row LIMIT ?",
                (" ".join(phrases), *self._visible_at, top),
            )
            return [(row, score) for row, score in cursor]

    def field_summaries(self) -> list[FieldSummary]:
        """The columns of the metadata, by name."""
        with self._reading() as database:
            return summarize_fields(database)

    def count_values(self, field: str, *, top: int, rows: RowSelection | None = None) -> list[ValueCount]:
        """The `top` most frequent values of a column among the given rows, or among all of this version."""
        selected = None if rows is None else row_set(rows)
        with self._reading() as database:
            agree = has_bitmaps(database, self.path.name)
            hidden = self._hidden(database)
            return count_values(database, field, top=top, rows=selected, hidden=hidden, use_bitmaps=agree)

    def metadata_fields(self, rows: Sequence[int]) -> dict[int, set[tuple[str, int | float | str]]]:
        """The metadata fields and values of each given row; reads the whole table of metadata."""
        fields: dict[int, set[tuple[str, int | float | str]]] = {row: set() for row in rows}
        sql = "SELECT row, name, value FROM facts, fields WHERE id = field AND row IN (SELECT value FROM json_each(?))"
        with self._reading() as database:
            for row, name, value in database.execute(sql, (json.dumps(list(rows)),)):
                fields[row].add((name, value))
        return fields

    def faults(self) -> Iterator[str]:
        """What differs from what was written: SQLite's own check, then each row against its checksum."""
        query = f"{_SELECT} WHERE row > ? ORDER BY row LIMIT {_NAMES_AT_ONCE}"
        last_row = -1
        with self._reading() as database:
            for (message,) in database.execute("PRAGMA integrity_check").fetchall():
                if message != "ok":
                    yield f"{self.path.name}: {message}"
            # block by block, so that a writer may commit in between
            while block := database.execute(query, (last_row,)).fetchall():
                last_row = block[-1]["row"]
                for values in map(dict, block):
                    if values.pop("digest") != crc32_of(*list(values.values())[1:]):
                        yield f"{self.path.name}: row {values['row']:,} ({values['uid']}) differs from what was written"

    def bitmap_faults(self) -> Iterator[str]:
        """Where the bitmaps of rows that filters read differ from the facts."""
        with self._reading() as database:
            if has_bitmaps(database, self.path.name):
                yield from bitmap_faults(database)

    @property
    def _visible_at(self) -> tuple[int, int]:
        return self.generation, self.generation

    def _hidden(self, database: sqlite3.Connection) -> BitMap:
        """The rows in the file that this version does not see."""
        # `died < LATEST` makes SQLite use the partial index
        query = (
            f"SELECT row FROM rows WHERE born > ? UNION ALL SELECT row FROM rows WHERE died <= ? AND died < {LATEST}"
        )
        return fetch_bitmap(database, query, *self._visible_at)

    def _select(self, condition: str, *values: str | int) -> list[Entry]:
        with self._reading() as database:
            return read_entries(database, condition, *values)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with _sqlite_errors_as_ours(self.path, is_writing=False), self._file.lock:
            yield self._file.database


class _File:
    """A connection, shared by the versions that are read through it, and closed with the last of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # a Python function in SQL waits for Python's lock, which a thread may hold that waits for SQLite's own
        self.lock = threading.RLock()
        with _sqlite_errors_as_ours(path, is_writing=False):
            # not mode=ro: SQLite must roll back what a killed writer left half done before anything can be read
            uri = f"{path.absolute().as_uri()}?mode=rw"
            self.database = sqlite3.connect(
                uri, uri=True, check_same_thread=False, timeout=_LOCK_TIMEOUT_SECONDS, isolation_level=None
            )
            weakref.finalize(self, self.database.close)
            self.database.row_factory = sqlite3.Row
            self.database.execute("PRAGMA query_only = ON")
            (pages,) = self.database.execute("PRAGMA page_count").fetchone()
            (page_bytes,) = self.database.execute("PRAGMA page_size").fetchone()
            self._identity = _identity(path)
        # SQLite itself notices a truncated file only when it reads the missing pages
        size = path.stat().st_size
        if size < pages * page_bytes:
            raise VlmError(f"{path} is damaged: {size:,} of {pages * page_bytes:,} bytes; {REBUILD_HINT}.")

    def is_current(self) -> bool:
        return self.path.exists() and _identity(self.path) == self._identity


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _field_id(database: sqlite3.Connection, name: str) -> int:
    """The number of a metadata field; -1, which none has, for one that is not known."""
    row = database.execute("SELECT id FROM fields WHERE name = ?", (name,)).fetchone()
    return row[0] if row else -1


def _first_column(cursor: sqlite3.Cursor) -> list[int]:
    return list(map(itemgetter(0), cursor))


def read_entries(database: sqlite3.Connection, condition: str, *values: str | int) -> list[Entry]:
    """The entries that a WHERE clause of SQL selects."""
    cursor = database.cursor()
    cursor.row_factory = sqlite3.Row
    rows = cursor.execute(_SELECT + condition, values).fetchall()
    # parsed as one text: for the few bytes of a row the call of the parser takes longer than its work
    captions = json.loads(f"[{','.join([row['captions'] for row in rows])}]")
    metadata = json.loads(f"[{','.join([row['metadata'] for row in rows])}]")
    entries: list[Entry] = []
    for row, row_captions, row_metadata in zip(rows, captions, metadata, strict=True):
        columns = dict(row)
        del columns["digest"]
        columns["captions"] = {language: tuple(texts) for language, texts in row_captions.items()}
        columns["metadata"] = row_metadata
        entries.append(Entry(**columns))
    return entries
