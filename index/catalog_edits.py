"""Edits of an index that leave rows and vectors as they are: metadata of rows, and addresses of shards.

Metadata comes from a table: which rows each line means, what it sets, and which keys no row has. New addresses of
shards and image files that were moved are those below another folder, or those of files of the same name. Both go into
a copy of the catalogue.
"""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

from vlm.config import suggest
from vlm.data.shards import is_remote
from vlm.data.sources.table_rows import TABLE_READERS, file_extension, read_rows
from vlm.errors import BadSample, UsageError
from vlm.index.catalog import LATEST, Entry, digest_of, read_entries
from vlm.index.engine_base import EngineCatalogue
from vlm.index.metadata import insert_field_values, is_field, metadata_fields
from vlm.index.row_bitmaps import update_bitmaps
from vlm.storage import is_compressed

UID = "uid"
_NUM_NAMED = 10
# of every row, and not metadata: the captions and the identity of its image
_FIXED = frozenset({UID, "key", "language", "caption"})


@dataclass(frozen=True, kw_only=True)
class TableChanges:
    """What a table sets: by row the new values by name.

    num_keys: of the table. num_unknown: how many of them no row has. unknown: the first of these.
    """

    changes: dict[int, dict[str, Any]]
    columns: tuple[str, ...]
    num_keys: int
    num_unknown: int
    unknown: tuple[str, ...]


