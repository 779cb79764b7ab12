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

from vlm.config import nearest
from vlm.errors import UsageError
from vlm.index.metadata import KEY, LONGEST_TEXT, Kind, Value, as_number, clean, field_kinds
from vlm.tensors import Array, Int64

LONGEST_FILTER = 10_000
_KEYWORDS = frozenset({"and", "or", "not", "in", "has", "like", "is", "missing", "true", "false"})
_TRUTHS: dict[str, Value] = {"true": 1, "false": 0}
_WORD = re.compile(
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
class Word:
    """kind: what it is; keywords, signs and the end of the filter are `sign`. text: as it was written, keywords in
    small letters. place: where it begins, from 1. value: of a name, a text or a number."""

    kind: Literal["name", "text", "number", "sign"]
    text: str
    place: int
    value: Value = ""


def split_words(filter_text: str) -> list[Word]:
    """The words of a filter; the last is the end, an empty sign.

    Raises:
        UsageError: it is too long, or something in it is no word; the place is named.
    """
    if len(filter_text) > LONGEST_FILTER:
        raise UsageError(f"A filter of {len(filter_text):,} characters; at most {LONGEST_FILTER:,} are read.")
    words, position = [], 0
    while not words or words[-1].text:
        found = _WORD.match(filter_text, position)
        if not found:
            begin = position + len(filter_text[position:]) - len(filter_text[position:].lstrip())
            _refuse(filter_text, begin)
        kind = found.lastgroup or ""
        words.append(_word(kind, found[kind], found.start(kind) + 1))
        position = found.end()
    return words


def _word(kind: str, text: str, place: int) -> Word:
    if clean(text) != text:
        raise UsageError(f"The filter holds a character at place {place} or soon after it that no text can hold.")
    match kind:
        case "text" | "quoted":
            quote = text[0]
            return Word(
                kind="text" if kind == "text" else "name",
                text=text,
                place=place,
                value=text[1:-1].replace(quote * 2, quote),
            )
        case "number":
            return Word(kind="number", text=text, place=place, value=_number(text))
        case "name" if text.lower() in _KEYWORDS:
            keyword = text.lower()
            return Word(
                kind="number" if keyword in _TRUTHS else "sign",
                text=keyword,
                place=place,
                value=_TRUTHS.get(keyword, ""),
            )
        case "name":
            return Word(kind="name", text=text, place=place, value=text)
    return Word(kind="sign", text=text, place=place)


def _number(text: str) -> Value:
    # int() refuses thousands of digits; a float of them is what SQLite could hold anyway
    return as_number(int(text)) if len(text) < 100 and text.lstrip("+-").isdigit() else float(text)


def _refuse(text: str, begin: int) -> NoReturn:
    first = text[begin]
    cures = {
        "'": "a text lacks its closing quote; a quote inside a text is written twice",
        '"': "a name lacks its closing quote",
    }
    cure = cures.get(first, "names that hold more than letters, digits, _ and dots stand in double quotes")
    raise UsageError(f"The filter cannot be read at place {begin + 1}, {text[begin : begin + 20]!r}: {cure}.")


Order = Literal["<", "<=", ">", ">="]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """place: where the name of the field stands in the text, from 1; for messages."""

    field: str
    place: int = attribute(default=1, compare=False)


@dataclass(frozen=True, kw_only=True)
class OneOf(Leaf):
    """A value is one of these."""

    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class Ordered(Leaf):
    """A value of the same kind, number or text, stands so to this one."""

    order: Order
    value: Value


@dataclass(frozen=True, kw_only=True)
class Like(Leaf):
    """A text fits the pattern, in which % is any run of characters; A to Z count as a to z."""

    pattern: str


@dataclass(frozen=True, kw_only=True)
class Missing(Leaf):
    """There is no value."""


@dataclass(frozen=True)
class Not:
    """What the condition does not choose."""

    condition: "Condition"


@dataclass(frozen=True)
class Every:
    """What all of the conditions choose."""

    conditions: tuple["Condition", ...]


@dataclass(frozen=True)
class Some:
    """What any of the conditions chooses."""

    conditions: tuple["Condition", ...]


Condition = OneOf | Ordered | Like | Missing | Not | Every | Some


def leaves(condition: Condition) -> list[Leaf]:
    """All leaves, from left to right."""
    match condition:
        case Leaf():
            return [condition]
        case Not(inner):
            return leaves(inner)
        case Every(parts) | Some(parts):
            return [leaf for part in parts for leaf in leaves(part)]


_DEEPEST = 50
_TESTS = "one of = != < <= > >= in has like is"


def parse_where(text: str) -> Condition:
    """The condition a filter says.

    Raises:
        UsageError: it is none; the place, what stands there and what was expected are named.
    """
    return _Parser(split_words(text)).whole()


class _Parser:
    """Reads words one after the other."""

    def __init__(self, words: Sequence[Word]) -> None:
        self._words, self._next, self._depth = words, 0, 0

    def whole(self) -> Condition:
        condition = self._some()
        if self._word.text:
            self._refuse("and, or, or the end")
        return condition

    @property
    def _word(self) -> Word:
        return self._words[self._next]

    def _accept(self, *signs: str) -> str:
        """The next word if it is one of these signs or keywords, and pass over it; else nothing."""
        word = self._word
        if word.kind != "sign" or word.text not in signs:
            return ""
        self._next += 1
        return word.text

    def _expect(self, sign: str) -> None:
        if not self._accept(sign):
            self._refuse(sign)

    def _some(self) -> Condition:
        parts = [self._every()]
        while self._accept("or"):
            parts.append(self._every())
        return Some(tuple(parts)) if len(parts) > 1 else parts[0]

    def _every(self) -> Condition:
        parts = [self._denial()]
        while self._accept("and"):
            parts.append(self._denial())
        return Every(tuple(parts)) if len(parts) > 1 else parts[0]

    def _denial(self) -> Condition:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise UsageError(f"The filter is more than {_DEEPEST} parentheses deep at place {self._word.place}.")
        if self._accept("not"):
            condition = Not(self._denial())
        elif self._accept("("):
            condition = self._some()
            self._expect(")")
        else:
            condition = self._test()
        self._depth -= 1
        return condition

    def _test(self) -> Condition:
        name = self._word
        if name.kind != "name":
            self._refuse("the name of a field")
        self._next += 1
        field, place = str(name.value), name.place
        missing = Missing(field=field, place=place)
        if self._accept("is"):
            present = self._accept("not")
            self._expect("missing")
            return Not(missing) if present else missing
        if order := self._accept("<", "<=", ">", ">="):
            return Ordered(field=field, place=place, order=cast(Order, order), value=self._value())
        if self._accept("="):
            return OneOf(field=field, place=place, values=(self._value(),))
        if self._accept("!="):
            return Every((Not(missing), Not(OneOf(field=field, place=place, values=(self._value(),)))))
        denied = self._accept("not")
        found = self._membership(field, place)
        return Every((Not(missing), Not(found))) if denied else found

    def _membership(self, field: str, place: int) -> Condition:
        match self._accept("has", "like", "in"):
            case "has":
                return OneOf(field=field, place=place, values=(self._value(),))
            case "like":
                if self._word.kind != "text":
                    self._refuse("a text in single quotes")
                return Like(field=field, place=place, pattern=str(self._value()))
            case "in":
                self._expect("(")
                values = [self._value()]
                while self._accept(","):
                    values.append(self._value())
                self._expect(")")
                return OneOf(field=field, place=place, values=tuple(values))
        self._refuse(_TESTS)

    def _value(self) -> Value:
        word = self._word
        if word.kind not in ("text", "number"):
            self._refuse("a number, true, false or a text in single quotes")
        if isinstance(word.value, str) and len(word.value) >= LONGEST_TEXT:
            raise UsageError(
                f"The text at place {word.place} of the filter has {len(word.value):,} characters; the catalogue keeps "
                f"the first {LONGEST_TEXT:,} of a text, so only shorter ones can be compared."
            )
        self._next += 1
        return word.value

    def _refuse(self, expected: str) -> NoReturn:
        found = self._word.text
        shown = (repr(found) if found[0] not in "'\"" else found[:40]) if found else "its end"
        raise UsageError(f"The filter, at place {self._word.place}: {expected} was expected, found {shown}.")


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
