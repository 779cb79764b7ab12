"""Pairs listed in a table: a column with images or their names, one with captions, the rest metadata."""

import difflib
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from vlm.config import suggest
from vlm.data.samples import UNNAMED, Captions, DroppedValue, DroppedValues, Pair, Words, parse_captions
from vlm.data.sources.source import ImageFinder, SourceFiles, SourceOptions, folder_of, is_web_address, readable_text
from vlm.data.sources.table_rows import Rows, image_of_caption, read_rows
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import compute_fingerprint

IMAGE_COLUMNS = (
    *("image", "file", "path", "filename", "file_name", "image_path", "filepath", "image_file", "img", "picture"),
    *("image_name", "img_path", "img_name", "image_filename", "file_path", "imageid", "image_id"),
    # img2dataset's Parquet output names the column by the format of the images
    *("jpg", "jpeg", "png", "webp"),
)
CAPTION_COLUMNS = (
    *("captions", "caption", "title", "text", "name", "description", "alt", "names", "label"),
    *("comment", "sentence", "sentences", "raw", "alt_text", "txt", "prompt", "blip_caption"),
)
URL_COLUMNS = ("url", "image_url", "img_url", "image_urls", "link")
KEY_COLUMN = "key"
_LANGUAGE_COLUMN = re.compile(r"captions_\w+")
_NO_KEY = re.compile(r"[\x00-\x1f/\\]+")


@dataclass(frozen=True)
class Table:
    """A file of the source with its rows. data: the whole file, or empty where images lie in it."""

    name: str
    rows: Rows = field(repr=False)
    data: bytes = field(default=b"", repr=False)

    @cached_property
    def folder(self) -> str:
        """Where the table lies; names in it are tried from there."""
        return folder_of(self.name)


def read_table(files: SourceFiles, name: str, encoding: str = "") -> Table:
    """A table of the source; a Parquet file is read where it lies, for it may hold the images.

    Raises:
        BadSample: there is no such file.
        VlmError: it cannot be read.
    """
    if name.lower().endswith(".parquet"):
        file = files.open(name)
        try:
            return Table(name, read_rows(file, name=name))
        except VlmError:
            file.close()
            raise
    data = files.read(name)
    return Table(name, read_rows(data, name=name, encoding=encoding), data)


