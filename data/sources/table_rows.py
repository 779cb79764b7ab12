"""The rows of a CSV, TSV, JSONL or Parquet table, by number and by column."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Protocol, cast, runtime_checkable

import pyarrow as pa

from vlm.errors import BadSample, VlmError

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
        return TABLE_KINDS[ending_of(name)](data)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError, csv.Error, OSError) as error:
        raise VlmError(f"{name} cannot be read as a table: {error}. It must be whole, and in UTF-8 if text.") from error


def ending_of(name: str) -> str:
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
