"""The filter language of an index: `language = 'en' and width >= 512 and tags has 'dog'`, and the rows it selects.

    field = value        one of the field's values equals this; `==` and `has` are the same
    field < <= > >= 1.5  one of them compares so: numbers by size, texts by character (so do dates as 2024-05-31)
    field < '2025-12-01T08:30+09:00'   a time with a zone or Z is compared as an instant, also by = and in; stored times
                         without a zone then count as UTC
    field in (1, 'a')    one of them is one of these
    field like 'a%'      one of them matches: % is any run of characters; A to Z match a to z
    field is missing     the row has no value of the field

`!=`, `not in`, `not has` and `not like` select the rows that have the field but no such value; `is not missing` those
that have it. Conditions are joined by `not`, `and`, `or` (in that order of binding) and parentheses; `not condition` is
every row that the condition does not select, including those without the field. Texts are in 'single' or "double"
quotes, of which one inside is written twice; names are in "double quotes" if they hold more than letters, digits, _ and
dots or are a keyword, and what stands where a name must be is one. true and false are 1 and 0.

A text goes through a lexer (`tokenize_filter`), a recursive-descent parser (`parse_filter`) and an evaluator
(`matching_rows`), which joins bitmaps of rows, stored ones (`vlm.index.row_bitmaps`) or those of facts; every value of
the filter is a bound SQL parameter.

    or        = and ("or" and)*
    and       = not ("and" not)*
    not       = "not" not | "(" or ")" | predicate
    predicate = name ("=" | "==" | "!=" | "<" | "<=" | ">" | ">=") value
              | name ["not"] ("has" value | "like" text | "in" "(" value ("," value)* ")")
              | name "is" ["not"] "missing"
"""

import json
import re
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from datetime import UTC, datetime
from itertools import chain
from textwrap import shorten
from typing import Any, Literal, NoReturn, cast

from pyroaring import BitMap

from vlm.config import suggest
from vlm.errors import UsageError
from vlm.index.metadata import KEY, LONGEST_TEXT, FieldType, FieldValue, field_types, sanitize_text
from vlm.index.row_bitmaps import fetch_bitmap, plain_cursor, read_bitmap, row_ids

_ISO_TIME = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)"
    r"(?:[T ](?P<clock>\d\d:\d\d(?::\d\d)?)(?:\.(?P<fraction>\d{1,9}))?(?P<zone>Z|[+-]\d\d:?\d\d)?)?"
)


def has_zone(text: str) -> bool:
    """Whether a text is an ISO 8601 time with a zone or Z."""
    match = _ISO_TIME.fullmatch(text)
    return bool(match and match["zone"]) and instant_of(text) is not None


def instant_of(value: object) -> str | None:
    """An ISO 8601 date or time in UTC with nine decimals, so that texts sort as times; None: it is neither.

    What has no zone is taken as UTC.

    >>> instant_of("2025-12-01T08:30:00.5+09:00"), instant_of("2025-11-30T23:30Z"), instant_of("noon")
    ('2025-11-30T23:30:00.500000000', '2025-11-30T23:30:00.000000000', None)
    """
    match = _ISO_TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    zone = (match["zone"] or "Z").replace("Z", "+00:00")
    try:
        time = datetime.fromisoformat(f"{match['date']}T{match['clock'] or '00:00'}{zone}").astimezone(UTC)
    except (ValueError, OverflowError):  # the 30th of February, or year 0 after the shift
        return None
    return f"{time:%Y-%m-%dT%H:%M:%S}.{(match['fraction'] or '').ljust(9, '0')}"


LONGEST_FILTER = 10_000
_KEYWORDS = frozenset({"and", "or", "not", "in", "has", "like", "is", "missing", "true", "false"})
_BOOLEANS: dict[str, FieldValue] = {"true": 1, "false": 0}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")*")
    | (?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?(?![\w.]))
    | (?P<name>[^\W\d][\w.]*)
    | (?P<sign><=|>=|!=|==|[=<>(),])
    | (?P<end>\Z)
    )""",
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token of a filter.

    kind: keywords, signs and the end of the filter are `sign`, true and false numbers; what is in double quotes is
    `quoted`, a name or a text by its place. text: as written, keywords in lower case, == as =. column: where it begins,
    from 1. value: of a name, a text or a number.
    """

    kind: Literal["name", "quoted", "text", "number", "sign"]
    text: str
    column: int
    value: FieldValue = ""


