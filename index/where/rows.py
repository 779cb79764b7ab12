"""The rows a condition chooses, by sets of row numbers; every value of the filter is a bound parameter."""

import json
import sqlite3
from dataclasses import dataclass
from itertools import chain
from textwrap import shorten

import numpy as np

from vlm.config import nearest
from vlm.errors import UsageError
from vlm.index.facts import KEY, Kind, Value, field_kinds
from vlm.index.where.conditions import Condition, Every, Leaf, Like, Missing, Not, OneOf, Ordered, Some, leaves
from vlm.tensors import Array, Int64

Rows = Int64[Array, " _"]

# up to so many rows found already go into the next question; beyond, sets are intersected afterwards
_FEW = 10_000
# conditions are ordered by how many facts they touch, counted up to here
_COUNTED = 20_000
_EQUAL, _NUMBERS, _TEXTS = "value = ?", "value < ''", "value >= ''"


def rows_where(database: sqlite3.Connection, condition: Condition) -> Int64[Array, " N"]:
    """The numbers of the rows a condition chooses, rising, of living and dead rows alike.

    Raises:
        UsageError: it names a field that no row has (unless to say that it is missing, where it was null or rows had
            it once), or compares numbers with texts.
    """
    kinds, fields = field_kinds(database), dict(database.execute("SELECT name, id FROM fields"))
    if not kinds:  # every row has a key
        return np.zeros(0, np.int64)
    for leaf in leaves(condition):
        if not (isinstance(leaf, Missing) and leaf.field in fields):
            _check(leaf, kinds)
    return _Search(database, fields).rows(condition)


def _check(leaf: Leaf, kinds: dict[str, tuple[Kind, ...]]) -> None:
    if leaf.field not in kinds:
        hint, listing = nearest(leaf.field, sorted(kinds)), f"known: {', '.join(sorted(kinds))}"
        hint = shorten(hint if hint == listing else f"{hint} {listing}", 500, placeholder=" …")
        raise UsageError(f"No row has the field {leaf.field!r} (place {leaf.place} of the filter); {hint}")
    for value in _values(leaf):
        kind = "text" if isinstance(value, str) else "number"
        if kind not in kinds[leaf.field]:
            cure = "texts stand in single quotes" if kind == "number" else "numbers stand without quotes"
            raise UsageError(
                f"The field {leaf.field!r} (place {leaf.place} of the filter) holds {kinds[leaf.field][0]}s, and "
                f"{value!r} is a {kind}; {cure}."
            )


def _values(leaf: Leaf) -> tuple[Value, ...]:
    match leaf:
        case OneOf():
            return leaf.values
        case Ordered():
            return (leaf.value,)
        case Like():
            return (leaf.pattern,)
    return ()


@dataclass(frozen=True)
class _Search:
    """fields: the number of each field."""

    database: sqlite3.Connection
    fields: dict[str, int]

    def rows(self, condition: Condition, among: Rows | None = None) -> Rows:
        """The rows chosen, or those of them that are in `among`; rising."""
        match condition:
            case Not(Missing() as leaf):
                return self._with_fact(leaf.field, "TRUE", (), among)
            case Not(inner):
                everything = self._everything() if among is None else among
                return np.setdiff1d(everything, self.rows(inner, among), assume_unique=True)
            case Missing():
                return self.rows(Not(Not(condition)), among)
            case Every(parts):
                for part in sorted(parts, key=self._touched):
                    among = self.rows(part, among)
                    if not len(among):
                        break
                return self._everything() if among is None else among
            case Some(parts):
                return _sorted_set(np.concatenate([self.rows(part, among) for part in parts]))
        return self._with_fact(condition.field, *_test(condition), among)

    def _everything(self) -> Rows:
        return self._with_fact(KEY, "TRUE", (), None)

    def _with_fact(self, field: str, test: str, values: tuple[Value, ...], among: Rows | None) -> Rows:
        question = f"SELECT row FROM facts WHERE field = ? AND {test}"
        if among is None or len(among) > _FEW:
            found = self._fetch(question, self.fields[field], *values)
            return found if among is None else np.intersect1d(found, among, assume_unique=True)
        # one value: the table is asked row by row; several: every fact of the test is read (+ keeps SQLite to that)
        row = "row" if test == _EQUAL else "+row"
        question += f" AND {row} IN (SELECT value FROM json_each(?))"
        return self._fetch(question, self.fields[field], *values, json.dumps(among.tolist()))

    def _fetch(self, question: str, *values: Value) -> Rows:
        cursor = self.database.cursor()
        cursor.row_factory = None
        return _sorted_set(np.fromiter(chain.from_iterable(cursor.execute(question, values)), np.int64))

    def _touched(self, condition: Condition) -> int:
        """About how many facts must be read for a condition, counted only as far as that is cheap."""
        match condition:
            case Not() | Missing() | Like():
                return _COUNTED
            case Every(parts):
                return min(map(self._touched, parts))
            case Some(parts):
                return sum(map(self._touched, parts))
        test, values = _test(condition)
        question = f"SELECT count(*) FROM (SELECT 1 FROM facts WHERE field = ? AND {test} LIMIT {_COUNTED})"
        return self.database.execute(question, (self.fields[condition.field], *values)).fetchone()[0]


def _sorted_set(rows: Rows) -> Rows:
    """As np.unique, whose hashing takes longer where most rows are in order already."""
    rows = np.sort(rows, kind="stable")
    return rows[np.diff(rows, prepend=-1) > 0]


def _test(leaf: OneOf | Ordered | Like) -> tuple[str, tuple[Value, ...]]:
    """What a fact's value must fulfil, in SQL, and the values of its question marks."""
    match leaf:
        case OneOf(values=values):
            return (_EQUAL if len(values) == 1 else f"value IN ({', '.join('?' * len(values))})"), values
        case Ordered(order=order, value=value):
            return f"value {order} ? AND {_TEXTS if isinstance(value, str) else _NUMBERS}", (value,)
        case Like(pattern=pattern):
            escaped = pattern.replace("\\", "\\\\").replace("_", "\\_")
            return f"value LIKE ? ESCAPE '\\' AND {_TEXTS}", (escaped,)
