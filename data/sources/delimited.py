"""Delimited text as rows: its delimiter, its quotes and its types found by looking, a bad line on its own.

No line takes a neighbour with it, and no whole number goes through a float.
"""

import codecs
import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from vlm.data.sources.image_names import is_image_name, is_web_address
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


def _converted(texts: Sequence[str | None], convert: Callable[[str], int | float]) -> list[int | float | None]:
    """Numbers, None where a cell is empty."""
    return [convert(text) if text else None for text in texts]


def _typed(texts: Sequence[str | None]) -> pa.Array:
    """A column as whole numbers or floats if each of its values is one; as text otherwise."""
    values = list(filter(None, texts))
    if values and all(map(_WHOLE.fullmatch, values)):
        numbers = _converted(texts, int)
        # ids are often unsigned hashes; what 64 bits do not hold stays text
        for kind in (pa.int64(), pa.uint64()):
            try:
                return pa.array(numbers, kind)
            except (pa.ArrowInvalid, OverflowError):
                continue
        return pa.array(texts, pa.string())
    if values and all(map(_is_exact_float, values)):
        return pa.array(_converted(texts, float), pa.float64())
    return pa.array(texts, pa.string())
