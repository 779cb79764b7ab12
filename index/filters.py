"""The text of a filter as words, each with its place.

A condition as a tree. Every leaf is about one field, and is true of a row when one of the field's values fits.

From the text of a filter to its condition, by recursive descent.

some   = every ("or" every)*
every  = denial ("and" denial)*
denial = "not" denial | "(" some ")" | test
test   = name ("=" | "!=" | "<" | "<=" | ">" | ">=") value
       | name ["not"] ("has" value | "like" text | "in" "(" value ("," value)* ")")
       | name "is" ["not"] "missing"

The rows a condition chooses, by sets of row numbers; every value of the filter is a bound parameter.

The filter language: `language = 'en' and width >= 512 and tags has 'dog'`, and the rows a condition chooses.

    field = value        one of the field's values is this; `has` is the same, and reads better for lists
    field < <= > >= 1.5  one of them is in this order: numbers by size, texts by character (so do dates as 2024-05-31)
    field in (1, 'a')    one of them is one of these
    field like 'a%'      one of them fits: % is any run of characters, capital letters A to Z count as small ones
    field is missing     the row has no value of the field

`!=`, `not in`, `not has` and `not like` choose the rows that have the field, but none of whose values is so; `is not
missing` those that have it. Conditions are joined by `not`, `and`, `or` (in that order) and parentheses; `not
condition` is every row the condition does not choose, those without the field too. Texts stand in 'single quotes'
('' is a quote), names in "double quotes" where they hold more than letters, digits, _ and dots or are a word of the
language. true and false are 1 and 0.
"""

import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from itertools import chain
from textwrap import shorten
from typing import Literal, NoReturn, cast

import numpy as np

from vlm.config import suggest
from vlm.errors import UsageError
from vlm.index.metadata import KEY, LONGEST_TEXT, FieldType, FieldValue, field_types, sanitize_text
from vlm.tensors import Array, Int64