class TableSource:
    """Rows of one table, or of several that are alike, with the images they name or hold.

    Rows naming the same image are one pair with the captions of all of them and the metadata of the first.
    A caption may be a text, a list, or either by language; columns `captions_LANGUAGE` add to it. Where the captions
    are numbers of classes with known names (Hugging Face's ClassLabel), the template says the name.
    """

    def __init__(self, files: SourceFiles, tables: Sequence[Table], options: SourceOptions) -> None:
        self._files = files
        self._tables = tables
        self._options = options
        self._finder = ImageFinder(files)
        first = tables[0]
        self._image_column = _choose_column(first, options.image_column, IMAGE_COLUMNS, what="image")
        needs_column = options.captions not in ("none", "optional") or options.caption_column is not None
        self._caption_column: str | None = None
        if needs_column or _known_column(first.rows, CAPTION_COLUMNS):
            self._caption_column = _choose_column(first, options.caption_column, CAPTION_COLUMNS, what="caption")
        self._key_column = options.key_column or KEY_COLUMN
        if options.key_column is not None:
            _choose_column(first, options.key_column, (), what="key")
        self.captions_are_labels = self._caption_column in first.rows.class_names

        self._language_columns: dict[str, None] = {}  # as an ordered set
        for table in tables:
            self._language_columns |= dict.fromkeys(filter(_LANGUAGE_COLUMN.fullmatch, table.rows.columns))
        # the image is the same throughout, though its name may carry the number of the caption
        self._merged_columns = {self._image_column, self._caption_column, *self._language_columns}
        self._ends = list(accumulate(len(table.rows) for table in tables))
        self._groups, names = _rows_by_image(tables, self._image_column)
        keys = list(chain.from_iterable(_column_or_nothing(table.rows, self._key_column) for table in tables))
        # an image with several rows has the key of its first one
        self._keys = unique_keys(list(map(keys.__getitem__, self._groups.firsts().tolist())), names)

        self._identity = self._compute_fingerprint()
        # of use for the fingerprint alone; a table may be as large as the memory of all else together
        self._tables = [replace(table, data=b"") for table in tables]

    def __len__(self) -> int:
        return len(self._groups)

    def read(self, number: int) -> Pair:
        """The image a row names or holds, with the captions of all rows that name it."""
        numbers = self._groups[number]
        rows = list(map(self._row, numbers))
        self._check_image_named(numbers[0], rows[0])
        captions, metadata, _ = self._words(number, rows)
        return Pair(
            key=self._keys[number].as_py(), image=self._image(numbers[0], rows[0]), captions=captions, metadata=metadata
        )

    def words(self, number: int) -> Words:
        """What the rows say beside the image."""
        rows = list(map(self._row, self._groups[number]))
        return self._words(number, rows)._replace(dropped=self._dropped_values(number, rows))

    def _dropped_values(self, number: int, rows: Sequence[dict[str, Any]]) -> DroppedValues | None:
        """What later rows of an image say that the first one does not, apart from captions.

        The rows are parsed already, so that comparing them costs a fraction of reading them.
        """
        columns: list[str] = []
        num_rows = 0
        example: DroppedValue | None = None
        first = rows[0]
        for row, values in zip(self._groups[number][1:], rows[1:], strict=True):
            num_before = len(columns)
            for column, value in values.items():
                if value != first.get(column) and column not in self._merged_columns:
                    columns.append(column)
                    # its words are made for one value of an image alone
                    if example is None:
                        place = f"row {self._row_in_table(row) + 1} of {self._table_of(row).name}"
                        example = DroppedValue(self.file_of(number), place, column, value, first.get(column))
            num_rows += len(columns) > num_before
        return DroppedValues(columns, num_rows, example) if example else None

    def _words(self, number: int, rows: Sequence[dict[str, Any]]) -> Words:
        captions: Captions = {}
        if self._options.captions != "none":
            captions = self._captions(rows[0])
            # most images have one row with one caption each, which spares the merging
            if len(rows) > 1 or any(len(texts) > 1 for texts in captions.values()):
                captions = _merge(map(self._captions, rows))
        if not captions and self._options.captions not in ("none", "optional"):
            raise BadSample("no caption", f"row {self._groups[number][0] + 1} has no text in {self._caption_column!r}")
        key = self._keys[number].as_py()
        metadata: dict[str, Any] = {}
        for column, value in rows[0].items():
            is_caption = column == self._caption_column or column in self._language_columns
            # a key that had to be changed to be unique stays in the metadata as it was
            if not is_caption and (column, str(value)) != (KEY_COLUMN, key):
                metadata[column] = value
        if self.captions_are_labels:
            metadata["label"] = rows[0].get(str(self._caption_column))
        return Words(captions, metadata)

    def file_of(self, number: int) -> str:
        """The image as the table names it, else the row."""
        row = self._groups[number][0]
        try:
            name = _image_name(self._row(row).get(self._image_column))
        except BadSample:
            name = None
        return f"row {row + 1}" if name is None else readable_text(str(name))

    def used_files(self) -> set[str]:
        """The tables, and the images they name."""
        used = {table.name for table in self._tables}
        for table in self._tables:
            # each once, for an image may have many rows
            for name in set(map(str, _image_names(table.rows, self._image_column))):
                with suppress(BadSample):
                    used.add(self._finder.find(name, table.folder))
        return used

    @property
    def is_fork_safe(self) -> bool:
        """Whether images lie in files of their own; those in a Parquet file are read from one open file."""
        return not any(table.rows.embedded for table in self._tables)

    def fingerprint(self) -> str:
        """The tables, the columns chosen, and the names and sizes of all files."""
        return self._identity

    def describe(self) -> dict[str, Any]:
        """The tables and the columns chosen."""
        described = {
            "kind": "table",
            "address": self._files.url,
            "table": "::".join(table.name for table in self._tables),
            "rows": self._ends[-1],
            "image_column": self._image_column,
            "caption_column": self._caption_column,
        }
        return described | ({"template": self._options.template} if self.captions_are_labels else {})

    def _compute_fingerprint(self) -> str:
        parts = [table.data for table in self._tables]
        chosen: list[str] = [self._image_column, self._caption_column or ""]
        # what is not said by the options of old leaves old fingerprints as they are
        chosen += [self._options.key_column] if self._options.key_column else []
        chosen += [self._options.captions] if self._options.captions in ("none", "optional") else []
        chosen += [self._options.template] if self.captions_are_labels else []
        return compute_fingerprint(*parts, self._files.fingerprint(), *chosen)

    def _table_of(self, row: int) -> Table:
        return self._tables[bisect_right(self._ends, row)]

    def _row_in_table(self, row: int) -> int:
        number = bisect_right(self._ends, row)
        return row - (self._ends[number - 1] if number else 0)

    def _row(self, row: int) -> dict[str, Any]:
        return self._table_of(row).rows[self._row_in_table(row)]

    def _check_image_named(self, row: int, values: dict[str, Any]) -> None:
        is_embedded = self._image_column in self._table_of(row).rows.embedded
        if not is_embedded and not isinstance(values.get(self._image_column), str | int):
            raise BadSample("no image named", f"row {row + 1} has no text in {self._image_column!r}")

    def _image(self, row: int, values: dict[str, Any]) -> bytes:
        table = self._table_of(row)
        is_embedded = self._image_column in table.rows.embedded
        # Hugging Face's cells hold bytes, or only the path of a file
        embedded = table.rows.image(self._row_in_table(row), self._image_column) if is_embedded else None
        if embedded:
            return embedded
        # img2dataset leaves a row for each address, also where the download failed
        status = values.get("status") or "success"
        if status != "success":
            raise BadSample("not downloaded", f"status {status!r}: {values.get('error_message')}")
        if is_embedded and self._image_column not in values:
            raise BadSample("no image", f"row {row + 1} has neither bytes nor a path in {self._image_column!r}")
        name = image_of_caption(str(values[self._image_column]))
        return self._files.read(self._finder.find(name, table.folder))

    def _captions(self, row: dict[str, Any]) -> Captions:
        value = row.get(self._caption_column) if self._caption_column else None
        if self.captions_are_labels and value is not None:
            # names of classes are often identifiers, as hot_dog
            return {UNNAMED: (self._options.template.replace("{}", str(value).replace("_", " ")),)}
        captions: dict[str, Any] = {}
        for name in self._language_columns:
            if name in row:
                captions[name] = row[name]
        # a caption such as 1984 is read as a number
        captions["captions"] = str(value) if isinstance(value, int | float) else value
        return parse_captions(None, captions)


