"""Facets: the columns of an index's metadata, and how many rows have each value.

They are read from the table of facts, whose primary key (field, value, row) makes distinct values, minimum and maximum
a few page reads each; only counting reads a column whole.
"""

import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Any

from vlm.index.metadata import FieldType, FieldValue, field_types
from vlm.tensor_types import Array, Int64

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
    rows: Int64[Array, " N"] | None = None,
    hidden: Int64[Array, " H"],
) -> list[ValueCount]:
    """The `top` most frequent values of a column, ties by value.

    rows: count only these; None counts all but the hidden ones.
    """
    condition = ""
    parameters = [field]
    if rows is not None:
        condition = "AND row IN (SELECT value FROM json_each(?))"
        parameters.append(json.dumps(rows.tolist()))
    elif len(hidden):
        condition = "AND row NOT IN (SELECT value FROM json_each(?))"
        parameters.append(json.dumps(hidden.tolist()))
    query = (
        "SELECT value, count(*) AS number FROM facts WHERE field = (SELECT id FROM fields WHERE name = ?)"
        f" {condition} GROUP BY value ORDER BY number DESC, value LIMIT ?"
    )
    counts = database.execute(query, (*parameters, top)).fetchall()
    return [ValueCount(value=value, rows=number) for value, number in counts]