LONGEST_FILTER = 10_000
_KEYWORDS = frozenset({"and", "or", "not", "in", "has", "like", "is", "missing", "true", "false"})
_BOOLEANS: dict[str, FieldValue] = {"true": 1, "false": 0}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")*")
    | (?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?(?![\w.]))
    | (?P<name>[^\W\d][\w.]*)
    | (?P<sign><=|>=|!=|[=<>(),])
    | (?P<end>\Z)
    )""",
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Token:
    """kind: what it is; keywords, signs and the end of the filter are `sign`. text: as it was written, keywords in
    small letters. place: where it begins, from 1. value: of a name, a text or a number."""

    kind: Literal["name", "text", "number", "sign"]
    text: str
    column: int
    value: FieldValue = ""


def tokenize_filter(filter_text: str) -> list[Token]:
    """The words of a filter; the last is the end, an empty sign.

    Raises:
        UsageError: it is too long, or something in it is no word; the place is named.
    """
    if len(filter_text) > LONGEST_FILTER:
        raise UsageError(f"A filter of {len(filter_text):,} characters; at most {LONGEST_FILTER:,} are read.")
    tokens, position = [], 0
    while not tokens or tokens[-1].text:
        found = _TOKEN.match(filter_text, position)
        if not found:
            begin = position + len(filter_text[position:]) - len(filter_text[position:].lstrip())
            _refuse(filter_text, begin)
        kind = found.lastgroup or ""
        tokens.append(_token(kind, found[kind], found.start(kind) + 1))
        position = found.end()
    return tokens


def _token(kind: str, text: str, column: int) -> Token:
    if sanitize_text(text) != text:
        raise UsageError(f"The filter holds a character at place {column} or soon after it that no text can hold.")
    match kind:
        case "text" | "quoted":
            quote = text[0]
            return Token(
                kind="text" if kind == "text" else "name",
                text=text,
                column=column,
                value=text[1:-1].replace(quote * 2, quote),
            )
        case "number":
            return Token(kind="number", text=text, column=column, value=_number(text))
        case "name" if text.lower() in _KEYWORDS:
            keyword = text.lower()
            return Token(
                kind="number" if keyword in _BOOLEANS else "sign",
                text=keyword,
                column=column,
                value=_BOOLEANS.get(keyword, ""),
            )
        case "name":
            return Token(kind="name", text=text, column=column, value=text)
    return Token(kind="sign", text=text, column=column)


def _number(text: str) -> FieldValue:
    # int() refuses thousands of digits, and a number so long is refused below either way
    number = int(text) if len(text) < 100 and text.lstrip("+-").isdigit() else float(text)
    if not -(2**63) <= number < 2**63:
        # SQLite keeps such numbers as doubles, of which one stands for a thousand neighbours
        raise UsageError(
            f"The filter compares with {text[:40]}, and numbers from 2^63 on are kept to 53 bits only, so that others "
            "would be chosen with it; keep such hashes as text in the metadata."
        )
    return number


def _refuse(text: str, begin: int) -> NoReturn:
    first = text[begin]
    cures = {
        "'": "a text lacks its closing quote; a quote inside a text is written twice",
        '"': "a name lacks its closing quote",
    }
    cure = cures.get(first, "names that hold more than letters, digits, _ and dots stand in double quotes")
    raise UsageError(f"The filter cannot be read at place {begin + 1}, {text[begin : begin + 20]!r}: {cure}.")


Operator = Literal["<", "<=", ">", ">="]


@dataclass(frozen=True, kw_only=True)
class Predicate:
    """place: where the name of the field stands in the text, from 1; for messages."""

    field: str
    column: int = attribute(default=1, compare=False)


@dataclass(frozen=True, kw_only=True)
class IsIn(Predicate):
    """A value is one of these."""

    values: tuple[FieldValue, ...]


@dataclass(frozen=True, kw_only=True)
class Compare(Predicate):
    """A value of the same kind, number or text, stands so to this one."""

    operator: Operator
    value: FieldValue


@dataclass(frozen=True, kw_only=True)
class Like(Predicate):
    """A text fits the pattern, in which % is any run of characters; A to Z count as a to z."""

    pattern: str


@dataclass(frozen=True, kw_only=True)
class IsNull(Predicate):
    """There is no value."""


@dataclass(frozen=True)
class Not:
    """What the condition does not choose."""

    condition: "Condition"


@dataclass(frozen=True)
class And:
    """What all of the conditions choose."""

    conditions: tuple["Condition", ...]


@dataclass(frozen=True)
class Or:
    """What any of the conditions chooses."""

    conditions: tuple["Condition", ...]


Condition = IsIn | Compare | Like | IsNull | Not | And | Or


def predicates(condition: Condition) -> list[Predicate]:
    """All leaves, from left to right."""
    match condition:
        case Predicate():
            return [condition]
        case Not(inner):
            return predicates(inner)
        case And(parts) | Or(parts):
            return [predicate for part in parts for predicate in predicates(part)]


_DEEPEST = 50
_TESTS = "one of = != < <= > >= in has like is"


def parse_filter(text: str) -> Condition:
    """The condition a filter says.

    Raises:
        UsageError: it is none; the place, what stands there and what was expected are named.
    """
    return _Parser(tokenize_filter(text)).parse()


class _Parser:
    """Reads words one after the other."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens, self._next, self._depth = tokens, 0, 0

    def parse(self) -> Condition:
        condition = self._parse_or()
        if self._token.text:
            self._refuse("and, or, or the end")
        return condition

    @property
    def _token(self) -> Token:
        return self._tokens[self._next]

    def _accept(self, *signs: str) -> str:
        """The next word if it is one of these signs or keywords, and pass over it; else nothing."""
        word = self._token
        if word.kind != "sign" or word.text not in signs:
            return ""
        self._next += 1
        return word.text

    def _expect(self, sign: str) -> None:
        if not self._accept(sign):
            self._refuse(sign)

    def _parse_or(self) -> Condition:
        parts = [self._parse_and()]
        while self._accept("or"):
            parts.append(self._parse_and())
        return Or(tuple(parts)) if len(parts) > 1 else parts[0]

    def _parse_and(self) -> Condition:
        parts = [self._parse_not()]
        while self._accept("and"):
            parts.append(self._parse_not())
        return And(tuple(parts)) if len(parts) > 1 else parts[0]

    def _parse_not(self) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise UsageError(f"The filter is more than {_DEEPEST} parentheses deep at place {self._token.column}.")
        if self._accept("not"):
            condition = Not(self._parse_not())
        elif self._accept("("):
            condition = self._parse_or()
            self._expect(")")
        else:
            condition = self._test()
        self._depth -= 1
        return condition

    def _test(self) -> Condition:
        name = self._token
        if name.kind != "name":
            self._refuse("the name of a field")
        self._next += 1
        field, column = str(name.value), name.column
        missing = IsNull(field=field, column=column)
        if self._accept("is"):
            present = self._accept("not")
            self._expect("missing")
            return Not(missing) if present else missing
        if operator := self._accept("<", "<=", ">", ">="):
            return Compare(field=field, column=column, operator=cast(Operator, operator), value=self._value())
        if self._accept("="):
            return IsIn(field=field, column=column, values=(self._value(),))
        if self._accept("!="):
            return And((Not(missing), Not(IsIn(field=field, column=column, values=(self._value(),)))))
        denied = self._accept("not")
        found = self._parse_membership(field, column)
        return And((Not(missing), Not(found))) if denied else found

    def _parse_membership(self, field: str, column: int) -> Condition:
        match self._accept("has", "like", "in"):
            case "has":
                return IsIn(field=field, column=column, values=(self._value(),))
            case "like":
                if self._token.kind != "text":
                    self._refuse("a text in single quotes")
                return Like(field=field, column=column, pattern=str(self._value()))
            case "in":
                self._expect("(")
                values = [self._value()]
                while self._accept(","):
                    values.append(self._value())
                self._expect(")")
                return IsIn(field=field, column=column, values=tuple(values))
        self._refuse(_TESTS)

    def _value(self) -> FieldValue:
        word = self._token
        if word.kind not in ("text", "number"):
            self._refuse("a number, true, false or a text in single quotes")
        if isinstance(word.value, str) and len(word.value) >= LONGEST_TEXT:
            raise UsageError(
                f"The text at place {word.column} of the filter has {len(word.value):,} characters; "
                "the catalogue keeps "
                f"the first {LONGEST_TEXT:,} of a text, so only shorter ones can be compared."
            )
        self._next += 1
        return word.value

    def _refuse(self, expected: str) -> NoReturn:
        found = self._token.text
        shown = (repr(found) if found[0] not in "'\"" else found[:40]) if found else "its end"
        raise UsageError(f"The filter, at place {self._token.column}: {expected} was expected, found {shown}.")