_LOOKED_AT = 20


def names_only_addresses(table: Table, options: SourceOptions) -> bool:
    """Whether the images of a table are still on the web: it has addresses in place of files."""
    column = options.image_column or _known_column(table.rows, IMAGE_COLUMNS)
    if column is None:
        return _known_column(table.rows, URL_COLUMNS) is not None
    if column not in table.rows.columns:
        return False
    num_addresses = 0
    for name in table.rows.column(column):
        if name is None:
            continue
        if not isinstance(name, str) or not is_web_address(name):
            return False
        num_addresses += 1
        # the first names are enough to tell: a table lists files or addresses, not both
        if num_addresses == _LOOKED_AT:
            break
    return num_addresses > 0


def has_columns(table: Table, options: SourceOptions) -> bool:
    """Whether a table has a column of images and one of captions, as they are asked for or by known names."""
    image = options.image_column or _known_column(table.rows, IMAGE_COLUMNS)
    caption = options.caption_column or _known_column(table.rows, CAPTION_COLUMNS)
    by_language = any(map(_LANGUAGE_COLUMN.fullmatch, table.rows.columns))
    needs_caption = options.captions not in ("none", "optional")
    return bool(image) and bool(caption or by_language or not needs_caption)


def names_files(table: Table, files: SourceFiles, options: SourceOptions, *, tries: int = 20) -> bool:
    """Whether some of the first rows of a table hold an image or name one that is there."""
    column = options.image_column or _known_column(table.rows, IMAGE_COLUMNS)
    if column is None or column not in table.rows.columns:
        return False
    finder = ImageFinder(files)
    # one is enough: rows whose image was never downloaded are usual
    for number, name in enumerate(table.rows.column(column)[:tries]):
        if table.rows.image(number, column) is not None:
            return True
        try:
            if name is not None and finder.find(image_of_caption(str(name)), table.folder) in finder.names:
                return True
        except BadSample:
            continue
    return False


def unique_keys(given: Sequence[Any], names: Sequence[Any]) -> pa.StringArray:
    """Keys from those given and the names of the images: the key, else the stem of the name, else number in the table.

    Dots become underscores, for a WebDataset key ends at its first dot. Stems that occur twice get the names of
    their folders in front; what is still not unique gets a number behind. Arrow holds a key in a fifth of the memory of
    a text of Python's.

    >>> unique_keys([None, None, "x.y", None], ["a/1.jpg", "b/1.jpg", "c.jpg", "c.d.jpg"]).to_pylist()
    ['a-1', 'b-1', 'x_y', 'c_d']
    """
    # of the names from which a key is made; empty for the others
    stems: list[str] = []
    for raw, name in zip(given, names, strict=True):
        is_named = raw is None and name is not None
        stems.append(PurePosixPath(str(name)).stem if is_named else "")
    num_with_stem = Counter(stems)
    keys = pa.lib.StringBuilder()
    # first come, first served: the same table gives the same keys every time
    taken: set[str] = set()
    for number, (raw, name) in enumerate(zip(given, names, strict=True)):
        if raw is not None:
            preferred = str(raw)
        elif name is None:
            preferred = f"row-{number + 1}"
        else:
            stem = stems[number]
            # a name of slashes and dots has no stem, and no suffix to leave out
            is_told_apart = not stem or num_with_stem[stem] == 1
            preferred = stem if is_told_apart else str(PurePosixPath(str(name)).with_suffix(""))
        preferred = readable_text(preferred).strip().strip("/")
        # keys are names of tar members, in which a slash would be a folder
        base = _NO_KEY.sub("-", preferred).replace(".", "_") or f"row-{number + 1}"
        key = base
        attempt = 1
        while key in taken:
            attempt += 1
            key = f"{base}-{attempt}"
        taken.add(key)
        keys.append(key)
    return keys.finish()


