"""Edits of a catalogue's copy that leave rows and vectors as they are: metadata of rows, and addresses of shards."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from typing import Any

from vlm.index.catalog import LATEST, Entry, digest_of, read_entries
from vlm.index.metadata import insert_field_values, metadata_fields

# entries that are in memory at once: a change may be of every row
_ROWS_AT_ONCE = 10_000


def metadata_edits(entries: Iterable[Entry], changes: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Those of the changes of metadata that give their row, one of these entries, other metadata than it has."""
    edits: dict[int, Mapping[str, Any]] = {}
    for entry in entries:
        values = changes[entry.row]
        if _differ(entry.metadata, edited_metadata(entry.metadata, values)):
            edits[entry.row] = values
    return edits


def edited_metadata(metadata: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with new values by name; a value of None removes the name."""
    edited = dict(metadata)
    for name, value in values.items():
        if value is None:
            edited.pop(name, None)
        else:
            edited[name] = value
    return edited


def _differ(metadata: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    # compared as stored: 1 and true, or 1 and 1.0, are equal in Python
    return json.dumps(metadata) != json.dumps(other)


def edit_metadata(database: sqlite3.Connection, changes: Mapping[int, Mapping[str, Any]]) -> int:
    """Set metadata of rows; how many rows changed. Nothing is committed.

    changes: by row the new values by name; others stay, and None removes one.
    """
    num_changed = 0
    for entries in _blocks(database, changes):
        lines: list[tuple[str, int, int]] = []
        removed: list[tuple[str, Any, int]] = []
        added: list[tuple[str, Any, int]] = []
        for old in entries:
            metadata = edited_metadata(old.metadata, changes[old.row])
            if not _differ(metadata, old.metadata):
                continue
            new = replace(old, metadata=metadata)
            lines.append((json.dumps(metadata, ensure_ascii=False), digest_of(new), old.row))
            fields_before = set(metadata_fields(old))
            fields_now = set(metadata_fields(new))
            for name, value in fields_before - fields_now:
                removed.append((name, value, old.row))
            for name, value in fields_now - fields_before:
                added.append((name, value, old.row))
        database.executemany("UPDATE rows SET metadata = ?, digest = ? WHERE row = ?", lines)
        query = "DELETE FROM facts WHERE field = (SELECT id FROM fields WHERE name = ?) AND value = ? AND row = ?"
        database.executemany(query, removed)
        insert_field_values(database, added)
        num_changed += len(lines)
    return num_changed


def edit_addresses(database: sqlite3.Connection, addresses: Mapping[str, str]) -> int:
    """Give shards new addresses, those of deleted rows too; how many live rows they have. Nothing is committed.

    addresses: the new one by the old one; two shards may exchange theirs.
    """
    ids: dict[str, int] = dict(database.execute("SELECT address, id FROM shards"))
    moved: dict[str, str] = {}
    remaining = dict(ids)
    for old, new in addresses.items():
        if old in ids and old != new:
            moved[old] = new
            del remaining[old]
    # unique names in between, because addresses are unique at any moment
    database.executemany("UPDATE shards SET address = ? WHERE id = ?", [(f"\0{ids[old]}", ids[old]) for old in moved])
    for old, new in moved.items():
        if new not in remaining:
            database.execute("UPDATE shards SET address = ? WHERE id = ?", (new, ids[old]))
            remaining[new] = ids[old]
            continue
        # rows of a shard that was known under both addresses are joined
        database.execute("UPDATE rows SET shard = ? WHERE shard = ?", (remaining[new], ids[old]))
        database.execute("DELETE FROM shards WHERE id = ?", (ids[old],))
    new_ids = {remaining[new] for new in moved.values()}
    num_rows = 0
    for number in sorted(new_ids):
        query = "SELECT row FROM rows WHERE shard = ?"
        # fetched before the first update: SQLite leaves undefined what a cursor sees of rows that change meanwhile
        rows = list(map(itemgetter(0), database.execute(query, (number,)).fetchall()))
        # the checksum of a row covers its address
        for entries in _blocks(database, rows):
            digests = [(digest_of(entry), entry.row) for entry in entries]
            database.executemany("UPDATE rows SET digest = ? WHERE row = ?", digests)
        query = f"SELECT count(*) FROM rows WHERE shard = ? AND died = {LATEST}"
        num_rows += database.execute(query, (number,)).fetchone()[0]
    return num_rows


def _blocks(database: sqlite3.Connection, rows: Iterable[int]) -> Iterator[list[Entry]]:
    """The entries of rows, some thousands at once."""
    remaining = iter(rows)
    # as one JSON text, since SQLite bounds the number of parameters
    while block := list(islice(remaining, _ROWS_AT_ONCE)):
        yield read_entries(database, "WHERE row IN (SELECT value FROM json_each(?))", json.dumps(block))
