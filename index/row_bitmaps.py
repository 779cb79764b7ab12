"""Bitmaps of rows: for each metadata field the rows by value, or by range of values, as the catalogue stores them.

A table holds for each field a sequence of spans of its values, in their order and without overlap, which cover all of
them: `low`, `high`, the number of facts from one to the other, and the rows that have them as a roaring bitmap (Lemire
et al. 2018). A value of `FACTS_PER_BITMAP` facts or more is a span of its own; others share one, but never a number and
a text. A filter takes the bitmaps of the spans that lie within its condition whole, and reads facts only at its ends.

They change with the facts, in the same transaction. A catalogue that was written before there were bitmaps has none. An
older version of the program adds rows to a catalogue, or changes a copy of it, without them: what `bitmap_state` says
of the file is then wrong (`has_bitmaps`), and filters read facts until the index is compacted.
"""

import sqlite3
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, groupby, islice
from math import ceil
from operator import itemgetter
from typing import Any

import numpy as np
from pyroaring import BitMap

from vlm.errors import VlmError
from vlm.index.index_files import REBUILD_HINT
from vlm.index.metadata import FieldValue
from vlm.tensor_types import Array, Bool, Int, Int64, UInt8

FACTS_PER_BITMAP = 4096
"""At the ends of a condition at most twice as many facts are read, in about a millisecond each time."""

# a span that grows by added rows is divided when it has so many times more
_GROWTH = 4
MAX_ROW = 2**32 - 1
"""The highest row number that a bitmap holds."""

SCHEMA = """
CREATE TABLE bitmaps (
    field INTEGER NOT NULL REFERENCES fields(id),
    low NOT NULL,
    high NOT NULL,
    facts INTEGER NOT NULL,
    rows BLOB NOT NULL,
    PRIMARY KEY (field, low)
);
CREATE TABLE bitmap_state (catalogue TEXT NOT NULL, next_row INTEGER NOT NULL);
"""
_INSERT = "INSERT INTO bitmaps VALUES (?, ?, ?, ?, ?)"
_FACTS_WITHIN = "FROM facts WHERE field = ? AND value >= ? AND value <= ?"
_NEXT_ROW = "(SELECT coalesce(max(row), -1) + 1 FROM rows)"


def to_bitmap(rows: Int[Array, " N"]) -> BitMap:
    """The set of these row numbers.

    Raises:
        VlmError: one is too high.
    """
    if len(rows) and rows.max() > MAX_ROW:
        raise VlmError(f"The row number {rows.max():,} is above {MAX_ROW:,}, the highest there can be; {REBUILD_HINT}.")
    # from an array of Python's own pyroaring takes the numbers as they lie; it asks one of numpy for each of them
    return BitMap(array("I", rows.astype(np.uint32).tobytes()))


def row_ids(bitmap: BitMap) -> Int64[Array, " N"]:
    """The row numbers in a set, ascending."""
    return np.frombuffer(bitmap.to_array(), np.uint32).astype(np.int64)


_FETCHED_AT_ONCE = 65_536
# below 128 KB, from where on the C library may map memory for each block
_NUMBERS_AT_ONCE = 15_000
# of which no block of row numbers is a larger range
_WIDEST = 2**24


def row_id_blocks(bitmap: BitMap) -> Iterator[Int64[Array, " _"]]:
    """The row numbers in a set, ascending, in blocks, so that a large set is never in memory as numbers."""
    if len(bitmap) <= _NUMBERS_AT_ONCE:
        yield row_ids(bitmap)
        return
    # the sparser the wider, so that few rows are few blocks
    span = bitmap.max() + 1 - bitmap.min()
    width = min(_WIDEST, ceil(span * _NUMBERS_AT_ONCE / len(bitmap)))
    for first in range(bitmap.min(), bitmap.max() + 1, width):
        yield row_ids(bitmap & BitMap(range(first, first + width)))


def contained(rows: Int64[Array, " N"], bitmap: BitMap) -> Bool[Array, " N"]:
    """Which of the rows, distinct and ascending, are in a set."""
    if not len(rows):
        return np.zeros(0, bool)
    within = bitmap & BitMap(range(rows.item(0), rows.item(-1) + 1))
    return np.isin(rows, row_ids(within), assume_unique=True)


# where every so many-th position of a range is set, or more, they are packed as the whole range
_DENSE = 8


