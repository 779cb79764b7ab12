"""The rows of a table, by number and by column: delimited text, JSON, Parquet.

A row that cannot be read is a bad row of its own; it never takes a neighbour with it, and no whole number goes through
a float.
"""

import codecs
import csv
import io
import json
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol, runtime_checkable

import pyarrow as pa

from vlm.data.sources.image_names import is_image_name, is_web_address
from vlm.data.sources.plain_values import exact_value, plain_value
from vlm.errors import BadSample, VlmError

_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
_LINE_END = re.compile(r"\r\n|\n|\r")
_DELIMITERS = ",\t;|"
# what a line of a file must not exceed; csv's own limit is shorter than long captions
_MAX_CELL = 1 << 27
# lines that one quoted cell may reach over where quotes of a table are not sound
_MAX_CELL_LINES = 50
_NUMBERED_IMAGE = re.compile(r"(.+\.\w{3,4})#\d+")


@runtime_checkable
class Rows(Protocol):
    """A table: the names of its columns, in order, and its rows.

    class_names: of columns that hold the number of a class, the name of each. embedded: columns that hold images.
    """

    columns: tuple[str, ...]
    class_names: dict[str, list[str]]
    embedded: frozenset[str]

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

    def image(self, number: int, column: str) -> bytes | None:
        """The image that lies in the table itself, if one does."""
        ...


class ArrowRows:
    """Rows of a delimited text, with the lines that could not be read by number."""

    def __init__(self, table: pa.Table, unreadable: dict[int, str] | None = None) -> None:
        self.columns = tuple(table.column_names)
        self.class_names: dict[str, list[str]] = {}
        self.embedded: frozenset[str] = frozenset()
        self._table = table
        self._unreadable = unreadable or {}

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number in self._unreadable:
            raise BadSample("unreadable row", self._unreadable[number])
        values = {name: self._table.column(name)[number].as_py() for name in self.columns}
        return {name: value for name, value in values.items() if value not in (None, "")}

    def column(self, name: str) -> list[Any]:
        """One column as Python values."""
        return self._table.column(name).to_pylist()

    def image(self, number: int, column: str) -> bytes | None:
        """Text holds no images."""
        return None