def unique_image_keys(names: Sequence[str]) -> pa.StringArray:
    """Keys from the names of images alone."""
    return unique_keys([None] * len(names), names)


def _known_column(rows: Rows, known: Sequence[str]) -> str | None:
    """The first of the known names that is a column, whatever its case."""
    # from the end, so that of Image and image the first one stays
    by_name = {str(column).casefold(): str(column) for column in reversed(rows.columns)}
    for name in known:
        if name in by_name:
            return by_name[name]
    return None


def _choose_column(table: Table, preferred: str | None, known: Sequence[str], *, what: str) -> str:
    """The column asked for, else the first of the known names."""
    columns = list(map(str, table.rows.columns))
    if preferred is not None:
        if preferred not in columns:
            hint = suggest(preferred, columns)
            raise UsageError(f"{table.name} has no column {preferred!r}; {hint} (columns: {', '.join(columns)}).")
        return preferred
    column = _known_column(table.rows, known)
    if column is not None:
        return column
    closest = max(columns, key=lambda column: _similarity(column, known), default="")
    is_close = bool(closest) and _similarity(closest, known) > 0.7
    hint = f"perhaps {closest!r} is meant" if is_close else f"it was looked for as {', '.join(known)}"
    listing = ", ".join(columns) or "none"
    raise UsageError(
        f"{table.name} has no {what} column: {hint}; name it with --{what}-column. Its columns: {listing}."
    )


def _similarity(column: str, known: Sequence[str]) -> float:
    """How much a column is spelt like the nearest of the known names, in [0, 1]."""
    return max(difflib.SequenceMatcher(None, column.casefold(), name).ratio() for name in known)


def _image_names(rows: Rows, column: str) -> list[Any]:
    """The images of the rows, None where none is named."""
    return list(map(_image_name, _column_or_nothing(rows, column)))


def _image_name(value: Any) -> Any:
    """The image that a cell names, or None; a numbered caption (`1.jpg#0`) is one of its image."""
    if isinstance(value, str):
        return image_of_caption(value) if value.strip() else None
    return value


def _column_or_nothing(rows: Rows, column: str) -> list[Any]:
    return rows.column(column) if column in rows.columns else [None] * len(rows)


class _RowGroups:
    """The rows of each image, in the order of its first row.

    groups: int64 [rows], the image of each row, numbered in the order of their first rows.
    """

    def __init__(self, groups: np.ndarray) -> None:
        self._rows = np.argsort(groups, kind="stable")
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(groups))])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> list[int]:
        return self._rows[self._starts[number] : self._starts[number + 1]].tolist()

    def firsts(self) -> np.ndarray:
        """The first row of each image."""
        return self._rows[self._starts[:-1]]


def _rows_by_image(tables: Sequence[Table], column: str) -> tuple[_RowGroups, list[Any]]:
    """The rows of each image, and its name in the first of them or None; rows that name none stay alone.

    Tables in different folders may give different images one name.
    """
    groups = array("q")
    names: list[Any] = []
    by_folder: dict[str, dict[str, int]] = {}
    for table in tables:
        group_of = by_folder.setdefault(table.folder, {})
        # many embedded images may be called by one name, such as image.jpg
        is_shared_name = column in table.rows.embedded
        for name in _image_names(table.rows, column):
            is_alone = name is None or is_shared_name
            group = len(names) if is_alone else group_of.setdefault(str(name), len(names))
            groups.append(group)
            if group == len(names):
                names.append(name)
    return _RowGroups(np.asarray(groups)), names


def _merge(parts: Iterable[Captions]) -> Captions:
    """All captions by language, each once."""
    # dicts rather than sets: the order of the captions is that of the rows
    merged: dict[str, dict[str, None]] = {}
    for captions in parts:
        for language, texts in captions.items():
            merged.setdefault(language, {}).update(dict.fromkeys(texts))
    return {language: tuple(texts) for language, texts in merged.items()}
