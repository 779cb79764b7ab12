"""Facts: the metadata of each row as typed columns of the catalogue, by which a filter chooses rows.

A fact is a field, a value and a row. Names inside names are joined by dots (`exif.width`), a list gives a fact for each
of its values, and so may a row have several values of one field. Beside the metadata every row has the fields `key`,
`language` (of its captions) and `caption`; `tags` may be a list or words separated by commas. A value is a number or a
text; true and false are the numbers 1 and 0.

Left out: null (the name of the field is kept), NaN, lists of more than 32 numbers (vectors are no facts), what lies
more than 8 names deep, and `captions`, `captions_NAME` and `caption_weights`, which `caption` holds. Texts are kept
up to 1,000 characters.
"""

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from vlm.data.samples import parse_tags
from vlm.index.embeddings import Origin

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
"""`value` has no type of its own: SQLite keeps numbers and texts as they are and sorts the numbers before the texts."""

_LONGEST_VECTOR = 32
_DEEPEST = 8
_FROM_CAPTIONS = ("captions", "caption_weights")


def insert_metadata_fields(database: sqlite3.Connection, rows: Sequence[tuple[int, Origin]]) -> None:
    """Add the facts of rows, given as row number and origin; nothing is committed.

    Metadata that is null gives no fact, but its name is known: a filter may say that it is missing.
    """
    columns: defaultdict[tuple[str, bool], list[tuple[FieldValue, int]]] = defaultdict(list)
    empty: set[str] = set()
    for row, origin in rows:
        empty |= {sanitize_text(name) for name, value in origin.metadata.items() if value is None and _is_field(name)}
        for name, value in metadata_fields(origin):
            columns[name, isinstance(value, str)].append((value, row))
    names = sorted({name for name, _ in columns} | empty)
    database.executemany("INSERT OR IGNORE INTO fields(name) VALUES (?)", [(name,) for name in names])
    numbers: dict[str, int] = dict(database.execute("SELECT name, id FROM fields"))
    # in the order of the table, so that neighbours are written together
    for name, is_text in sorted(columns, key=lambda column: (numbers[column[0]], column[1])):
        field, values = numbers[name], sorted(columns[name, is_text])
        facts = ((field, value, row) for value, row in values)
        database.executemany("INSERT OR IGNORE INTO facts VALUES (?, ?, ?)", facts)


def field_types(database: sqlite3.Connection) -> dict[str, tuple[FieldType, ...]]:
    """The fields that have values, by name, and whether these are numbers, texts or both; reads a few pages."""
    found: dict[str, tuple[FieldType, ...]] = {}
    for number, name in database.execute("SELECT id, name FROM fields ORDER BY name").fetchall():
        has_number, has_text = database.execute(
            "SELECT EXISTS (SELECT 1 FROM facts WHERE field = ?1 AND value < ''),"
            " EXISTS (SELECT 1 FROM facts WHERE field = ?1 AND value >= '')",
            (number,),
        ).fetchone()
        if has_number or has_text:
            found[name] = (*(("number",) if has_number else ()), *(("text",) if has_text else ()))
    return found


def metadata_fields(origin: Origin) -> Iterator[tuple[str, FieldValue]]:
    """Each field and value of a row; the same may come twice.

    >>> from vlm.index.embeddings import Origin
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
        if _is_field(name):
            yield from _flattened(sanitize_text(name), value, 1)


def _is_field(name: str) -> bool:
    return name not in _FROM_CAPTIONS and not name.startswith("captions_")


def sanitize_text(text: str) -> str:
    """The text with a replacement mark for what SQLite cannot compare: NUL and halves of surrogate pairs."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _flattened(name: str, value: Any, depth: int) -> Iterator[tuple[str, FieldValue]]:
    if isinstance(value, str):
        yield name, sanitize_text(value)[:LONGEST_TEXT]
    elif isinstance(value, int) or (isinstance(value, float) and not math.isnan(value)):
        # the sign makes numbers of true and false
        yield name, to_sqlite_number(+value)
    elif isinstance(value, dict) and depth <= _DEEPEST:
        for inner, content in value.items():
            yield from _flattened(f"{name}.{sanitize_text(inner)}", content, depth + 1)
    elif isinstance(value, list | tuple) and depth <= _DEEPEST:
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