def tokenize_filter(filter_text: str) -> list[Token]:
    """The tokens of a filter; the last is the end, an empty sign.

    Raises:
        UsageError: it is too long, or something in it is not a token; its column is named.
    """
    if len(filter_text) > LONGEST_FILTER:
        raise UsageError(f"The filter has {len(filter_text):,} characters; at most {LONGEST_FILTER:,} are allowed.")
    tokens: list[Token] = []
    position = 0
    while not tokens or tokens[-1].text:
        match = _TOKEN.match(filter_text, position)
        if not match:
            rest = filter_text[position:]
            _refuse_character(filter_text, position + len(rest) - len(rest.lstrip()))
        kind = match.lastgroup or ""
        tokens.append(_token(kind, match[kind], match.start(kind) + 1))
        position = match.end()
    return tokens


def _token(kind: str, text: str, column: int) -> Token:
    # such a character was replaced in the stored texts, so it could never match
    if sanitize_text(text) != text:
        raise UsageError(f"The filter holds a character at column {column} or soon after it that no text can hold.")
    match kind:
        case "text" | "quoted":
            quote = text[0]
            return Token(kind=kind, text=text, column=column, value=text[1:-1].replace(quote * 2, quote))
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
    return Token(kind="sign", text="=" if text == "==" else text, column=column)


def _number(text: str) -> FieldValue:
    # int() refuses thousands of digits, and a number so long is refused below either way
    number = int(text) if len(text) < 100 and text.lstrip("+-").isdigit() else float(text)
    if not -(2**63) <= number < 2**63:
        # SQLite keeps such numbers as doubles, of which one stands for a thousand neighbours
        raise UsageError(
            f"The filter compares with {text[:40]}, and numbers from 2^63 on are kept to 53 bits only, so that others "
            "would match too; store such hashes as text in the metadata."
        )
    return number


def _refuse_character(text: str, begin: int) -> NoReturn:
    cures = {
        "'": "a text lacks its closing quote; a quote inside a text is written twice",
        '"': "a name or a text lacks its closing quote; a quote inside is written twice",
    }
    cure = cures.get(text[begin], "names that hold more than letters, digits, _ and dots need double quotes")
    raise UsageError(f"The filter cannot be read at column {begin + 1}, {text[begin : begin + 20]!r}: {cure}.")


Operator = Literal["<", "<=", ">", ">="]


@dataclass(frozen=True, kw_only=True)
class Predicate:
    """A condition on one field, true of a row if one of the field's values meets it.

    column: where the field's name begins in the filter, from 1; for messages.
    """

    field: str
    column: int = attribute(default=1, compare=False)


@dataclass(frozen=True, kw_only=True)
class IsIn(Predicate):
    """A value equals one of these."""

    values: tuple[FieldValue, ...]


@dataclass(frozen=True, kw_only=True)
class Compare(Predicate):
    """A value of the same type, number or text, compares so with this one."""

    operator: Operator
    value: FieldValue


@dataclass(frozen=True, kw_only=True)
class Like(Predicate):
    """A text matches the pattern, in which % is any run of characters; A to Z match a to z."""

    pattern: str


@dataclass(frozen=True, kw_only=True)
class IsNull(Predicate):
    """There is no value."""


@dataclass(frozen=True)
class Not:
    """The rows that the condition does not select."""

    condition: "Condition"


@dataclass(frozen=True)
class And:
    """The rows that all of the conditions select."""

    conditions: tuple["Condition", ...]


@dataclass(frozen=True)
class Or:
    """The rows that any of the conditions selects."""

    conditions: tuple["Condition", ...]


Condition = IsIn | Compare | Like | IsNull | Not | And | Or


