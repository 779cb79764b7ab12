"""The rows of a table, by number and by column: delimited text, JSON, Parquet.

A row that cannot be read is a bad row of its own. Values become what JSON can hold, exactly: no whole number, time or
decimal is rounded. Of delimited text the delimiter, the quotes and the types are found by looking; a bad line stands
for itself, and takes no neighbour with it.
"""

import codecs
import csv
import io
import json
import math
import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Protocol, runtime_checkable
from uuid import UUID

import numpy as np
import pyarrow as pa

from vlm.data.sources.source import is_image_name, is_web_address
from vlm.errors import BadSample, VlmError

# plain digits only: 007, 1e5 and 1,000 would not come back as they were written
_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_DECIMAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
# half of a surrogate pair stands for a byte that is not UTF-8 (see decode_text)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# not str.splitlines, which also splits at form feeds and U+2028 inside captions
_LINE_END = re.compile(r"\r\n|\n|\r")
_DELIMITERS = ",\t;|"
_ROWS_AT_ONCE = 256
# what a line of a file must not exceed; csv's own limit is shorter than long captions
_MAX_CELL = 1 << 27
# lines that one quoted cell may reach over where quotes of a table are not sound
_MAX_CELL_LINES = 50
# Flickr8k and Flickr30k number the captions of an image
_NUMBERED_IMAGE = re.compile(r"(.+\.\w{3,4})#\d+")
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_SIMPLE = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)


