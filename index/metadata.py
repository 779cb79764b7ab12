"""Metadata fields: the metadata of each row as typed columns of the catalogue, by which filters select rows.

A table holds field, value and row. Names inside names are joined by dots (`exif.width`); a list gives one value for
each item, so a row may have several values of a field. In addition to its metadata every row has the fields `key`,
`language` (of its captions) and `caption`; `tags` may be a list or words separated by commas. A value is a number or a
text; true and false are the numbers 1 and 0.

Left out: null (but the field's name is known), NaN, lists of more than 32 numbers (these are vectors), what is nested
more than 8 deep, and `captions`, `captions_NAME` and `caption_weights`, which `caption` covers. Texts are stored up to
1,000 characters.
"""

import json
import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from vlm.data.samples import parse_tags
from vlm.errors import UsageError
from vlm.index.embeddings_folder import Origin

FieldType = Literal["number", "text"]
FieldValue = int | float | str

LONGEST_TEXT = 1000
KEY = "key"
SCHEMA = """
CREATE TABLE fields (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE facts (
    field INTEGER NOT NULL REFERENCES fields(id),
    value NOT NULL,
    row INTEGER NOT NULL,
    PRIMARY KEY (field, value, row)
) WITHOUT ROWID;
"""
"""`value` is declared without a type: SQLite stores numbers and texts unchanged and sorts numbers before texts."""

_LONGEST_VECTOR = 32
_DEEPEST = 8
_FROM_CAPTIONS = ("captions", "caption_weights")


def insert_metadata_fields(
    database: sqlite3.Connection, rows: Sequence[tuple[int, Origin]]
) -> list[tuple[str, FieldValue, int]]:
    """Insert the metadata of numbered rows as (field, value, row) triples, and return these; nothing is committed.

    Null has no value here, but its field's name is stored, so that a filter may ask whether it is missing.
    """
    empty_fields: set[str] = set()
    values: list[tuple[str, FieldValue, int]] = []
    for row, origin in rows:
        for name, value in origin.metadata.items():
            if value is None and is_field(name):
                empty_fields.add(sanitize_text(name))
        for name, value in metadata_fields(origin):
            values.append((name, value, row))
    insert_field_values(database, values, empty_fields=empty_fields)
    return values


def insert_field_values(
    database: sqlite3.Connection, triples: Iterable[tuple[str, FieldValue, int]], *, empty_fields: Iterable[str] = ()
) -> None:
    """Insert (field, value, row) triples, and the names of fields that have no value; nothing is committed."""
    # by field and whether the values are texts
    columns: defaultdict[tuple[str, bool], list[tuple[FieldValue, int]]] = defaultdict(list)
    for name, value, row in triples:
        columns[name, isinstance(value, str)].append((value, row))
    names = {name for name, _ in columns}.union(empty_fields)
    database.executemany("INSERT OR IGNORE INTO fields(name) VALUES (?)", [(name,) for name in sorted(names)])
    ids: dict[str, int] = dict(database.execute("SELECT name, id FROM fields"))
    # in the order of the primary key, so that neighbours are written together
    for name, is_text in sorted(columns, key=lambda column: (ids[column[0]], column[1])):
        values = [(ids[name], value, row) for value, row in sorted(columns[name, is_text])]
        database.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?, ?)", values)


def field_types(database: sqlite3.Connection) -> dict[str, tuple[FieldType, ...]]:
    """The fields that have values, by name, and whether these are numbers, texts or both; reads a few pages."""
    types: dict[str, tuple[FieldType, ...]] = {}
    for number, name in database.execute("SELECT id, name FROM fields ORDER BY name").fetchall():
        # SQLite sorts every number before '', and '' before every other text
        has_number, has_text = database.execute(
            "SELECT EXISTS (SELECT 1 FROM facts WHERE field = ?1 AND value < ''),"
            " EXISTS (SELECT 1 FROM facts WHERE field = ?1 AND value >= '')",
            (number,),
        ).fetchone()
        if has_number and has_text:
            types[name] = ("number", "text")
        elif has_number or has_text:
            types[name] = ("number",) if has_number else ("text",)
    return types