def predicates(condition: Condition) -> list[Predicate]:
    """All leaves of a condition, from left to right."""
    match condition:
        case Predicate():
            return [condition]
        case Not(inner):
            return predicates(inner)
        case And(parts) | Or(parts):
            return list(chain.from_iterable(map(predicates, parts)))


_MAX_DEPTH = 50
_OPERATORS = "one of = != < <= > >= in has like is"


def parse_filter(text: str) -> Condition:
    """The condition that a filter text expresses.

    Raises:
        UsageError: it is malformed; the column, what is there and what was expected are named.
    """
    return _Parser(tokenize_filter(text)).parse()


class _Parser:
    """Reads tokens from left to right; each method parses one rule of the grammar."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def parse(self) -> Condition:
        condition = self._parse_or()
        if self._token.text:
            self._refuse("and, or, or the end")
        return condition

    @property
    def _token(self) -> Token:
        return self._tokens[self._next]

    def _accept(self, *signs: str) -> str:
        """Consume and return the next token if it is one of these signs or keywords; else return nothing."""
        token = self._token
        if token.kind != "sign" or token.text not in signs:
            return ""
        self._next += 1
        return token.text

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
        if self._depth > _MAX_DEPTH:
            raise UsageError(f"The filter is nested more than {_MAX_DEPTH} deep at column {self._token.column}.")
        if self._accept("not"):
            condition = Not(self._parse_not())
        elif self._accept("("):
            condition = self._parse_or()
            self._expect(")")
        else:
            condition = self._parse_predicate()
        self._depth -= 1
        return condition

    def _parse_predicate(self) -> Condition:
        name = self._token
        if name.kind not in ("name", "quoted"):
            is_keyword = name.text in _KEYWORDS
            self._refuse("the name of a field" + (f', which if it is {name.text} needs "quotes"' if is_keyword else ""))
        self._next += 1
        field = str(name.value)
        column = name.column
        missing = IsNull(field=field, column=column)
        if self._accept("is"):
            is_negated = self._accept("not")
            self._expect("missing")
            return Not(missing) if is_negated else missing
        if operator := self._accept("<", "<=", ">", ">="):
            return Compare(field=field, column=column, operator=cast(Operator, operator), value=self._value())
        if self._accept("="):
            return IsIn(field=field, column=column, values=(self._value(),))
        if self._accept("!="):
            return And((Not(missing), Not(IsIn(field=field, column=column, values=(self._value(),)))))
        is_negated = self._accept("not")
        condition = self._parse_membership(field, column)
        return And((Not(missing), Not(condition))) if is_negated else condition

    def _parse_membership(self, field: str, column: int) -> Condition:
        match self._accept("has", "like", "in"):
            case "has":
                return IsIn(field=field, column=column, values=(self._value(),))
            case "like":
                if self._token.kind not in ("text", "quoted"):
                    self._refuse("a text in quotes")
                return Like(field=field, column=column, pattern=str(self._value()))
            case "in":
                self._expect("(")
                values = [self._value()]
                while self._accept(","):
                    values.append(self._value())
                self._expect(")")
                return IsIn(field=field, column=column, values=tuple(values))
        self._refuse(_OPERATORS)

    def _value(self) -> FieldValue:
        token = self._token
        if token.kind not in ("text", "quoted", "number"):
            self._refuse("a number, true, false or a text in quotes")
        if isinstance(token.value, str) and len(token.value) >= LONGEST_TEXT:
            raise UsageError(
                f"The text at column {token.column} of the filter has {len(token.value):,} characters; the catalogue "
                f"keeps the first {LONGEST_TEXT:,} of a text, so only shorter ones can be compared."
            )
        self._next += 1
        return token.value

    def _refuse(self, expected: str) -> NoReturn:
        text = self._token.text
        if not text:
            actual = "its end"
        elif text[0] in "'\"":
            actual = text[:40]
        else:
            actual = repr(text)
        raise UsageError(f"The filter, at column {self._token.column}: expected {expected}, found {actual}.")


# up to so many allowed rows become part of a query; with more, sets are intersected afterwards
_FEW_ROWS = 10_000
# the conditions of an `and` are ordered by how many metadata values they read, counted up to here
_COST_LIMIT = 20_000
_EQUAL = "value = ?"


def matching_rows(
    database: sqlite3.Connection,
    condition: Condition,
    *,
    optional_fields: Collection[str] = (),
    use_bitmaps: bool = False,
) -> BitMap:
    """The rows that a condition selects, live and deleted ones alike.

    optional_fields: may be named although no row has them, and then match none.
    use_bitmaps: read those that the database has (`vlm.index.row_bitmaps`) instead of most facts.

    Raises:
        UsageError: it names a field that no row has (but `is missing` may name one that is always null, or that only
            deleted rows had), or compares numbers with texts.
    """
    types = field_types(database)
    fields: dict[str, int] = dict(database.execute("SELECT name, id FROM fields"))
    # every row has a key, so without fields there are no rows
    if not types:
        return BitMap()
    for name in check_fields(condition, types, fields, optional_fields):
        # no field has this number, and so no value
        fields.setdefault(name, -1)
    return _Evaluator(database, fields, use_bitmaps).rows(condition)


def check_fields(
    condition: Condition,
    types: Mapping[str, tuple[FieldType, ...]],
    names: Collection[str],
    optional_fields: Collection[str] = (),
) -> list[str]:
    """The optional fields that a condition names and no row has.

    types: of the fields that have values. names: of all fields, those without a value among them.

    Raises:
        UsageError: as of `matching_rows`.
    """
    absent: list[str] = []
    for predicate in predicates(condition):
        if predicate.field in optional_fields and predicate.field not in types:
            absent.append(predicate.field)
        elif not (isinstance(predicate, IsNull) and predicate.field in names):
            _check_field(predicate, types)
    return absent


def _check_field(predicate: Predicate, types: Mapping[str, tuple[FieldType, ...]]) -> None:
    where = f"{predicate.field!r} (column {predicate.column} of the filter)"
    if predicate.field not in types:
        known = sorted(types)
        hint = suggest(predicate.field, known)
        listing = f"known: {', '.join(known)}"
        if hint != listing:
            hint = f"{hint} {listing}"
        raise UsageError(f"No row has the field {where}; {shorten(hint, 500, placeholder=' …')}")
    for value in _values(predicate):
        value_type = "text" if isinstance(value, str) else "number"
        if value_type not in types[predicate.field]:
            cure = "texts need quotes" if value_type == "number" else "numbers have no quotes"
            raise UsageError(
                f"The field {where} holds {types[predicate.field][0]}s, and {value!r} is a {value_type}; {cure}."
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
    """Evaluates conditions to sets of rows. fields: the id of each field."""

    database: sqlite3.Connection
    fields: dict[str, int]
    use_bitmaps: bool

    def rows(self, condition: Condition, allowed_rows: BitMap | None = None) -> BitMap:
        """The rows selected, or those of them in `allowed_rows`."""
        match condition:
            case Not(IsNull() as predicate):
                return self._rows_with_field(predicate.field, allowed_rows)
            case Not(inner):
                # rows without the field are included, as the complement of all rows
                everything = self._rows_with_field(KEY, None) if allowed_rows is None else allowed_rows
                return everything - self.rows(inner, allowed_rows)
            case IsNull():
                # the complement of the rows that have the field; `Not(IsNull)` itself is a single query
                return self.rows(Not(Not(condition)), allowed_rows)
            case And(parts):
                # the cheapest first, so that the others are asked about few rows
                for part in sorted(parts, key=self._estimated_cost):
                    allowed_rows = self.rows(part, allowed_rows)
                    if not allowed_rows:
                        break
                return self._rows_with_field(KEY, None) if allowed_rows is None else allowed_rows
            case Or(parts):
                return BitMap().union(*(self.rows(part, allowed_rows) for part in parts))
        if self.use_bitmaps:
            rows = self._rows_by_bitmaps(condition, allowed_rows)
            return rows if allowed_rows is None else rows & allowed_rows
        return self._rows_by_facts(condition.field, *_predicate_sql(condition), allowed_rows)

    def _rows_with_field(self, field: str, allowed_rows: BitMap | None) -> BitMap:
        if not self.use_bitmaps:
            return self._rows_by_facts(field, "TRUE", (), allowed_rows)
        stored = self._query("SELECT rows FROM bitmaps WHERE field = ?", self.fields[field])
        rows = BitMap().union(*(read_bitmap(span) for (span,) in stored))
        return rows if allowed_rows is None else rows & allowed_rows

    def _rows_by_bitmaps(self, predicate: IsIn | Compare | Like, allowed_rows: BitMap | None) -> BitMap:
        """The rows of the spans that are selected whole, and those that the facts of other spans select."""
        if _is_scan(predicate):
            # without frequent values each fact is read, which a single statement does in less time
            query = "SELECT 1 FROM bitmaps WHERE field = ? AND low = high LIMIT 1"
            if not self._query(query, self.fields[predicate.field]):
                return self._rows_by_facts(predicate.field, *_predicate_sql(predicate), allowed_rows)
        elif isinstance(predicate, IsIn):
            return self._rows_with_values(predicate, allowed_rows)
        # the + leaves the index to the bounds of the span: SQLite would use the first bound that it meets
        sql, values = _predicate_sql(predicate, "+value")
        bitmaps: list[BitMap] = []
        # one statement, as a writer may divide a span between two; facts of rows that this version sees are never
        # removed, so they may be read after it
        for low, high, stored in self._selected_spans(predicate):
            if stored is not None:
                bitmaps.append(read_bitmap(stored))
            else:
                within = f"{sql} AND value >= ? AND value <= ?"
                bitmaps.append(self._rows_by_facts(predicate.field, within, (*values, low, high), None))
        return BitMap().union(*bitmaps)

    def _selected_spans(self, predicate: IsIn | Compare | Like) -> list[tuple[FieldValue, FieldValue, bytes | None]]:
        """The least and greatest value of each span that may hold a selected value; its bitmap if all are."""
        at_low, values = _predicate_sql(predicate, "low")
        at_high, _ = _predicate_sql(predicate, "high")
        if _is_scan(predicate):
            # what sorts otherwise than it is compared is sure only of a single value
            is_whole, is_possible = f"low = high AND {at_low}", f"(low < high OR {at_low})"
            parameters = values
        else:
            # true from some value on or up to one: of a span of which both ends are selected, all is
            is_whole, is_possible = f"{at_low} AND {at_high}", f"({at_low} OR {at_high})"
            parameters = values * 2
        query = f"SELECT low, high, CASE WHEN {is_whole} THEN rows END FROM bitmaps WHERE {is_possible} AND field = ?"
        return self._query(query, *parameters, *parameters, self.fields[predicate.field])

    def _rows_with_values(self, predicate: IsIn, allowed_rows: BitMap | None) -> BitMap:
        at_low, values = _predicate_sql(predicate, "low")
        query = f"SELECT low, rows FROM bitmaps WHERE field = ? AND low = high AND {at_low}"
        bitmaps: list[BitMap] = []
        frequent: set[FieldValue] = set()
        for low, stored in self._query(query, self.fields[predicate.field], *values):
            frequent.add(low)
            bitmaps.append(read_bitmap(stored))
        # of the others there are at most some 16,000 facts, which the primary key finds
        if rare := tuple(value for value in values if value not in frequent):
            sql, _ = _predicate_sql(IsIn(field=predicate.field, values=rare))
            bitmaps.append(self._rows_by_facts(predicate.field, sql, rare, allowed_rows))
        return BitMap().union(*bitmaps)

    def _rows_by_facts(
        self, field: str, predicate_sql: str, values: tuple[FieldValue, ...], allowed_rows: BitMap | None
    ) -> BitMap:
        sql = f"SELECT row FROM facts WHERE field = ? AND {predicate_sql}"
        parameters = (self.fields[field], *values)
        if allowed_rows is not None and len(allowed_rows) <= _FEW_ROWS:
            # for one value the primary key finds each allowed row; for a range it would be read again for each of
            # them, so the + takes this index away from SQLite
            row = "row" if predicate_sql == _EQUAL else "+row"
            sql += f" AND {row} IN (SELECT value FROM json_each(?))"
            parameters = (*parameters, json.dumps(row_ids(allowed_rows).tolist()))
        self._define_functions(sql)
        rows = fetch_bitmap(self.database, sql, *parameters)
        return rows if allowed_rows is None else rows & allowed_rows

    def _query(self, sql: str, *parameters: FieldValue) -> list[Any]:
        self._define_functions(sql)
        return plain_cursor(self.database).execute(sql, parameters).fetchall()

    def _define_functions(self, sql: str) -> None:
        if "instant(" in sql:
            self.database.create_function("instant", 1, instant_of, deterministic=True)

    def _estimated_cost(self, condition: Condition) -> int:
        """About how many metadata values a condition reads, counted only as far as that is cheap."""
        match condition:
            case IsIn() | Compare() | Like() if _is_scan(condition):
                return _COST_LIMIT
            case And(parts):
                return min(map(self._estimated_cost, parts))
            case Or(parts):
                return sum(map(self._estimated_cost, parts))
            case Not(inner) if self.use_bitmaps:
                # after what is selected, of which it is a part: the complement of all rows costs more
                return max(1, self._estimated_cost(inner))
            case IsIn() | Compare() | IsNull() if self.use_bitmaps:
                return 0
            case Not() | IsNull():
                # these read all values of a field, or all rows
                return _COST_LIMIT
        predicate_sql, values = _predicate_sql(condition)
        sql = f"SELECT count(*) FROM (SELECT 1 FROM facts WHERE field = ? AND {predicate_sql} LIMIT {_COST_LIMIT})"
        return self.database.execute(sql, (self.fields[condition.field], *values)).fetchone()[0]


def _is_scan(predicate: IsIn | Compare | Like) -> bool:
    """Whether a predicate reads all values of its field, as texts do not sort as it compares them."""
    return isinstance(predicate, Like) or bool(times_with_zone(predicate))


def times_with_zone(predicate: Predicate) -> tuple[str, ...]:
    """Those of its values that are times with a zone, which are compared as instants."""
    if isinstance(predicate, Like):
        return ()
    return tuple(value for value in _values(predicate) if isinstance(value, str) and has_zone(value))


def _marks(values: Sequence[FieldValue]) -> str:
    return ", ".join("?" * len(values))


def _predicate_sql(predicate: IsIn | Compare | Like, column: str = "value") -> tuple[str, tuple[FieldValue, ...]]:
    """The predicate on a metadata value in SQL, and the values of its parameters. column: that has the value."""
    instants = times_with_zone(predicate)
    # SQLite sorts numbers before texts
    is_text = f"{column} >= ''"
    match predicate:
        case IsIn(values=values) if instants:
            others = tuple(value for value in values if value not in instants)
            marks = f"instant({column}) IN ({_marks(instants)})"
            if others:
                marks = f"({marks} OR {column} IN ({_marks(others)}))"
            return marks, (*map(str, map(instant_of, instants)), *others)
        case Compare(operator=operator) if instants:
            return f"instant({column}) {operator} ? AND {is_text}", (str(instant_of(instants[0])),)
        case IsIn(values=values):
            return (f"{column} = ?" if len(values) == 1 else f"{column} IN ({_marks(values)})"), values
        case Compare(operator=operator, value=value):
            of_its_type = is_text if isinstance(value, str) else f"{column} < ''"
            return f"{column} {operator} ? AND {of_its_type}", (value,)
        case Like(pattern=pattern):
            # _ is a wildcard of SQL, but not of the filter language
            escaped = pattern.replace("\\", "\\\\").replace("_", "\\_")
            return f"{column} LIKE ? ESCAPE '\\' AND {is_text}", (escaped,)