class JsonRows:
    """Objects of a JSONL table, kept as text and parsed when asked for, or those of a JSON list.

    A line that is not an object is a bad row.
    """

    def __init__(self, rows: Sequence[bytes | Any]) -> None:
        self._rows = rows
        self.class_names: dict[str, list[str]] = {}
        self.embedded: frozenset[str] = frozenset()
        names: dict[str, None] = {}
        for row in self._readable():
            names |= dict.fromkeys(row or {})
        self.columns = tuple(names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self._rows[number]
        if isinstance(row, bytes):
            try:
                row = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise BadSample("unreadable row", f"row {number + 1} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BadSample("unreadable row", f"row {number + 1} is {type(row).__name__}, not an object")
        values = {name: plain_value(value) for name, value in row.items()}
        return {name: value for name, value in values.items() if value not in (None, "")}

    def column(self, name: str) -> list[Any]:
        """One value of every line."""
        return [None if row is None else row.get(name) for row in self._readable()]

    def image(self, number: int, column: str) -> bytes | None:
        """JSON holds no images."""
        return None

    def _readable(self) -> Iterable[dict[str, Any] | None]:
        for number in range(len(self)):
            try:
                yield self[number]
            except BadSample:
                yield None


class ParquetRows:
    """Rows of a Parquet file; images that lie in it are read a row group at a time, the rest is held in memory."""

    def __init__(self, file: BinaryIO) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(file)
        weakref.finalize(self, file.close)
        schema = self._file.schema_arrow
        self.embedded = frozenset(field.name for field in schema if _holds_bytes(field.type))
        light = [_light_path(field) for field in schema]
        self._table = self._file.read(columns=[path for path in light if path])
        self.class_names = _class_names(schema)
        self.columns = tuple(name for name in schema.names if not name.startswith("__index_level_"))
        groups = map(self._file.metadata.row_group, range(self._file.num_row_groups))
        self._ends = list(accumulate(group.num_rows for group in groups))
        self._group: tuple[int, str, pa.ChunkedArray] | None = None

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name in self.columns:
            if name in self.embedded:
                value = self._path(number, name)
            else:
                value = self._named_class(name, exact_value(self._table.column(name)[number]))
            if value not in (None, ""):
                row[name] = value
        return row

    def column(self, name: str) -> list[Any]:
        """One column; of embedded images their paths."""
        numbers = range(len(self))
        if name in self.embedded:
            return [self._path(number, name) for number in numbers]
        return [self._named_class(name, exact_value(value)) for value in self._table.column(name)]

    def image(self, number: int, column: str) -> bytes | None:
        """The bytes of an embedded image."""
        if column not in self.embedded:
            return None
        group = bisect_right(self._ends, number)
        if self._group is None or self._group[:2] != (group, column):
            table = self._file.read_row_group(group, columns=[column])
            self._group = (group, column, table.column(column))
        cell = self._group[2][number - (self._ends[group - 1] if group else 0)].as_py()
        return cell.get("bytes") if isinstance(cell, dict) else cell

    def _path(self, number: int, name: str) -> str | None:
        if name not in self._table.column_names:
            return None
        cell = self._table.column(name)[number].as_py()
        return cell.get("path") if cell else None

    def _named_class(self, column: str, value: Any) -> Any:
        names = self.class_names.get(column)
        is_class = names and isinstance(value, int) and 0 <= value < len(names)
        return names[value] if names and is_class else value


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether cells are encoded images: bytes, or Hugging Face's {bytes, path}."""
    kind = kind.storage_type if isinstance(kind, pa.ExtensionType) and pa.types.is_struct(kind.storage_type) else kind
    if pa.types.is_struct(kind):
        return any(child.name == "bytes" and _is_binary(child.type) for child in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _light_path(field: pa.Field) -> str | None:
    """What is read of a column at once: all of it, of embedded images the path alone."""
    if not _holds_bytes(field.type):
        return field.name
    has_path = pa.types.is_struct(field.type) and any(child.name == "path" for child in field.type)
    return f"{field.name}.path" if has_path else None


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of Hugging Face's ClassLabel columns, from what `datasets` writes beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def read_rows(data: bytes | BinaryIO, *, name: str, encoding: str = "") -> Rows:
    """The rows of a table whose format is told by the ending of its name (see TABLE_READERS).

    A column of a delimited text becomes numbers only if each of its values is one in plain digits: 2011 or -0.5, but
    not 007, 1e5 or 1,000; whole numbers beyond 64 bits stay text. JSONL and Parquet keep their own types.

    Raises:
        VlmError: it cannot be read.
    """
    read = TABLE_READERS[file_extension(name)]
    try:
        return read(data if not isinstance(data, bytes) else io.BytesIO(data), name, encoding)
    except (pa.ArrowException, UnicodeDecodeError, csv.Error, OSError, ValueError, LookupError) as error:
        cure = "It must be whole, and in UTF-8 if text, or in what --encoding says."
        raise VlmError(f"{name} cannot be read as a table: {error}. {cure}") from error


def file_extension(name: str) -> str:
    """The ending of a file name in lower case, without the dot."""
    return name.rpartition(".")[2].lower()


def decode_text(data: bytes, encoding: str = "") -> str:
    """Text by its byte order mark or the encoding given, else UTF-8 whose bad bytes stay as halves of surrogates."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if encoding and not data.startswith(codecs.BOM_UTF8):
        return data.decode(encoding)
    return data.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="surrogateescape")


def read_delimited(data: bytes, *, delimiter: str, encoding: str = "") -> ArrowRows:
    """The rows of a CSV or the like. delimiter: what its ending promises; another is taken where only that fits.

    Raises:
        VlmError: its columns have no names, or two the same.
    """
    text = decode_text(data, encoding)
    delimiter = _sniff_delimiter(text, delimiter)
    records = _whole_records(text, delimiter)
    if records is None:
        records = _records_by_line(text, delimiter)
    header, records = _split_header(records)
    if not header or len(set(header)) < len(header):
        raise VlmError(f"The first line must name the columns, each once; it holds {header}.")

    rows: list[Sequence[str | None]] = []
    unreadable: dict[int, str] = {}
    for number, record in enumerate(records):
        cells = _trimmed(record, len(header))
        reason = _why_unreadable(cells, header, delimiter)
        if reason:
            shown = delimiter.join(record)[:80].encode(errors="backslashreplace").decode()
            unreadable[number] = f"row {number + 1} {reason}: {shown!r}"
        rows.append([None] * len(header) if reason else cells)
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in header]
    return ArrowRows(pa.table([_typed(column) for column in columns], names=header), unreadable)


def _why_unreadable(cells: Sequence[str], header: Sequence[str], delimiter: str) -> str:
    if len(cells) != len(header):
        return f"has {len(cells)} fields, {len(header)} are named; a field that holds {delimiter!r} stands in quotes"
    if not all(cell.isascii() or _is_unicode(cell) for cell in cells):
        return "is not UTF-8; name the encoding of the table, as in --encoding latin-1"
    return ""


def _sniff_delimiter(text: str, promised: str) -> str:
    """The promised delimiter where the first line holds it and no rarer one; else the one that most lines share."""
    lines = [line for line in _LINE_END.split(text[: 1 << 16])[:50] if line]
    if not lines:
        return promised
    rarer = [delimiter for delimiter in "\t;|" if delimiter != promised and delimiter in lines[0]]
    if promised in lines[0] and not rarer:
        return promised

    def num_alike(delimiter: str) -> int:
        number = lines[0].count(delimiter)
        return sum(line.count(delimiter) >= number for line in lines) if number else 0

    # the first of equals is taken
    best = max((promised, *_DELIMITERS), key=num_alike)
    return best if 2 * num_alike(best) > len(lines) else promised


def _whole_records(text: str, delimiter: str) -> list[list[str]] | None:
    """The records of a text whose quotes are sound; None where they are not, or seem to swallow lines."""
    csv.field_size_limit(_MAX_CELL)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=delimiter == "|"
    )
    try:
        records = [record for record in reader if record]
    except csv.Error:
        return None
    width = len(records[0]) if records else 0
    for record in records:
        for cell in record:
            if ("\n" in cell or "\r" in cell) and (len(record) != width or _swallows_rows(cell, delimiter, width)):
                return None
    return records


def _swallows_rows(cell: str, delimiter: str, width: int) -> bool:
    """Whether a cell over several lines holds lines that are rows by themselves, about an image each."""
    for line in _LINE_END.split(cell)[1:]:
        fields = line.split(delimiter)
        if width > 1 and len(fields) >= width and any(is_image_name(field.strip(' "')) for field in fields):
            return True
    return False


def _records_by_line(text: str, delimiter: str) -> list[list[str]]:
    """Records where quotes are not sound: a stray quote is text, and a quoted cell may still reach over lines."""
    lines = [line for line in _LINE_END.split(text) if line]
    width = len(_strict_record(lines[0], delimiter) or lines[0].split(delimiter)) if lines else 0
    records: list[list[str]] = []
    number = 0
    while number < len(lines):
        record, used = _record_at(lines, number, delimiter, width)
        records.append(record)
        number += used
    return records


def _record_at(lines: Sequence[str], number: int, delimiter: str, width: int) -> tuple[list[str], int]:
    """The record that begins with a line, and over how many lines it goes."""
    line = lines[number]
    record = _strict_record(line, delimiter)
    if record is not None and len(record) == width:
        return record, 1
    plain = line.split(delimiter)
    follows = lines[number + 1] if number + 1 < len(lines) else ""
    is_alone = not follows or len(follows.split(delimiter)) >= width
    if len(plain) == width and is_alone:
        return plain, 1
    for count in range(2, min(_MAX_CELL_LINES, len(lines) - number) + 1):
        joined = _strict_record("\n".join(lines[number : number + count]), delimiter)
        if joined is not None and len(joined) == width and not any(_swallows_rows(c, delimiter, width) for c in joined):
            return joined, count
    return (plain if len(plain) == width or record is None else record), 1


def _strict_record(text: str, delimiter: str) -> list[str] | None:
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return records[0] if len(records) == 1 else None


def _split_header(records: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and the other records; a first line that is a row itself gets names by what it holds."""
    if not records:
        return [], []
    first = [cell.strip() for cell in records[0]]
    image = next((number for number, cell in enumerate(first) if _names_image(cell)), None)
    if image is None:
        return [name or f"column_{number}" for number, name in enumerate(first, 1)], records[1:]
    names = [f"column_{number}" for number in range(1, len(first) + 1)]
    names[image] = "url" if is_web_address(first[image]) else "image"
    if len(names) == 2:
        names[1 - image] = "caption"
    return names, records


def _names_image(cell: str) -> bool:
    return is_image_name(cell) or is_web_address(cell) or _NUMBERED_IMAGE.fullmatch(cell) is not None


def image_of_caption(name: str) -> str:
    """The image of a numbered caption.

    >>> image_of_caption("1000268201_693b08cb0e.jpg#4")
    '1000268201_693b08cb0e.jpg'
    """
    match = _NUMBERED_IMAGE.fullmatch(name.strip())
    return match[1] if match else name


def _trimmed(record: list[str], width: int) -> list[str]:
    """The record without empty fields at its end that the header does not name."""
    return record[:width] if len(record) > width and not any(record[width:]) else record


def _is_unicode(cell: str) -> bool:
    return not any("\ud800" <= sign <= "\udfff" for sign in cell)


def _typed(texts: list[str | None]) -> pa.Array:
    """A column as whole numbers or floats if each of its values is one; as text otherwise."""
    values = [text for text in texts if text]
    if values and all(_WHOLE.fullmatch(text) for text in values):
        numbers = [int(text) if text else None for text in texts]
        for kind in (pa.int64(), pa.uint64()):
            try:
                return pa.array(numbers, kind)
            except (pa.ArrowInvalid, OverflowError):
                continue
        return pa.array(texts, pa.string())
    # a float holds the whole part of a number exactly up to 15 digits
    if values and all(_DECIMAL.fullmatch(text) and len(text.partition(".")[0]) <= 15 for text in values):
        return pa.array([float(text) if text else None for text in texts], pa.float64())
    return pa.array(texts, pa.string())


def _read_parquet(file: BinaryIO, name: str, encoding: str) -> Rows:
    return ParquetRows(file)


def _read_jsonl(file: BinaryIO, name: str, encoding: str) -> Rows:
    data = file.read()
    if encoding or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = decode_text(data, encoding).encode(errors="surrogateescape")
    return JsonRows([line for line in data.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()])


def _read_json(file: BinaryIO, name: str, encoding: str) -> Rows:
    """A list of objects, or one object that gives each image its captions."""
    content = json.loads(decode_text(file.read(), encoding))
    if isinstance(content, dict):
        is_by_image = content and all(isinstance(value, str | list) for value in content.values())
        if not (is_by_image and any(map(is_image_name, content))):
            raise VlmError(f"{name} is neither a list of objects nor captions by image.")
        content = [{"image": image, "captions": captions} for image, captions in content.items()]
    if not isinstance(content, list):
        raise VlmError(f"{name} is {type(content).__name__}, not a list of objects.")
    return JsonRows(content)


def _delimited(delimiter: str) -> Callable[[BinaryIO, str, str], Rows]:
    return lambda file, name, encoding: read_delimited(file.read(), delimiter=delimiter, encoding=encoding)


TABLE_READERS: dict[str, Callable[[BinaryIO, str, str], Rows]] = {
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
    "tab": _delimited("\t"),
    "psv": _delimited("|"),
    "txt": _delimited(","),
    "token": _delimited("\t"),
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
}
"""Readers of tables by the ending of the file name."""

TABLES = frozenset({"csv", "tsv", "jsonl", "ndjson", "parquet"})
"""Endings that say by themselves that a file is a table; `.txt` and `.json` are tables only if they read as one."""


def is_table(name: str) -> bool:
    """Whether the ending of a file says that it is a table."""
    return PurePosixPath(name).suffix[1:].lower() in TABLES
