"""Metadata from a table for rows of an index: which rows each line means, what it sets, and which keys no row has."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from vlm.config import suggest
from vlm.data.sources.rows import TABLE_READERS, file_extension, read_rows
from vlm.errors import BadSample, UsageError
from vlm.index.engine_base import EngineCatalogue
from vlm.index.metadata import is_field

UID = "uid"
_NUM_NAMED = 10
# of every row, and not metadata: the captions and the identity of its image
_FIXED = frozenset({UID, "key", "language", "caption"})


@dataclass(frozen=True, kw_only=True)
class TableChanges:
    """What a table sets: by row the new values by name.

    num_keys: of the table. num_unknown: how many of them no row has. unknown: the first of these.
    """

    changes: dict[int, dict[str, Any]]
    columns: tuple[str, ...]
    num_keys: int
    num_unknown: int
    unknown: tuple[str, ...]


def read_table(path: Path, *, encoding: str = "") -> list[dict[str, Any]]:
    """The lines of a CSV, TSV, JSONL or Parquet file by column, numbers exact and empty cells left out.

    Raises:
        UsageError: there is no such file, or its ending is of no table. VlmError: it cannot be read.
    """
    if file_extension(path.name) not in TABLE_READERS:
        raise UsageError(f"{path} is not a table: its name must end in one of {', '.join(TABLE_READERS)}.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error
    rows = read_rows(data, name=path.name, encoding=encoding)
    lines: list[dict[str, Any]] = []
    for number in range(len(rows)):
        try:
            lines.append(rows[number])
        except BadSample as error:
            raise UsageError(f"{path}, row {number + 1}: {error.detail}; nothing was set.") from error
    return lines


def match_table(
    catalogue: EngineCatalogue, lines: Iterable[Mapping[str, Any]], *, key: str = UID, columns: Sequence[str] = ()
) -> TableChanges:
    """What the lines of a table set.

    Args:
        key: the column that names the rows, by the field of the same name; `uid` by their uids. Several rows may have
            a key, as those of images of one product.
        columns: those that are set; all but the key if empty.

    Raises:
        UsageError: there is no such column or field, a column cannot be set, a key occurs twice with different values,
            or no row has any of the keys.
    """
    by_key = _lines_by_key(lines, key, columns)
    # an ordered set over all lines: one without an empty cell has columns that others lack
    names = list(dict.fromkeys(chain.from_iterable(by_key.values())))
    for name in names:
        if name in _FIXED or not is_field(name):
            raise UsageError(
                f"The column {name!r} is not metadata that can be set; name the others (--columns), or change captions "
                "and uids by vlm index update."
            )
    if not names:
        raise UsageError(f"The table has no column besides its key {key!r}; nothing was set.")
    rows = _rows_by_key(catalogue, key, list(by_key))
    unknown = [value for value in by_key if value not in rows]
    # some unknown keys are usual, as of a table for several indexes; no known one means the wrong column
    if len(unknown) == len(by_key):
        raise UsageError(
            f"No row has one of the {len(by_key):,} keys of the table as its {key}; the first is {unknown[0]!r}, and a "
            f"row has {_example(catalogue, key)!r}. Nothing was set."
        )
    changes: dict[int, dict[str, Any]] = {}
    for value, line in by_key.items():
        for row in rows.get(value, ()):
            changes[row] = line
    return TableChanges(
        changes=changes,
        columns=tuple(names),
        num_keys=len(by_key),
        num_unknown=len(unknown),
        unknown=tuple(unknown[:_NUM_NAMED]),
    )


def _lines_by_key(lines: Iterable[Mapping[str, Any]], key: str, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    by_key: dict[str, dict[str, Any]] = {}
    known: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        # of every line, since empty cells are left out: a column may begin anywhere
        known |= dict.fromkeys(line)
        if key not in line:
            continue
        value = _key_text(line[key])
        values = {name: line[name] for name in columns or line if name in line and name != key}
        if by_key.setdefault(value, values) != values:
            raise UsageError(f"The key {value!r} occurs twice, and row {number} sets it otherwise; nothing was set.")
    if not known:
        raise UsageError(f"There is nothing to set: give at least one row, with its {key!r} and the values to set.")
    for name in (key, *columns):
        if name not in known:
            raise UsageError(f"The table has no column {name!r}; {suggest(name, list(known))}")
    return by_key


def _rows_by_key(catalogue: EngineCatalogue, key: str, values: list[str]) -> Mapping[str, Sequence[int]]:
    if key == UID:
        return {uid: (row,) for uid, row in catalogue.rows_by_uid(values).items()}
    known = catalogue.field_names()
    if key not in known:
        raise UsageError(f"No row has the field {key!r} to find it by; {suggest(key, [*known, UID])}")
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for value, row in catalogue.field_values(key):
        rows[_key_text(value)].append(row)
    return rows


def _example(catalogue: EngineCatalogue, key: str) -> str:
    if key != UID:
        return _key_text(catalogue.distinct_values(key, 1)[0])
    first_row = catalogue.rows()[:1].tolist()
    return catalogue.entries(first_row)[0].uid if first_row else ""


def _key_text(value: Any) -> str:
    """A key as text, so that the number 7 and the text 7 are one key, and 007 another."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)