RowIds = Int64[Array, " _"]

# up to so many rows found already go into the next question; beyond, sets are intersected afterwards
_FEW_ROWS = 10_000
# conditions are ordered by how many facts they touch, counted up to here
_COST_LIMIT = 20_000
_EQUAL, _NUMBERS, _TEXTS = "value = ?", "value < ''", "value >= ''"


def matching_rows(database: sqlite3.Connection, condition: Condition) -> Int64[Array, " N"]:
    """The numbers of the rows a condition chooses, rising, of living and dead rows alike.

    Raises:
        UsageError: it names a field that no row has (unless to say that it is missing, where it was null or rows had
            it once), or compares numbers with texts.
    """
    kinds, fields = field_types(database), dict(database.execute("SELECT name, id FROM fields"))
    if not kinds:  # every row has a key
        return np.zeros(0, np.int64)
    for predicate in predicates(condition):
        if not (isinstance(predicate, IsNull) and predicate.field in fields):
            _check(predicate, kinds)
    return _Evaluator(database, fields).rows(condition)


def _check(predicate: Predicate, kinds: dict[str, tuple[FieldType, ...]]) -> None:
    if predicate.field not in kinds:
        hint, listing = suggest(predicate.field, sorted(kinds)), f"known: {', '.join(sorted(kinds))}"
        hint = shorten(hint if hint == listing else f"{hint} {listing}", 500, placeholder=" …")
        raise UsageError(f"No row has the field {predicate.field!r} (place {predicate.column} of the filter); {hint}")
    for value in _values(predicate):
        kind = "text" if isinstance(value, str) else "number"
        if kind not in kinds[predicate.field]:
            cure = "texts stand in single quotes" if kind == "number" else "numbers stand without quotes"
            raise UsageError(
                f"The field {predicate.field!r} (place {predicate.column} of the filter) "
                f"holds {kinds[predicate.field][0]}s, and "
                f"{value!r} is a {kind}; {cure}."
            )


