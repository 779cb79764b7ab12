"""Pairs listed in a table: a column with names of pictures, one with captions, the rest metadata."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from vlm.config import nearest
from vlm.data.samples import Captions, Pair, captions_of
from vlm.data.sources.files import SourceFiles
from vlm.data.sources.table_rows import TABLE_KINDS, Rows, ending_of, read_rows
from vlm.errors import BadSample, UsageError
from vlm.files import fingerprint_of

IMAGE_COLUMNS = (
    "image",
    "file",
    "path",
    "filename",
    "file_name",
    "image_path",
    "filepath",
    "image_file",
    "img",
    "picture",
)
CAPTION_COLUMNS = ("captions", "caption", "title", "text", "name", "description", "alt", "names", "label")
KEY_COLUMN = "key"
_LANGUAGE_COLUMN = re.compile(r"captions_\w+")


class TableSource:
    """Rows of a table with the pictures they name.

    Rows naming the same picture are one pair with the captions of all of them and the metadata of the first.
    A caption may be a text, a list, or either by language; columns `captions_LANGUAGE` add to it.
    """

    captions_are_labels = False

    def __init__(
        self, files: SourceFiles, table: str, *, image_column: str | None = None, caption_column: str | None = None
    ) -> None:
        self._files, self._table = files, table
        data = files.read(table)
        self._rows = read_rows(data, name=table)
        self._image_column = _choose_column(self._rows, image_column, IMAGE_COLUMNS, table, what="image")
        self._caption_column = _choose_column(self._rows, caption_column, CAPTION_COLUMNS, table, what="caption")
        names = self._rows.column(self._image_column)
        self._groups = _rows_by_picture(names)
        given = self._rows.column(KEY_COLUMN) if KEY_COLUMN in self._rows.columns else [None] * len(names)
        self._keys = unique_keys([(given[rows[0]], names[rows[0]]) for rows in self._groups])
        self._identity = fingerprint_of(data, files.fingerprint(), self._image_column, self._caption_column)

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, number: int) -> Pair:
        """The picture a row names, with the captions of all rows that name it."""
        numbers = self._groups[number]
        rows = [self._rows[row] for row in numbers]
        name = rows[0].get(self._image_column)
        if not isinstance(name, str | int):
            raise BadSample("no picture named", f"row {numbers[0] + 1} has no text in {self._image_column!r}")
        captions = _merge(self._captions(row) for row in rows)
        if not captions:
            raise BadSample("no caption", f"row {numbers[0] + 1} has no text in {self._caption_column!r}")
        key = self._keys[number]
        metadata = {
            column: value
            for column, value in rows[0].items()
            if column != self._caption_column
            and not _LANGUAGE_COLUMN.fullmatch(column)
            and (column, str(value)) != (KEY_COLUMN, key)
        }
        return Pair(key=key, image=self._files.read(str(name)), captions=captions, metadata=metadata)

    def fingerprint(self) -> str:
        """The table, the columns chosen, and the names and sizes of all files."""
        return self._identity

    def describe(self) -> dict[str, Any]:
        """The table and the columns chosen."""
        return {
            "kind": "table",
            "address": self._files.address,
            "table": self._table,
            "rows": len(self._rows),
            "image_column": self._image_column,
            "caption_column": self._caption_column,
        }

    def _captions(self, row: dict[str, Any]) -> Captions:
        value = row.get(self._caption_column)
        in_languages = {name: given for name, given in row.items() if _LANGUAGE_COLUMN.fullmatch(name)}
        return captions_of(None, in_languages | {"captions": str(value) if isinstance(value, int | float) else value})


def find_table(names: Sequence[str]) -> str | None:
    """The table at the top of a source: `captions.*`, or the only one there.

    Raises:
        UsageError: there are several and none is called captions.
    """
    tables = [name for name in names if "/" not in name and ending_of(name) in TABLE_KINDS]
    preferred = [name for name in tables if PurePosixPath(name).stem == "captions"] or tables
    if len(preferred) > 1:
        raise UsageError(f"Several tables: {', '.join(preferred)}; name the one to read as the source itself.")
    return preferred[0] if preferred else None


def unique_keys(wishes: Sequence[tuple[Any, Any]]) -> list[str]:
    """Keys from (given key, name of the picture): the key, else the stem of the name, else number in the table.

    Dots become underscores, for a WebDataset key ends at its first dot. Stems that occur twice get the names of
    their folders in front; what is still not unique gets a number behind.

    >>> unique_keys([(None, "a/1.jpg"), (None, "b/1.jpg"), ("x.y", "c.jpg"), (None, "c.d.jpg")])
    ['a-1', 'b-1', 'x_y', 'c_d']
    """
    stems = Counter(PurePosixPath(str(name)).stem for given, name in wishes if given is None and name is not None)
    keys: list[str] = []
    taken: set[str] = set()
    for number, (given, name) in enumerate(wishes):
        path = PurePosixPath(str(name))
        if given is not None:
            wish = str(given)
        elif name is None:
            wish = f"row-{number + 1}"
        else:
            wish = path.stem if stems[path.stem] == 1 else str(path.with_suffix(""))
        key = base = re.sub(r"[\x00-\x1f/\\]+", "-", wish.strip().strip("/")).replace(".", "_") or f"row-{number + 1}"
        attempt = 1
        while key in taken:
            attempt += 1
            key = f"{base}-{attempt}"
        taken.add(key)
        keys.append(key)
    return keys


def _choose_column(rows: Rows, wish: str | None, known: Sequence[str], table: str, *, what: str) -> str:
    """The column asked for, else the first of the known names, whatever their case."""
    columns = [str(column) for column in rows.columns]
    if wish is not None:
        if wish not in columns:
            raise UsageError(
                f"{table} has no column {wish!r}; {nearest(wish, columns)} (columns: {', '.join(columns)})."
            )
        return wish
    by_name = {column.casefold(): column for column in reversed(columns)}
    for name in known:
        if name in by_name:
            return by_name[name]
    likeness = {column: max(_likeness(column, name) for name in known) for column in columns}
    closest = max(columns, key=lambda column: likeness[column], default="")
    is_close = bool(closest) and likeness[closest] > 0.7
    hint = f"perhaps {closest!r} is meant" if is_close else f"it was looked for as {', '.join(known)}"
    found = ", ".join(columns) or "none"
    raise UsageError(f"{table} has no {what} column: {hint}; name it with --{what}-column. Its columns: {found}.")


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.casefold(), other).ratio()


def _rows_by_picture(names: Sequence[Any]) -> list[tuple[int, ...]]:
    """The rows of each picture, in the order of its first row; rows that name none stay alone."""
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        picture = json.dumps([row]) if name is None else str(name)
        groups.setdefault(picture, []).append(row)
    return [tuple(rows) for rows in groups.values()]


def _merge(parts: Iterator[Captions]) -> Captions:
    """All captions by language, each once."""
    merged: dict[str, dict[str, None]] = {}
    for captions in parts:
        for language, texts in captions.items():
            merged.setdefault(language, {}).update(dict.fromkeys(texts))
    return {language: tuple(texts) for language, texts in merged.items()}
