"""The catalogue of an index: SQLite with what each row is, and full-text search over its captions."""

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.errors import VlmError
from vlm.index.parts import Origin, captions_from_json, to_json

_ROWS_AT_ONCE = 10_000
# `captions_text` keeps no copy of the text (content=''), only the words; its rowid is the row
_SCHEMA = """
CREATE TABLE rows (
    row INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,
    key TEXT NOT NULL,
    shard INTEGER NOT NULL REFERENCES shards(id),
    number INTEGER NOT NULL,
    image_offset INTEGER NOT NULL,
    image_size INTEGER NOT NULL,
    caption_number INTEGER,
    captions TEXT NOT NULL,
    metadata TEXT NOT NULL
);
CREATE TABLE shards (id INTEGER PRIMARY KEY, address TEXT NOT NULL UNIQUE);
CREATE VIRTUAL TABLE captions_text USING fts5(text, content='', tokenize='unicode61 remove_diacritics 2');
"""
_SELECT = """
SELECT row, uid, key, address AS shard, number, image_offset, image_size, caption_number, captions, metadata
FROM rows JOIN shards ON shards.id = rows.shard
"""
# Chinese and Japanese are written without spaces: each of their characters counts as a word, neighbours as a phrase
_IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")


@dataclass(frozen=True, kw_only=True)
class Entry(Origin):
    """One row of an index: its number in the segments, and what it was made from."""

    row: int


def write_catalogue(path: Path, origins: Iterable[Origin]) -> int:
    """Write a new catalogue whose row n is the n-th origin; the number of rows.

    Raises:
        VlmError: two origins have the same uid, or the disk is full.
    """
    numbered, count = enumerate(origins), 0
    shards: dict[str, int] = {}
    try:
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = FULL; {_SCHEMA}")
            while block := list(islice(numbered, _ROWS_AT_ONCE)):
                _insert(database, block, shards)
                count += len(block)
            database.executemany("INSERT INTO shards VALUES (?, ?)", [(id_, name) for name, id_ in shards.items()])
            database.execute("INSERT INTO captions_text(captions_text) VALUES ('optimize')")
            database.commit()
    except sqlite3.IntegrityError as error:
        raise VlmError(f"Two embeddings have the same uid ({error}); embed again with distinct keys.") from error
    except sqlite3.Error as error:
        raise VlmError(f"{path} cannot be written: {error}; make room on the disk and try again.") from error
    return count


class Catalogue:
    """An open catalogue, read only; may be used from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading():
            self._database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
            self._database.row_factory = sqlite3.Row

    def close(self) -> None:
        """Release the file."""
        self._database.close()

    def __len__(self) -> int:
        with self._reading():
            return self._database.execute("SELECT count(*) FROM rows").fetchone()[0]

    def entries(self, rows: Sequence[int]) -> list[Entry]:
        """The entries of the given row numbers, in their order; all must exist."""
        found = self._select("WHERE row IN (SELECT value FROM json_each(?))", json.dumps(list(rows)))
        by_row = {entry.row: entry for entry in found}
        return [by_row[row] for row in rows]

    def find(self, uid: str) -> Entry | None:
        """The entry of this uid, if there is one."""
        return next(iter(self._select("WHERE uid = ?", uid)), None)

    def search_text(self, words: str, top: int) -> list[Entry]:
        """The entries whose captions hold all the words, best first (BM25; ties by row).

        Case and accents do not matter; nothing in `words` is an operator.
        """
        phrases = [f'"{_spaced(word)}"' for word in words.replace('"', " ").split()]
        if not phrases:
            return []
        with self._reading():
            found = self._database.execute(
                "SELECT rowid FROM captions_text WHERE captions_text MATCH ? ORDER BY rank, rowid LIMIT ?",
                (" ".join(phrases), top),
            ).fetchall()
        return self.entries([row[0] for row in found])

    def _select(self, condition: str, *values: str | int) -> list[Entry]:
        with self._reading():
            return [_entry(row) for row in self._database.execute(_SELECT + condition, values)]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise VlmError(f"{self.path} cannot be read ({error}); build the index again.") from error


def _insert(database: sqlite3.Connection, block: list[tuple[int, Origin]], shards: dict[str, int]) -> None:
    rows: list[tuple[Any, ...]] = []
    for number, origin in block:
        shard = shards.setdefault(origin.shard, len(shards))
        place = (origin.number, origin.image_offset, origin.image_size, origin.caption_number)
        rows.append((number, origin.uid, origin.key, shard, *place, to_json(origin.captions), to_json(origin.metadata)))
    texts = [(number, "\n".join(map(_spaced, _texts(origin)))) for number, origin in block]
    database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    database.executemany("INSERT INTO captions_text(rowid, text) VALUES (?, ?)", texts)


def _texts(origin: Origin) -> Iterator[str]:
    for captions in origin.captions.values():
        yield from captions


def _spaced(text: str) -> str:
    return _IDEOGRAPH.sub(r" \1 ", text)


def _entry(row: sqlite3.Row) -> Entry:
    values = dict(row)
    values["captions"] = captions_from_json(values["captions"])
    values["metadata"] = json.loads(values["metadata"])
    return Entry(**values)
