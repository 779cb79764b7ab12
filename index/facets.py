"""Facets: the columns of an index's metadata, and how many rows have each value.

They are read from the table of facts, whose primary key (field, value, row) makes distinct values, minimum and maximum
a few page reads each. Counting reads the bitmaps of frequent values and the facts of the others, in a catalogue without
bitmaps a column whole.
"""

import heapq
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from pyroaring import BitMap

from vlm.index.metadata import FieldType, FieldValue, field_types
from vlm.index.row_bitmaps import plain_cursor, read_bitmap

MOST_DISTINCT = 1000
"""Distinct values beyond which a column is no longer counted: it is rather a name than a category."""

# one step for each distinct value, whatever the number of rows: SQLite's own DISTINCT would read the whole column
_DISTINCT = """
WITH RECURSIVE distinct_values(value) AS (
    SELECT min(value) FROM facts WHERE field = ?1
    UNION ALL
    SELECT (SELECT min(value) FROM facts WHERE field = ?1 AND value > distinct_values.value)
    FROM distinct_values WHERE distinct_values.value IS NOT NULL
)
SELECT count(*) FROM (SELECT value FROM distinct_values WHERE value IS NOT NULL LIMIT ?2)
"""


@dataclass(frozen=True, kw_only=True)
class FieldSummary:
    """A column of the metadata.

    types: number, text or both. distinct: number of its values, at most `MOST_DISTINCT` + 1, which stands for more.
    minimum, maximum: of its numbers; None without numbers.
    """

    name: str
    types: tuple[FieldType, ...]
    distinct: int
    minimum: int | float | None
    maximum: int | float | None

    @property
    def is_category(self) -> bool:
        """Whether its values are few enough to be counted."""
        return self.distinct <= MOST_DISTINCT

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"types": list(self.types)}


@dataclass(frozen=True, kw_only=True)
class ValueCount:
    """A value and the number of rows that have it."""

    value: FieldValue
    rows: int


def summarize_fields(database: sqlite3.Connection) -> list[FieldSummary]:
    """Every column that has values, by name; values of deleted rows count until a compaction."""
    ids: dict[str, int] = dict(database.execute("SELECT name, id FROM fields").fetchall())
    summaries: list[FieldSummary] = []
    for name, types in field_types(database).items():
        (distinct,) = database.execute(_DISTINCT, (ids[name], MOST_DISTINCT + 1)).fetchone()
        minimum = maximum = None
        if "number" in types:
            # each alone, since SQLite finds both ends by the index only in separate statements
            query = "FROM facts WHERE field = ? AND value < ''"
            (minimum,) = database.execute(f"SELECT min(value) {query}", (ids[name],)).fetchone()
            (maximum,) = database.execute(f"SELECT max(value) {query}", (ids[name],)).fetchone()
        summaries.append(FieldSummary(name=name, types=types, distinct=distinct, minimum=minimum, maximum=maximum))
    return summaries


def count_values(
    database: sqlite3.Connection,
    field: str,
    *,
    top: int,
    rows: BitMap | None = None,
    hidden: BitMap,
    use_bitmaps: bool = False,
) -> list[ValueCount]:
    """The `top` most frequent values of a column, ties by value.

    rows: count only these; None counts all but the hidden ones.
    use_bitmaps: read those that the database has (`vlm.index.row_bitmaps`) instead of most facts.
    """
    found = database.execute("SELECT id FROM fields WHERE name = ?", (field,)).fetchone()
    if found is None:
        return []
    if use_bitmaps:
        pairs = _count_by_bitmaps(database, found[0], rows, hidden)
    elif rows is None and not hidden:
        query = "SELECT value, count(*) FROM facts WHERE field = ? GROUP BY value"
        pairs = plain_cursor(database).execute(query, found)
    else:
        pairs = _count_facts(database, "", found, rows, hidden)
    counts = [ValueCount(value=value, rows=number) for value, number in pairs if number]
    # numbers before texts, as SQLite sorts them
    return heapq.nsmallest(top, counts, key=lambda count: (-count.rows, isinstance(count.value, str), count.value))


def _count_by_bitmaps(
    database: sqlite3.Connection, field: int, rows: BitMap | None, hidden: BitMap
) -> Iterator[tuple[FieldValue, int]]:
    """Each value with its number of rows: of a frequent one by its bitmap, of the others by their facts."""
    shared: list[tuple[FieldValue, FieldValue]] = []
    # one statement, as a writer may divide a span between two; a bitmap at a time is in memory
    query = "SELECT low, high, CASE WHEN low = high THEN rows END FROM bitmaps WHERE field = ?"
    for low, high, stored in plain_cursor(database).execute(query, (field,)):
        if stored is None:
            shared.append((low, high))
            continue
        having = read_bitmap(stored)
        if rows is None:
            yield low, len(having) - having.intersection_cardinality(hidden)
        else:
            yield low, having.intersection_cardinality(rows)
    for low, high in shared:
        yield from _count_facts(database, "AND value >= ? AND value <= ?", (field, low, high), rows, hidden)


def _count_facts(
    database: sqlite3.Connection,
    condition: str,
    parameters: Sequence[FieldValue],
    rows: BitMap | None,
    hidden: BitMap,
) -> Iterator[tuple[FieldValue, int]]:
    """Each value with its number of rows, by its facts, none of which is kept."""
    query = f"SELECT value, row FROM facts WHERE field = ? {condition} ORDER BY value"
    facts = plain_cursor(database).execute(query, parameters)
    for value, same in groupby(facts, key=itemgetter(0)):
        if rows is None:
            yield value, sum(row not in hidden for _, row in same)
        else:
            yield value, sum(row in rows for _, row in same)