def pack_bits(blocks: Iterable[Int64[Array, " _"]], count: int) -> UInt8[Array, " _"]:
    """A bit for each of `count` positions, set for those of the blocks, each ascending: as FAISS reads a selection."""
    bits = np.zeros((count + 7) // 8, np.uint8)
    for positions in blocks:
        if not len(positions):
            continue
        first = positions.item(0) // 8 * 8
        span = positions.item(-1) + 1 - first
        if span <= _DENSE * len(positions):
            is_set = np.zeros(span, bool)
            is_set[positions - first] = True
            packed = np.packbits(is_set, bitorder="little")
            bits[first // 8 : first // 8 + len(packed)] |= packed
        else:
            # those of one byte are neighbours
            places = positions >> 3
            begins = np.flatnonzero(np.diff(places, prepend=-1))
            values = np.left_shift(1, positions & 7).astype(np.uint8)
            bits[places[begins]] |= np.bitwise_or.reduceat(values, begins)
    return bits


def all_bits(count: int) -> UInt8[Array, " _"]:
    """As of `pack_bits`, with each position set."""
    bits = np.full((count + 7) // 8, 255, np.uint8)
    if count % 8:
        bits[-1] = (1 << count % 8) - 1
    return bits


def unpack_bits(bits: UInt8[Array, " _"], first: int, last: int) -> Bool[Array, " N"]:
    """Which of the positions from `first`, a multiple of 8, to before `last` are set."""
    return np.unpackbits(bits[first // 8 :], count=last - first, bitorder="little").view(bool)


def bits_at(bits: UInt8[Array, " _"], positions: Int64[Array, " N"]) -> Bool[Array, " N"]:
    """Which of these positions are set."""
    return (bits[positions >> 3] >> (positions & 7).astype(np.uint8) & 1).astype(bool)


def read_bitmap(stored: bytes) -> BitMap:
    """A set of rows as a catalogue stores it.

    Raises:
        VlmError: it is damaged.
    """
    try:
        return BitMap.deserialize(stored)
    except (ValueError, TypeError) as error:
        raise VlmError(f"A bitmap of the catalogue is damaged ({error}); {REBUILD_HINT}.") from error


def fetch_bitmap(database: sqlite3.Connection, sql: str, *parameters: FieldValue) -> BitMap:
    """The row numbers in the only column of a query."""
    rows = chain.from_iterable(plain_cursor(database).execute(sql, parameters))
    found = BitMap()
    while len(block := np.fromiter(islice(rows, _FETCHED_AT_ONCE), np.int64)):
        # in the order of values, and a set takes in sorted numbers in a tenth of the time
        block.sort()
        found |= to_bitmap(block)
    return found


def plain_cursor(database: sqlite3.Connection) -> sqlite3.Cursor:
    """A cursor that gives tuples: the row objects of a catalogue's connection would cost more than a query."""
    cursor = database.cursor()
    cursor.row_factory = None
    return cursor


def write_bitmaps(
    database: sqlite3.Connection, catalogue: str = "", *, facts_per_bitmap: int = FACTS_PER_BITMAP
) -> None:
    """Make the tables, and the bitmaps of all facts; nothing is committed.

    catalogue: the file name, under which `has_bitmaps` then knows them; empty: of facts without a catalogue.
    """
    for statement in filter(str.strip, SCHEMA.split(";")):
        database.execute(statement)
    for (field,) in database.execute("SELECT id FROM fields").fetchall():
        query = "SELECT value, count(*) FROM facts WHERE field = ? GROUP BY value"
        _write_spans(database, field, database.execute(query, (field,)), facts_per_bitmap)
    if catalogue:
        _claim_bitmaps(database, catalogue)


def has_bitmaps(database: sqlite3.Connection, catalogue: str) -> bool:
    """Whether the catalogue of this file name has bitmaps that agree with its facts."""
    if not _has_tables(database):
        return False
    query = f"SELECT EXISTS (SELECT 1 FROM bitmap_state WHERE catalogue = ? AND next_row = {_NEXT_ROW})"
    return bool(database.execute(query, (catalogue,)).fetchone()[0])


def _claim_bitmaps(database: sqlite3.Connection, catalogue: str) -> None:
    """Say that the bitmaps agree with the facts of the catalogue of this file name."""
    database.execute("DELETE FROM bitmap_state")
    database.execute(f"INSERT INTO bitmap_state VALUES (?, {_NEXT_ROW})", (catalogue,))


@contextmanager
def bitmaps_claimed(database: sqlite3.Connection, name_before: str, name: str) -> Iterator[None]:
    """After the block, which may add rows, bitmaps that agreed with the facts under a name do so under another."""
    agree = has_bitmaps(database, name_before)
    yield
    if agree:
        _claim_bitmaps(database, name)


def bitmap_faults(database: sqlite3.Connection) -> Iterator[str]:
    """Where the bitmaps differ from the facts; reads all of these."""
    for field, name in database.execute("SELECT id, name FROM fields").fetchall():
        # a transaction for each field, so that a writer may commit in between, but not between facts and bitmaps
        database.execute("SAVEPOINT reading")
        try:
            faults = list(_field_faults(database, field, name))
        finally:
            database.execute("RELEASE reading")
        yield from faults


def _field_faults(database: sqlite3.Connection, field: int, name: str) -> Iterator[str]:
    num_facts = 0
    spans = database.execute("SELECT low, high, rows FROM bitmaps WHERE field = ? ORDER BY low", (field,))
    for low, high, stored in spans.fetchall():
        rows = fetch_bitmap(database, f"SELECT row {_FACTS_WITHIN}", field, low, high)
        is_right = False
        with suppress(VlmError):
            is_right = read_bitmap(stored) == rows
        if not is_right:
            yield f"the bitmap of {name!r} from {low!r} to {high!r} is not that of its facts"
        num_facts += database.execute(f"SELECT count(*) {_FACTS_WITHIN}", (field, low, high)).fetchone()[0]
    if num_facts != database.execute("SELECT count(*) FROM facts WHERE field = ?", (field,)).fetchone()[0]:
        yield f"the bitmaps of {name!r} do not have each of its facts once"


def _has_tables(database: sqlite3.Connection) -> bool:
    query = "SELECT COUNT(*) FROM sqlite_master WHERE name IN ('bitmaps', 'bitmap_state')"
    return database.execute(query).fetchone()[0] == 2


def _write_spans(
    database: sqlite3.Connection, field: int, counts: Iterable[tuple[FieldValue, int]], facts_per_bitmap: int
) -> None:
    """Insert the spans of the given values of a field. counts: of the facts of each value, ascending."""
    for low, high, facts in _divide(counts, facts_per_bitmap):
        rows = fetch_bitmap(database, f"SELECT row {_FACTS_WITHIN}", field, low, high)
        database.execute(_INSERT, (field, low, high, facts, _stored(rows)))


def _divide(
    counts: Iterable[tuple[FieldValue, int]], facts_per_bitmap: int
) -> Iterator[tuple[FieldValue, FieldValue, int]]:
    """The spans of ascending values: the least and greatest value, and the number of facts."""
    low: FieldValue = 0
    high: FieldValue = 0
    facts = 0
    for value, count in counts:
        is_frequent = count >= facts_per_bitmap
        # a number and a text never share a span: no comparison is true of both
        if facts and (is_frequent or facts >= facts_per_bitmap or isinstance(low, str) != isinstance(value, str)):
            yield low, high, facts
            facts = 0
        if is_frequent:
            yield value, value, count
            continue
        low = low if facts else value
        high = value
        facts += count
    if facts:
        yield low, high, facts


def _stored(rows: BitMap) -> bytes:
    # runs take a few bytes, as of the keys of neighbouring rows
    rows.run_optimize()
    return rows.serialize()


@dataclass(kw_only=True)
class _Span:
    """A span of a field's values while facts change. id: its place in the table, 0 if it is new."""

    low: FieldValue
    high: FieldValue
    facts: int
    id: int = 0

    def admits(self, value: FieldValue, facts_per_bitmap: int) -> bool:
        """Whether it may be extended to a value outside it."""
        is_shared = self.low != self.high or self.facts < facts_per_bitmap
        return is_shared and isinstance(value, str) == isinstance(self.low, str)


def _order(value: FieldValue) -> tuple[bool, Any]:
    """SQLite's order of values: numbers before texts."""
    return isinstance(value, str), value


def update_bitmaps(
    database: sqlite3.Connection,
    added: Iterable[tuple[str, FieldValue, int]],
    removed: Iterable[tuple[str, FieldValue, int]] = (),
    *,
    facts_per_bitmap: int = FACTS_PER_BITMAP,
) -> None:
    """Let the bitmaps follow a change of facts (field, value, row) that has been made; nothing is committed.

    A catalogue without bitmaps stays without.
    """
    if not _has_tables(database):
        return
    ids: dict[str, int] = dict(database.execute("SELECT name, id FROM fields"))
    changes: defaultdict[int, list[tuple[FieldValue, int, bool]]] = defaultdict(list)
    for triples, is_added in ((removed, False), (added, True)):
        for name, value, row in triples:
            # an older version may have stored no facts of a field that it now would
            if name in ids:
                changes[ids[name]].append((value, row, is_added))
    for field, changed in changes.items():
        changed.sort(key=lambda change: (_order(change[0]), change[1]))
        _FieldUpdate(database, field, facts_per_bitmap).apply(changed)


class _FieldUpdate:
    """Changes the spans of one field."""

    def __init__(self, database: sqlite3.Connection, field: int, facts_per_bitmap: int) -> None:
        self._database = database
        self._field = field
        self._facts_per_bitmap = facts_per_bitmap
        query = "SELECT rowid, low, high, facts FROM bitmaps WHERE field = ? ORDER BY low"
        self._spans = [
            _Span(id=number, low=low, high=high, facts=facts)
            for number, low, high, facts in database.execute(query, (field,)).fetchall()
        ]
        self._lows = [_order(span.low) for span in self._spans]

    def apply(self, changes: list[tuple[FieldValue, int, bool]]) -> None:
        """Add and remove facts (value, row, whether it is added), sorted by value."""
        by_span: list[tuple[_Span, FieldValue, int, bool]] = []
        for value, same in groupby(changes, key=itemgetter(0)):
            span = self._span_of(value)
            by_span += [(span, value, row, is_added) for _, row, is_added in same]
        # values ascend, so those of a span are neighbours
        for _, same in groupby(by_span, key=lambda change: id(change[0])):
            of_span = list(same)
            self._change(of_span[0][0], of_span)

    def _span_of(self, value: FieldValue) -> _Span:
        """The span that holds a value, made or extended if there is none."""
        place = bisect_right(self._lows, _order(value)) - 1
        before = self._spans[place] if place >= 0 else None
        if before is not None and _order(value) <= _order(before.high):
            return before
        if before is not None and before.admits(value, self._facts_per_bitmap):
            before.high = value
            return before
        after = self._spans[place + 1] if place + 1 < len(self._spans) else None
        if after is not None and after.admits(value, self._facts_per_bitmap):
            after.low = value
            self._lows[place + 1] = _order(value)
            return after
        span = _Span(low=value, high=value, facts=0)
        self._spans.insert(place + 1, span)
        self._lows.insert(place + 1, _order(value))
        return span

    def _change(self, span: _Span, changes: list[tuple[_Span, FieldValue, int, bool]]) -> None:
        added = [row for _, _, row, is_added in changes if is_added]
        removed = [row for _, _, row, is_added in changes if not is_added]
        span.facts += len(added) - len(removed)
        # a row that loses a value may have another one of the span
        is_shared = span.low != span.high
        if (is_shared and (removed or span.facts > _GROWTH * self._facts_per_bitmap)) or span.facts <= 0:
            self._rewrite(span)
            return
        rows = to_bitmap(np.array(added, np.int64))
        if not span.id:
            values = (self._field, span.low, span.high, span.facts, _stored(rows))
            span.id = self._database.execute(_INSERT, values).lastrowid or 0
            return
        (stored,) = self._database.execute("SELECT rows FROM bitmaps WHERE rowid = ?", (span.id,)).fetchone()
        rows = (read_bitmap(stored) | rows) - to_bitmap(np.array(removed, np.int64))
        query = "UPDATE bitmaps SET low = ?, high = ?, facts = ?, rows = ? WHERE rowid = ?"
        self._database.execute(query, (span.low, span.high, span.facts, _stored(rows), span.id))

    def _rewrite(self, span: _Span) -> None:
        """Write the span again from its facts, as one or more, or none."""
        self._database.execute("DELETE FROM bitmaps WHERE rowid = ?", (span.id,))
        query = f"SELECT value, count(*) {_FACTS_WITHIN} GROUP BY value"
        counts = self._database.execute(query, (self._field, span.low, span.high))
        _write_spans(self._database, self._field, counts, self._facts_per_bitmap)