def plain_value(value: Any) -> Any:
    """A value as JSON can hold it: times as ISO text, decimals as numbers where exact, bytes and NaN as nothing."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(plain_value, value))
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        # total_seconds() is a float, and loses microseconds of long durations
        return iso_duration((value.days * 86_400 + value.seconds) * 10**9 + value.microseconds * 1000)
    if isinstance(value, Decimal):
        return plain_decimal(value)
    if isinstance(value, UUID):
        return str(value)
    item = getattr(value, "item", None)  # numpy's numbers
    return plain_value(item()) if callable(item) and not isinstance(value, bytes) else None


def plain_decimal(value: Decimal) -> int | float | str | None:
    """A decimal without a fraction as a whole number of up to 64 bits, another as the same float, else as text.

    >>> plain_decimal(Decimal("1234567890123456789")), plain_decimal(Decimal("7.0")), plain_decimal(Decimal("1.10"))
    (1234567890123456789, 7.0, 1.1)
    >>> plain_decimal(Decimal("0.12345678901234567890")), plain_decimal(Decimal(2**64))
    ('0.12345678901234567890', '18446744073709551616')
    """
    if not value.is_finite():
        return None
    # a column of DECIMAL(20, 0) is of whole numbers throughout, 64-bit hashes often
    if value.as_tuple().exponent == 0:
        return int(value) if -(2**63) <= value < 2**64 else str(value)
    # repr is the shortest text of a float, so that 1.10 counts as exact although its binary value is not
    number = float(value)
    return number if math.isfinite(number) and Decimal(repr(number)) == value else str(value)


def exact_value(scalar: pa.Scalar) -> Any:
    """A cell of an Arrow table as a plain value; nanoseconds, which Python's times do not have, are kept."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if any(is_simple(kind) for is_simple in _SIMPLE):
        return scalar.as_py()
    if isinstance(scalar, pa.ExtensionScalar):
        as_python = scalar.as_py()
        return str(as_python) if isinstance(as_python, UUID) else exact_value(scalar.value)
    if pa.types.is_dictionary(kind):
        return exact_value(scalar.dictionary[scalar.index.as_py()])
    if pa.types.is_map(kind):
        by_key: dict[str, Any] = {}
        for entry in scalar.values:
            # a map may have keys of any type, an object of JSON has text alone
            by_key[str(entry["key"].as_py())] = exact_value(entry["value"])
        return by_key
    if pa.types.is_struct(kind):
        by_name: dict[str, Any] = {}
        for position, field in enumerate(kind):
            # by position, since a struct may have two fields of one name
            by_name[field.name] = exact_value(scalar[position])
        return by_name
    if isinstance(scalar, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar | pa.ListViewScalar):
        return list(map(exact_value, scalar.values))
    if pa.types.is_duration(kind):
        return iso_duration(scalar.value * _NANOSECONDS[kind.unit])
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return _with_nanoseconds(scalar.value, pa.scalar(scalar.value // 1000, pa.timestamp("us", kind.tz)))
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return _with_nanoseconds(scalar.value, pa.scalar(scalar.value // 1000, pa.time64("us")))
    return plain_value(scalar.as_py())


def _with_nanoseconds(nanoseconds: int, rounded: pa.Scalar) -> str:
    """The ISO text of a time that was cut to microseconds, with the three digits that were cut off."""
    # isoformat leaves out a fraction of zero, and puts the offset of the time zone behind it
    text = rounded.as_py().isoformat()
    rest = nanoseconds % 1000
    if not rest:
        return text
    micro = nanoseconds // 1000 % 10**6
    whole, _, fraction = text.partition(".")
    zone_at = 6 if fraction else 0
    zone = fraction[zone_at:] if fraction else ""
    if not fraction:
        whole, zone = _split_zone(whole)
    return f"{whole}.{micro:06d}{rest:03d}{zone}"


def _split_zone(text: str) -> tuple[str, str]:
    """The text before and the offset after the time of an ISO text without a fraction."""
    # the minus signs of the date come before the T
    begin = text.find("T") + 1
    offset = max(text.rfind("+"), text.rfind("-", begin))
    return (text[:offset], text[offset:]) if offset > begin else (text, "")


def iso_duration(nanoseconds: int) -> str:
    """A duration in ISO 8601, in seconds.

    >>> iso_duration(1_500_000_000), iso_duration(-7), iso_duration(3600 * 10**9)
    ('PT1.5S', '-PT0.000000007S', 'PT3600S')
    """
    seconds, fraction = divmod(abs(nanoseconds), 10**9)
    digits = f"{fraction:09d}".rstrip("0")
    sign = "-" if nanoseconds < 0 else ""
    return f"{sign}PT{seconds}{'.' if digits else ''}{digits}S"


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


class JsonRows:
    """Objects of a JSONL table, kept as text and parsed when asked for, or those of a JSON list.

    A line that is not an object is a bad row.
    """

    def __init__(self, rows: Sequence[bytes | Any]) -> None:
        self._rows = rows
        self.class_names: dict[str, list[str]] = {}
        self.embedded: frozenset[str] = frozenset()
        # every row is looked at: JSONL rows leave out what they lack, and the first may lack the captions
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
        values: dict[str, Any] = {}
        for name, value in row.items():
            plain = plain_value(value)
            if plain not in (None, ""):
                values[name] = plain
        return values

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
        # no `with` can close it: its rows are read for as long as somebody holds them
        weakref.finalize(self, file.close)
        schema = self._file.schema_arrow
        self.embedded = frozenset(field.name for field in schema if _holds_bytes(field.type))
        # the images of a table may be larger than memory; what describes them is not
        light_columns = list(filter(None, map(_light_path, schema)))
        self._table = self._file.read(columns=light_columns)
        self.class_names = _class_names(schema)
        # pandas stores its index as a column
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
        if name in self.embedded:
            return [self._path(number, name) for number in range(len(self))]
        return [self._named_class(name, exact_value(value)) for value in self._table.column(name)]

    def image(self, number: int, column: str) -> bytes | None:
        """The bytes of an embedded image."""
        if column not in self.embedded:
            return None
        group = bisect_right(self._ends, number)
        # packing reads rows in order: one row group in memory serves all of its rows
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
        # Hugging Face gives rows without a label the class -1
        is_class = names and isinstance(value, int) and 0 <= value < len(names)
        return names[value] if names and is_class else value


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether cells are encoded images: bytes, or Hugging Face's {bytes, path}."""
    # libraries may register an Arrow extension type over the struct
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
    """The names of Hugging Face's ClassLabel columns, from what `datasets` writes into the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names_by_column: dict[str, list[str]] = {}
        for column, feature in features.items():
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
                names_by_column[column] = list(map(str, feature["names"]))
    except (KeyError, ValueError, TypeError, AttributeError):
        # metadata of other tools, or of another version: then the numbers are what there is
        return {}
    return names_by_column


def read_rows(data: bytes | BinaryIO, *, name: str, encoding: str = "") -> Rows:
    """The rows of a table whose format its file ending names (see TABLE_READERS).

    A column of a delimited text becomes numbers only if each of its values is one in plain digits: 2011 or -0.5, but
    not 007, 1e5 or 1,000; whole numbers beyond 64 bits stay text. JSONL and Parquet keep their own types.

    Raises:
        VlmError: it cannot be read.
    """
    read = TABLE_READERS[file_extension(name)]
    try:
        return read(data if not isinstance(data, bytes) else io.BytesIO(data), name, encoding)
    except VlmError as error:
        raise VlmError(f"{name} cannot be read as a table. {error}") from error
    except (pa.ArrowException, UnicodeDecodeError, csv.Error, OSError, ValueError, LookupError) as error:
        cure = "It must be whole, and in UTF-8 if text, or in what --encoding says."
        raise VlmError(f"{name} cannot be read as a table: {error}. {cure}") from error


def file_extension(name: str) -> str:
    """The ending of a file name in lower case, without the dot."""
    return name.rpartition(".")[2].lower()


def _read_parquet(file: BinaryIO, name: str, encoding: str) -> Rows:
    return ParquetRows(file)


def _read_jsonl(file: BinaryIO, name: str, encoding: str) -> Rows:
    data = file.read()
    # lines are cut as bytes below, and in UTF-16 half of a character may look like a line end
    if encoding or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = decode_text(data, encoding).encode(errors="surrogateescape")
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return JsonRows(list(filter(bytes.strip, lines)))


def _read_json(file: BinaryIO, name: str, encoding: str) -> Rows:
    """A list of objects, or one object that gives each image its captions."""
    content = json.loads(decode_text(file.read(), encoding))
    if isinstance(content, dict):
        # a JSON object may be anything; one by image has the names of images for keys
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


class ArrowRows:
    """Rows of a delimited text, with the lines that could not be read by number."""

    def __init__(self, table: pa.Table, unreadable: dict[int, str] | None = None) -> None:
        self.columns = tuple(table.column_names)
        self.class_names: dict[str, list[str]] = {}
        self.embedded: frozenset[str] = frozenset()
        self._table = table
        self._unreadable = unreadable or {}
        # rows are read in order: Arrow turns a run of them into Python's values in a fraction of the time of each alone
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number in self._unreadable:
            raise BadSample("unreadable row", self._unreadable[number])
        block, place = divmod(number, _ROWS_AT_ONCE)
        block_number, rows = self._block
        if block_number != block:
            rows = self._table.slice(block * _ROWS_AT_ONCE, _ROWS_AT_ONCE).to_pylist()
            self._block = (block, rows)
        filled: dict[str, Any] = {}
        for name, value in rows[place].items():
            if value is not None and value != "":
                filled[name] = value
        return filled

    def column(self, name: str) -> list[Any]:
        """One column as Python values."""
        return self._table.column(name).to_pylist()

    def image(self, number: int, column: str) -> bytes | None:
        """Text holds no images."""
        return None


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
    # sound quotes are read in one pass; else each line is a record unless a quoted cell needs more of them
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
        # an unreadable row keeps its number, by which it is reported, and leaves the types of the columns alone
        rows.append([None] * len(header) if reason else cells)
    # of no rows, zip makes no columns
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    return ArrowRows(pa.table(list(map(_typed, columns)), names=header), unreadable)


def _why_unreadable(cells: Sequence[str], header: Sequence[str], delimiter: str) -> str:
    if len(cells) != len(header):
        return f"has {len(cells)} fields, {len(header)} are named; a field that holds {delimiter!r} stands in quotes"
    if not all(map(_is_unicode, cells)):
        return "is not UTF-8; name the encoding of the table, as in --encoding latin-1"
    return ""


def _sniff_delimiter(text: str, promised: str) -> str:
    """The promised delimiter where the first line holds it and no rarer one; else the one that most lines share."""
    lines = list(filter(None, _LINE_END.split(text[: 1 << 16])[:50]))
    if not lines:
        return promised
    # a text holds commas, but hardly a tab: one in the header says more than what the ending promises
    has_rarer = any(delimiter in lines[0] for delimiter in "\t;|".replace(promised, ""))
    if promised in lines[0] and not has_rarer:
        return promised

    def num_alike(delimiter: str) -> int:
        number = lines[0].count(delimiter)
        return sum(line.count(delimiter) >= number for line in lines) if number else 0

    # a caption may hold any of these, but only the real one is in most lines as often as in the first
    # the first of equals is taken
    best = max((promised, *_DELIMITERS), key=num_alike)
    return best if 2 * num_alike(best) > len(lines) else promised


def _whole_records(text: str, delimiter: str) -> list[list[str]] | None:
    """The records of a text whose quotes are sound; None where they are not, or seem to swallow lines."""
    # a setting of the whole process; its default of 128 KiB fails on long captions
    csv.field_size_limit(_MAX_CELL)
    # psql and Markdown pad their cells
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=delimiter == "|"
    )
    try:
        records = list(filter(None, reader))
    except csv.Error:
        return None
    # a stray quote opens a cell that reaches to the next quote, often lines away, and csv reports no error
    width = len(records[0]) if records else 0
    for record in records:
        for cell in record:
            if ("\n" in cell or "\r" in cell) and (len(record) != width or _swallows_rows(cell, delimiter, width)):
                return None
    return records


def _swallows_rows(cell: str, delimiter: str, width: int) -> bool:
    """Whether a cell over several lines holds lines that are rows by themselves, about an image each."""
    # the first line belongs to the row of the cell itself
    for line in _LINE_END.split(cell)[1:]:
        fields = line.split(delimiter)
        if width > 1 and len(fields) >= width and any(is_image_name(field.strip(' "')) for field in fields):
            return True
    return False


def _records_by_line(text: str, delimiter: str) -> list[list[str]]:
    """Records where quotes are not sound: a stray quote is text, and a quoted cell may still reach over lines."""
    lines = list(filter(None, _LINE_END.split(text)))
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
    # a next line with too few fields may be the rest of a quoted cell of this one
    follows = lines[number + 1] if number + 1 < len(lines) else ""
    is_alone = not follows or len(follows.split(delimiter)) >= width
    if len(plain) == width and is_alone:
        return plain, 1
    for count in range(2, min(_MAX_CELL_LINES, len(lines) - number) + 1):
        joined = _strict_record("\n".join(lines[number : number + count]), delimiter)
        if joined is None or len(joined) != width:
            continue
        if not any(_swallows_rows(cell, delimiter, width) for cell in joined):
            return joined, count
    # no reading fits: one bad row, and the next line begins afresh
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
    first = list(map(str.strip, records[0]))
    numbered = [f"column_{number}" for number in range(1, len(first) + 1)]
    image_cell = next(filter(_names_image, first), None)
    if image_cell is None:
        # pandas leaves the name of its index empty
        return [name or number for name, number in zip(first, numbered, strict=True)], records[1:]
    names = numbered
    image = first.index(image_cell)
    names[image] = "url" if is_web_address(image_cell) else "image"
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
    return cell.isascii() or _SURROGATE.search(cell) is None


def _is_exact_float(text: str) -> bool:
    """Whether a number in plain digits keeps its whole part as a float, which holds 15 digits exactly."""
    return _DECIMAL.fullmatch(text) is not None and len(text.partition(".")[0]) <= 15


def _typed(texts: Sequence[str | None]) -> pa.Array:
    """A column as whole numbers or floats if each of its values is one; as text otherwise."""
    values = list(filter(None, texts))
    if values and all(map(_WHOLE.fullmatch, values)):
        # ids are often unsigned hashes; what 64 bits do not hold stays text
        for kind in (pa.int64(), pa.uint64()):
            with suppress(OverflowError):
                return _numbers(texts, int, kind)
    elif values and all(map(_is_exact_float, values)):
        return _numbers(texts, float, pa.float64())
    builder = pa.lib.StringBuilder()
    builder.append_values(texts)
    return builder.finish()


def _numbers(texts: Sequence[str | None], convert: Callable[[str], int | float], kind: pa.DataType) -> pa.Array:
    """Numbers, null where a cell is empty; OverflowError where the type does not hold one."""
    # not by pa.array, which imports pandas where it is installed: half a second and 30 MB
    numbers = np.array([convert(text) if text else 0 for text in texts], kind.to_pandas_dtype())
    is_filled = np.packbits(np.fromiter(map(bool, texts), bool, len(texts)), bitorder="little")
    return pa.Array.from_buffers(kind, len(texts), [pa.py_buffer(is_filled), pa.py_buffer(numbers)])