def read_table(path: Path, *, encoding: str = "") -> list[dict[str, Any]]:
    """The lines of a CSV, TSV, JSONL or Parquet file by column, numbers exact and empty cells left out.

    Raises:
        UsageError: there is no such file, or its ending is of no table. VlmError: it cannot be read.
    """
    if file_extension(path.name) not in TABLE_READERS:
        raise UsageError(f"{path} is not a table: its name must end in one of {', '.join(TABLE_READERS)}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    rows = read_rows(data, name=path.name, encoding=encoding)
    lines: list[dict[str, Any]] = []
    for number in range(len(rows)):
        try:
            lines.append(rows[number])
        except BadSample as error:
            raise UsageError(f"{path}, row {number + 1}: {error.detail}; nothing was set.") from error
    return lines


def match_table(
    catalogue: EngineCatalogue, lines: Iterable[Mapping[str, Any]], *, key: str = UID, columns: Sequence[str] = ()
) -> TableChanges:
    """What the lines of a table set.

    Args:
        key: the column that names the rows, by the field of the same name; `uid` by their uids. Several rows may have
            a key, as those of images of one product.
        columns: those that are set; all but the key if empty.

    Raises:
        UsageError: there is no such column or field, a column cannot be set, a key occurs twice with different values,
            or no row has any of the keys.
    """
    by_key = _lines_by_key(lines, key, columns)
    # an ordered set over all lines: one without an empty cell has columns that others lack
    names = list(dict.fromkeys(chain.from_iterable(by_key.values())))
    for name in names:
        if name in _FIXED or not is_field(name):
            raise UsageError(
                f"The column {name!r} is not metadata that can be set; name the others (--columns), or change captions "
                "and uids by vlm index update."
            )
    if not names:
        raise UsageError(f"The table has no column besides its key {key!r}; nothing was set.")
    rows = _rows_by_key(catalogue, key, list(by_key))
    unknown = [value for value in by_key if value not in rows]
    # some unknown keys are usual, as of a table for several indexes; no known one means the wrong column
    if len(unknown) == len(by_key):
        raise UsageError(
            f"No row has one of the {len(by_key):,} keys of the table as its {key}; the first is {unknown[0]!r}, and a "
            f"row has {_example(catalogue, key)!r}. Nothing was set."
        )
    changes: dict[int, dict[str, Any]] = {}
    for value, line in by_key.items():
        for row in rows.get(value, ()):
            changes[row] = line
    return TableChanges(
        changes=changes,
        columns=tuple(names),
        num_keys=len(by_key),
        num_unknown=len(unknown),
        unknown=tuple(unknown[:_NUM_NAMED]),
    )


def _lines_by_key(lines: Iterable[Mapping[str, Any]], key: str, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    by_key: dict[str, dict[str, Any]] = {}
    known: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        # of every line, since empty cells are left out: a column may begin anywhere
        known |= dict.fromkeys(line)
        if key not in line:
            continue
        value = _key_text(line[key])
        values = {name: line[name] for name in columns or line if name in line and name != key}
        if by_key.setdefault(value, values) != values:
            raise UsageError(f"The key {value!r} occurs twice, and row {number} sets it otherwise; nothing was set.")
    if not known:
        raise UsageError(f"There is nothing to set: give at least one row, with its {key!r} and the values to set.")
    for name in (key, *columns):
        if name not in known:
            raise UsageError(f"The table has no column {name!r}; {suggest(name, list(known))}")
    return by_key


def _rows_by_key(catalogue: EngineCatalogue, key: str, values: list[str]) -> Mapping[str, Sequence[int]]:
    if key == UID:
        return {uid: (row,) for uid, row in catalogue.rows_by_uid(values).items()}
    known = catalogue.field_names()
    if key not in known:
        raise UsageError(f"No row has the field {key!r} to find it by; {suggest(key, [*known, UID])}")
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for value, row in catalogue.field_values(key):
        rows[_key_text(value)].append(row)
    return rows


def _example(catalogue: EngineCatalogue, key: str) -> str:
    if key != UID:
        return _key_text(catalogue.distinct_values(key, 1)[0])
    first_row = catalogue.rows()[:1].tolist()
    return catalogue.entries(first_row)[0].uid if first_row else ""


def _key_text(value: Any) -> str:
    """A key as text, so that the number 7 and the text 7 are one key, and 007 another."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


_NUM_MOVED_NAMED = 3


def addresses_below(addresses: Sequence[str], old: str, new: str) -> dict[str, str]:
    """The new address of each that is `old` or lies in this folder.

    >>> addresses_below(["/a/x/0.tar", "/b/1.tar"], "/a", "s3://bucket/a")
    {'/a/x/0.tar': 's3://bucket/a/x/0.tar'}

    Raises:
        UsageError: none does.
    """
    old_folder = old.rstrip("/")
    # absolute, since the index is opened from other working directories too
    new_folder = new if is_remote(new) else str(Path(new).expanduser().absolute())
    moved: dict[str, str] = {}
    for address in addresses:
        # with the slash: /data/ab does not lie in /data/a
        if address == old_folder or address.startswith(f"{old_folder}/"):
            moved[address] = new_folder.rstrip("/") + address.removeprefix(old_folder)
    if not moved:
        folders = sorted({address.rpartition("/")[0] for address in addresses})
        raise UsageError(f"No image of the index lies at {old}; they lie in {_listing(folders)}.")
    return moved


def addresses_by_name(addresses: Sequence[str], shards: Sequence[str]) -> dict[str, str]:
    """The shard that each address is now, found by its file name, and by its folders where several have that name.

    >>> addresses_by_name(["/old/a/0.tar", "/old/b/0.tar"], ["/new/a/0.tar", "/new/b/0.tar"])
    {'/old/a/0.tar': '/new/a/0.tar', '/old/b/0.tar': '/new/b/0.tar'}

    Raises:
        UsageError: an address has none, or more than one.
    """
    moved: dict[str, str] = {}
    lacking: list[str] = []
    for address in addresses:
        # of shards with the same file name, those that share most folders before it: train/0.tar and val/0.tar
        nearest: list[str] = []
        most_common = 1
        for shard in shards:
            depth = _common_depth(address, shard)
            if depth > most_common:
                nearest.clear()
                most_common = depth
            if depth == most_common:
                nearest.append(shard)
        if len(nearest) > 1:
            raise UsageError(f"{address} may be {nearest[0]} or {nearest[1]} now; name its folder: OLD NEW.")
        if nearest:
            moved[address] = nearest[0] if is_remote(nearest[0]) else str(Path(nearest[0]).absolute())
        else:
            lacking.append(address)
    if lacking:
        raise UsageError(
            f"{len(lacking):,} of {len(addresses):,} shards of the index are not among the {len(shards):,} given, the "
            f"first of them {lacking[0]}; nothing was changed."
        )
    return moved


def check_addresses(addresses: Mapping[str, str], ends: Mapping[str, int]) -> None:
    """Refuse new addresses on this machine where there is no file, or one too short for the images in it.

    ends: the byte at which the last image of each old address ends.

    Raises:
        UsageError: the first such is named; those of other machines are not looked at.
    """
    for old, new in addresses.items():
        if is_remote(new):
            continue
        path = Path(new)
        if not path.is_file():
            raise UsageError(f"{new} does not exist, where {old} should be now; nothing was changed.")
        # the offsets in a compressed tar are those of the plain one
        if not is_compressed(new) and path.stat().st_size < ends[old]:
            raise UsageError(
                f"{new} has {path.stat().st_size:,} bytes, and the images of {old} end at {ends[old]:,}: it is another "
                "file; nothing was changed."
            )


def _common_depth(address: str, shard: str) -> int:
    """How many names at the ends of two addresses are the same."""
    depth = 0
    for name, other in zip(reversed(PurePosixPath(address).parts), reversed(PurePosixPath(shard).parts), strict=False):
        if name != other:
            break
        depth += 1
    return depth


def _listing(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_NUM_MOVED_NAMED]) + (" …" if len(shown) > _NUM_NAMED else "")


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
        update_bitmaps(database, added, removed)
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