def metadata_fields(origin: Origin) -> Iterator[tuple[str, FieldValue]]:
    """Each field and value of a row; a pair may occur twice.

    >>> from vlm.index.embeddings_folder import Origin
    >>> origin = Origin(uid="u", key="u", shard="s", number=0, image_offset=0, image_size=0, caption_number=None,
    ...                 captions={"en": ("a dog",)}, metadata={"size": {"width": 640}, "tags": "dog, wet"})
    >>> sorted(metadata_fields(origin))
    [('caption', 'a dog'), ('key', 'u'), ('language', 'en'), ('size.width', 640), ('tags', 'dog'), ('tags', 'wet')]
    """
    yield KEY, sanitize_text(origin.key)[:LONGEST_TEXT]
    for language, texts in origin.captions.items():
        if language:
            yield "language", sanitize_text(language)[:LONGEST_TEXT]
        for text in texts:
            yield "caption", sanitize_text(text)[:LONGEST_TEXT]
    for name, value in origin.metadata.items():
        if name == "tags" and isinstance(value, str):
            value = parse_tags(origin.metadata)
        if is_field(name):
            yield from _flattened(sanitize_text(name), value, 1)


def is_field(name: str) -> bool:
    """Whether metadata of this name is a field; names of captions are none, as the field `caption` has these."""
    return name not in _FROM_CAPTIONS and not name.startswith("captions_")


def check_json(values: Any, what: str) -> None:
    """Refuse metadata that is no mapping of names to plain values.

    Raises:
        UsageError: it is not; what: whose metadata it is.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"The metadata of {what} is {values!r}, not a mapping: give names and values.")
    for name, value in values.items():
        try:
            json.dumps(value)
            is_plain = isinstance(name, str)
        except (TypeError, ValueError, RecursionError):
            is_plain = False
        if not is_plain:
            raise UsageError(
                f"The metadata of {what} has {name!r} = {value!r}, which is no JSON: names are texts, and values "
                "texts, numbers, true, false, or lists and mappings of these."
            )


def metadata_lines(values: Any) -> list[Mapping[str, Any]]:
    """New values by uid, or one mapping a row, as the lines of a table.

    Raises:
        UsageError: they are neither, or a value is not one that JSON has.
    """
    if not isinstance(values, Iterable):
        raise UsageError(f"values = {values!r}: give a table, new values by uid, or a mapping for each row.")
    lines: list[Mapping[str, Any]] = []
    if isinstance(values, Mapping):
        for uid, fields in values.items():
            check_json(fields, f"{uid!r}")
            lines.append({"uid": uid, **fields})
    else:
        for number, line in enumerate(values, 1):
            check_json(line, f"row {number}")
            lines.append(line)
    return lines


def sanitize_text(text: str) -> str:
    """The text with a replacement character for what SQLite cannot compare: NUL and halves of surrogate pairs."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _flattened(name: str, value: Any, depth: int) -> Iterator[tuple[str, FieldValue]]:
    if isinstance(value, str):
        yield name, sanitize_text(value)[:LONGEST_TEXT]
    elif isinstance(value, int) or (isinstance(value, float) and not math.isnan(value)):
        # the plus sign turns true and false into numbers
        yield name, to_sqlite_number(+value)
    elif isinstance(value, dict) and depth <= _DEEPEST:
        for inner, content in value.items():
            yield from _flattened(f"{name}.{sanitize_text(inner)}", content, depth + 1)
    elif isinstance(value, list | tuple) and depth <= _DEEPEST:
        # a long list of numbers is a vector, by whose items nobody filters
        numbers = sum(isinstance(content, int | float) for content in value)
        for content in value if numbers <= _LONGEST_VECTOR else ():
            yield from _flattened(name, content, depth + 1)


def to_sqlite_number(value: int | float) -> int | float:
    """The number as SQLite can hold it: whole numbers beyond 64 bits as the nearest of double precision.

    >>> to_sqlite_number(7), to_sqlite_number(2**70), to_sqlite_number(-(10**400))
    (7, 1.1805916207174113e+21, -inf)
    """
    if isinstance(value, float) or -(2**63) <= value < 2**63:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
