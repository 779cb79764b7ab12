"""Pairs listed in a table: a column with names of pictures, one with captions, the rest metadata.

The rows of a CSV, TSV, JSONL or Parquet table, by number and by column.
"""

import csv
import difflib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, Protocol, cast, runtime_checkable

import pyarrow as pa

from vlm.config import suggest
from vlm.data.samples import Captions, Pair, parse_captions
from vlm.data.sources.source import SourceFiles
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import compute_fingerprint

_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


@runtime_checkable
class Rows(Protocol):
    """A table: the names of its columns, in order, and its rows."""

    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Row `number` as plain values; what is empty is left out.

        Raises:
            BadSample: it cannot be read.
        """
        ...

    def column(self, name: str) -> list[Any]:
        """One column; None where a row lacks it or cannot be read."""
        ...


class ArrowRows:
    """Rows of a CSV or Parquet table."""

    def __init__(self, table: pa.Table) -> None:
        self.columns = tuple(table.column_names)
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        values = {name: plain_value(self._table.column(name)[number].as_py()) for name in self.columns}
        return {name: value for name, value in values.items() if value not in (None, "")}

    def column(self, name: str) -> list[Any]:
        """One column as Python values."""
        return self._table.column(name).to_pylist()


class JsonRows:
    """Rows of a JSONL table: kept as text, parsed when asked for. A line that is not an object is a bad row."""

    def __init__(self, data: bytes) -> None:
        self._lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        names: dict[str, None] = {}
        for row in self._readable():
            names |= dict.fromkeys(row or {})
        self.columns = tuple(names)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            row = json.loads(self._lines[number])
        except ValueError as error:
            raise BadSample("unreadable row", f"row {number + 1} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadSample("unreadable row", f"row {number + 1} is {type(row).__name__}, not an object")
        values = {name: plain_value(value) for name, value in row.items()}
        return {name: value for name, value in values.items() if value not in (None, "")}

    def column(self, name: str) -> list[Any]:
        """One value of every line."""
        return [None if row is None else row.get(name) for row in self._readable()]

    def _readable(self) -> Iterable[dict[str, Any] | None]:
        for number in range(len(self)):
            try:
                yield self[number]
            except BadSample:
                yield None


def read_rows(data: bytes, *, name: str) -> Rows:
    """The rows of a table whose kind is told by the ending of its name (see TABLE_KINDS).

    A CSV column becomes numbers only if each of its values is one in plain digits: 2011 or -0.5, but not 007, 1e5
    or 1,000. JSONL and Parquet keep their own types.

    Raises:
        VlmError: it cannot be read.
    """
    try:
        return TABLE_KINDS[file_extension(name)](data)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, csv.Error, OSError) as error:
        raise VlmError(f"{name} cannot be read as a table: {error}. It must be whole, and in UTF-8 if text.") from error


def file_extension(name: str) -> str:
    """The ending of a file name in lower case, without the dot."""
    return name.rpartition(".")[2].lower()


def plain_value(value: Any) -> Any:
    """A value as JSON can hold it: dates as ISO text, decimals as floats, bytes and NaN as nothing."""
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    is_no_json = isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value))
    return None if is_no_json else value


def _read_csv(data: bytes, *, delimiter: str) -> Rows:
    from pyarrow import csv as arrow_csv

    names = next(csv.reader(io.StringIO(data[: 1 << 16].decode("utf-8-sig", errors="ignore")), delimiter=delimiter), [])
    if not names or len(set(names)) < len(names):
        raise VlmError(f"The first line must name the columns, each once; it holds {names}.")
    table = arrow_csv.read_csv(
        io.BytesIO(data),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    return ArrowRows(pa.table([_as_numbers(column) for column in table.columns], names=table.column_names))


def _as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """The column as integers or floats if each of its values is one; itself otherwise."""
    texts = cast(list[str], column.to_pylist())
    for form, number, kind in ((_INTEGER, int, pa.int64()), (_DECIMAL, float, pa.float64())):
        if any(texts) and all(form.fullmatch(text) for text in texts if text):
            return pa.array([number(text) if text else None for text in texts], kind)
    return column


def _read_parquet(data: bytes) -> Rows:
    from pyarrow import parquet

    return ArrowRows(parquet.read_table(pa.BufferReader(data)))


TABLE_KINDS: dict[str, Callable[[bytes], Rows]] = {
    "csv": lambda data: _read_csv(data, delimiter=","),
    "tsv": lambda data: _read_csv(data, delimiter="\t"),
    "jsonl": JsonRows,
    "parquet": _read_parquet,
}
"""Readers of tables by the ending of the file name."""


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
        self._groups = _rows_by_image(names)
        raw = self._rows.column(KEY_COLUMN) if KEY_COLUMN in self._rows.columns else [None] * len(names)
        self._keys = unique_keys([(raw[rows[0]], names[rows[0]]) for rows in self._groups])
        self._identity = compute_fingerprint(data, files.fingerprint(), self._image_column, self._caption_column)

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
            "address": self._files.url,
            "table": self._table,
            "rows": len(self._rows),
            "image_column": self._image_column,
            "caption_column": self._caption_column,
        }

    def _captions(self, row: dict[str, Any]) -> Captions:
        value = row.get(self._caption_column)
        in_languages = {name: raw for name, raw in row.items() if _LANGUAGE_COLUMN.fullmatch(name)}
        return parse_captions(
            None, in_languages | {"captions": str(value) if isinstance(value, int | float) else value}
        )


def find_table(names: Sequence[str]) -> str | None:
    """The table at the top of a source: `captions.*`, or the only one there.

    Raises:
        UsageError: there are several and none is called captions.
    """
    tables = [name for name in names if "/" not in name and file_extension(name) in TABLE_KINDS]
    preferred = [name for name in tables if PurePosixPath(name).stem == "captions"] or tables
    if len(preferred) > 1:
        raise UsageError(f"Several tables: {', '.join(preferred)}; name the one to read as the source itself.")
    return preferred[0] if preferred else None


def unique_keys(preferences: Sequence[tuple[Any, Any]]) -> list[str]:
    """Keys from (given key, name of the picture): the key, else the stem of the name, else number in the table.

    Dots become underscores, for a WebDataset key ends at its first dot. Stems that occur twice get the names of
    their folders in front; what is still not unique gets a number behind.

    >>> unique_keys([(None, "a/1.jpg"), (None, "b/1.jpg"), ("x.y", "c.jpg"), (None, "c.d.jpg")])
    ['a-1', 'b-1', 'x_y', 'c_d']
    """
    stems = Counter(PurePosixPath(str(name)).stem for raw, name in preferences if raw is None and name is not None)
    keys: list[str] = []
    taken: set[str] = set()
    for number, (raw, name) in enumerate(preferences):
        path = PurePosixPath(str(name))
        if raw is not None:
            preferred = str(raw)
        elif name is None:
            preferred = f"row-{number + 1}"
        else:
            preferred = path.stem if stems[path.stem] == 1 else str(path.with_suffix(""))
        key = base = (
            re.sub(r"[\x00-\x1f/\\]+", "-", preferred.strip().strip("/")).replace(".", "_") or f"row-{number + 1}"
        )
        attempt = 1
        while key in taken:
            attempt += 1
            key = f"{base}-{attempt}"
        taken.add(key)
        keys.append(key)
    return keys


def _choose_column(rows: Rows, preferred: str | None, known: Sequence[str], table: str, *, what: str) -> str:
    """The column asked for, else the first of the known names, whatever their case."""
    columns = [str(column) for column in rows.columns]
    if preferred is not None:
        if preferred not in columns:
            raise UsageError(
                f"{table} has no column {preferred!r}; {suggest(preferred, columns)} (columns: {', '.join(columns)})."
            )
        return preferred
    by_name = {column.casefold(): column for column in reversed(columns)}
    for name in known:
        if name in by_name:
            return by_name[name]
    likeness = {column: max(_name_similarity(column, name) for name in known) for column in columns}
    closest = max(columns, key=lambda column: likeness[column], default="")
    is_close = bool(closest) and likeness[closest] > 0.7
    hint = f"perhaps {closest!r} is meant" if is_close else f"it was looked for as {', '.join(known)}"
    found = ", ".join(columns) or "none"
    raise UsageError(f"{table} has no {what} column: {hint}; name it with --{what}-column. Its columns: {found}.")


def _name_similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.casefold(), other).ratio()


def _rows_by_image(names: Sequence[Any]) -> list[tuple[int, ...]]:
    """The rows of each picture, in the order of its first row; rows that name none stay alone."""
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        image = json.dumps([row]) if name is None else str(name)
        groups.setdefault(image, []).append(row)
    return [tuple(rows) for rows in groups.values()]


def _merge(parts: Iterator[Captions]) -> Captions:
    """All captions by language, each once."""
    merged: dict[str, dict[str, None]] = {}
    for captions in parts:
        for language, texts in captions.items():
            merged.setdefault(language, {}).update(dict.fromkeys(texts))
    return {language: tuple(texts) for language, texts in merged.items()}