def _values(predicate: Predicate) -> tuple[FieldValue, ...]:
    match predicate:
        case IsIn():
            return predicate.values
        case Compare():
            return (predicate.value,)
        case Like():
            return (predicate.pattern,)
    return ()


@dataclass(frozen=True)
class _Evaluator:
    """fields: the number of each field."""

    database: sqlite3.Connection
    fields: dict[str, int]

    def rows(self, condition: Condition, allowed_rows: RowIds | None = None) -> RowIds:
        """The rows chosen, or those of them that are in `among`; rising."""
        match condition:
            case Not(IsNull() as predicate):
                return self._rows_with_field(predicate.field, "TRUE", (), allowed_rows)
            case Not(inner):
                everything = self._all_rows() if allowed_rows is None else allowed_rows
                return np.setdiff1d(everything, self.rows(inner, allowed_rows), assume_unique=True)
            case IsNull():
                return self.rows(Not(Not(condition)), allowed_rows)
            case And(parts):
                for part in sorted(parts, key=self._estimated_cost):
                    allowed_rows = self.rows(part, allowed_rows)
                    if not len(allowed_rows):
                        break
                return self._all_rows() if allowed_rows is None else allowed_rows
            case Or(parts):
                return _sorted_set(np.concatenate([self.rows(part, allowed_rows) for part in parts]))
        return self._rows_with_field(condition.field, *_test(condition), allowed_rows)

    def _all_rows(self) -> RowIds:
        return self._rows_with_field(KEY, "TRUE", (), None)

    def _rows_with_field(
        self, field: str, test: str, values: tuple[FieldValue, ...], allowed_rows: RowIds | None
    ) -> RowIds:
        sql = f"SELECT row FROM facts WHERE field = ? AND {test}"
        if allowed_rows is None or len(allowed_rows) > _FEW_ROWS:
            found = self._fetch(sql, self.fields[field], *values)
            return found if allowed_rows is None else np.intersect1d(found, allowed_rows, assume_unique=True)
        # one value: the table is asked row by row; several: every fact of the test is read (+ keeps SQLite to that)
        row = "row" if test == _EQUAL else "+row"
        sql += f" AND {row} IN (SELECT value FROM json_each(?))"
        return self._fetch(sql, self.fields[field], *values, json.dumps(allowed_rows.tolist()))

    def _fetch(self, sql: str, *values: FieldValue) -> RowIds:
        cursor = self.database.cursor()
        cursor.row_factory = None
        return _sorted_set(np.fromiter(chain.from_iterable(cursor.execute(sql, values)), np.int64))

    def _estimated_cost(self, condition: Condition) -> int:
        """About how many facts must be read for a condition, counted only as far as that is cheap."""
        match condition:
            case Not() | IsNull() | Like():
                return _COST_LIMIT
            case And(parts):
                return min(map(self._estimated_cost, parts))
            case Or(parts):
                return sum(map(self._estimated_cost, parts))
        test, values = _test(condition)
        sql = f"SELECT count(*) FROM (SELECT 1 FROM facts WHERE field = ? AND {test} LIMIT {_COST_LIMIT})"
        return self.database.execute(sql, (self.fields[condition.field], *values)).fetchone()[0]


def _sorted_set(rows: RowIds) -> RowIds:
    """As np.unique, whose hashing takes longer where most rows are in order already."""
    rows = np.sort(rows, kind="stable")
    return rows[np.diff(rows, prepend=-1) > 0]


def _test(predicate: IsIn | Compare | Like) -> tuple[str, tuple[FieldValue, ...]]:
    """What a fact's value must fulfil, in SQL, and the values of its question marks."""
    match predicate:
        case IsIn(values=values):
            return (_EQUAL if len(values) == 1 else f"value IN ({', '.join('?' * len(values))})"), values
        case Compare(operator=operator, value=value):
            return f"value {operator} ? AND {_TEXTS if isinstance(value, str) else _NUMBERS}", (value,)
        case Like(pattern=pattern):
            escaped = pattern.replace("\\", "\\\\").replace("_", "\\_")
            return f"value LIKE ? ESCAPE '\\' AND {_TEXTS}", (escaped,)
