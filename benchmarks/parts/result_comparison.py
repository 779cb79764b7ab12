"""The first difference of two outputs of commands: JSON values, texts, files, tars, SQLite databases, folders.

What may differ is named in `IGNORED_KEYS`, `IGNORED_FILES`, `IGNORED_TEXT`, `IGNORED_BYTES` and `IGNORED_COLUMNS`.
"""

import hashlib
import json
import math
import re
import sqlite3
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

IGNORED_KEYS = {
    "made_at": "when a folder was made",
    "made_by": "the version that made it",
    "vlm": "the version, in a run's environment",
    "commit": "the commit, in a run's environment",
    "seconds": "a duration",
    "elapsed_seconds": "a duration",
    "eta_seconds": "a duration",
    "data_wait": "a share of time",
    "mfu": "a share of time",
    "memory_bytes": "memory of the process",
    "pairs_per_second": "throughput",
    "samples_per_second": "throughput",
    "images_per_second": "throughput",
    "rows_per_second": "throughput",
    "embed_milliseconds": "a duration",
    "search_milliseconds": "a duration",
    "rerank_milliseconds": "a duration",
}
"""Names in JSON, at any depth, whose values are not compared, and why."""

IGNORED_FILES = {
    "*/curves.png": "a picture of throughput, too",
    "*/writer.lock": "empty; holds a lock",
    "cache/*": "the cache of shards",
}
"""Patterns of files that are not compared, and why."""

IGNORED_TEXT = {
    r"embedded in [\d.,]+ ms": "a duration, on the page of answers",
    r"found in [\d.,]+ ms": "a duration, on the page of answers",
}
"""Patterns in texts whose matches are not compared, and why."""

IGNORED_BYTES = {
    rb"\d+/\d+/\d{19}/\d{19}": "version, size, mtime and ctime of a tar, in the file of where its samples begin",
}
"""Patterns in other files whose matches are not compared, and why."""

IGNORED_COLUMNS: dict[tuple[str, str], str] = {}
"""Columns of SQLite tables that are not compared, as (table, column), and why."""


def difference_of_values(base: Any, new: Any, place: str = "") -> str:
    """The first difference of two values from JSON; empty if there is none."""
    if isinstance(base, dict) and isinstance(new, dict):
        for name in [*base, *(name for name in new if name not in base)]:
            if name in IGNORED_KEYS:
                continue
            if name not in new or name not in base:
                return f"{place}.{name} is only in {'BASE' if name in base else 'NEW'}"
            if found := difference_of_values(base[name], new[name], f"{place}.{name}"):
                return found
        return ""
    if isinstance(base, list) and isinstance(new, list):
        for number, (one, other) in enumerate(zip(base, new, strict=False)):
            if found := difference_of_values(one, other, f"{place}[{number}]"):
                return found
        return f"{place} has {len(base)} and {len(new)} items" if len(base) != len(new) else ""
    if isinstance(base, float) and isinstance(new, float) and math.isnan(base) and math.isnan(new):
        return ""
    return f"{place}: {base!r} and {new!r}" if type(base) is not type(new) or base != new else ""


def values_in(text: str) -> list[Any] | None:
    """The JSON of a text, one value or one a line; None if it is none."""
    try:
        return [json.loads(text)]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        return None


def difference_of_texts(base: str, new: str) -> str:
    """The first difference of two texts, which may be JSON."""
    for pattern in IGNORED_TEXT:
        base, new = re.sub(pattern, "…", base), re.sub(pattern, "…", new)
    one, other = values_in(base), values_in(new)
    if one is not None and other is not None:
        return difference_of_values(one, other)
    if base == new:
        return ""
    lines = zip(base.splitlines(), new.splitlines(), strict=False)
    for number, (first, second) in enumerate(lines, 1):
        if first != second:
            return f"line {number}: {first[:80]!r} and {second[:80]!r}"
    return f"{len(base.splitlines())} and {len(new.splitlines())} lines"


def difference_of_files(base: Path, new: Path) -> str:
    """The first difference of two files, by what they hold."""
    if base.suffix in (".json", ".jsonl", ".toml", ".html", ".txt"):
        return difference_of_texts(base.read_text("utf-8"), new.read_text("utf-8"))
    if base.suffix == ".sqlite":
        return difference_of_databases(base, new)
    first, second = base.read_bytes(), new.read_bytes()
    for pattern in IGNORED_BYTES:
        first, second = re.sub(pattern, b"-", first), re.sub(pattern, b"-", second)
    if first == second:
        return ""
    if base.suffix == ".tar":
        return difference_of_tars(base, new)
    at = next((at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), None)
    return f"{len(first):,} and {len(second):,} bytes, " + (
        "one begins the other" if at is None else f"from byte {at:,}"
    )


def difference_of_tars(base: Path, new: Path) -> str:
    """The first member that differs, of tars whose bytes differ."""
    members = []
    for path in (base, new):
        with tarfile.open(path) as tar:
            members.append([(one.name, hashlib.sha256(tar.extractfile(one).read()).hexdigest()) for one in tar])  # type: ignore[union-attr]
    for one, other in zip(*members, strict=False):
        if one != other:
            return f"member {one[0]} and {other[0]}" + (" differ in content" if one[0] == other[0] else "")
    return "headers differ" if len(members[0]) == len(members[1]) else "number of members"


def rows_of(path: Path) -> Iterator[str]:
    """The schema and all rows of a database, as text in the order they are stored in."""
    with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as database:
        tables = database.execute("select name, sql from sqlite_master where sql is not null order by name").fetchall()
        for name, sql in tables:
            yield f"{name}: {sql}"
            if not sql.upper().startswith("CREATE TABLE"):
                continue  # an index, or the face of a virtual table whose rows are in other tables
            cursor = database.execute(f'select * from "{name}"')
            columns = [column[0] for column in cursor.description]
            for row in cursor:
                told = {c: v for c, v in zip(columns, row, strict=True) if (name, c) not in IGNORED_COLUMNS}
                yield f"{name}: {told!r}"


def difference_of_databases(base: Path, new: Path) -> str:
    """The first row that differs; how pages lie in the file is not compared."""
    first, second = rows_of(base), rows_of(new)
    for one, other in zip(first, second, strict=False):
        if one != other:
            at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
            return f"…{one[max(0, at - 60) : at + 60]} and …{other[max(0, at - 60) : at + 60]}"
    left = next(first, None) or next(second, None)
    return f"only one has {left[:120]}" if left else ""


def files_below(folder: Path) -> dict[str, Path]:
    """The files that are compared, by their path below the folder."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in files.items() if not any(fnmatch(name, one) for one in IGNORED_FILES)}


def compare_folders(base: Path, new: Path) -> Iterator[tuple[str, str]]:
    """Each entry of two places with the number of its files that are equal, or the first difference."""
    first, second = files_below(base), files_below(new)
    entries = sorted({name.split("/")[0] for name in (*first, *second)})
    for entry in entries:
        inside = [name for name in sorted({*first, *second}) if name.split("/")[0] == entry]
        found = [(name, difference_between(first.get(name), second.get(name))) for name in inside]
        wrong = [f"{name}: {difference}" for name, difference in found if difference]
        more = f" (and {len(wrong) - 1} other files)" if len(wrong) > 1 else ""
        yield f"{entry}, {len(inside)} files" if len(inside) > 1 else entry, wrong[0] + more if wrong else ""


def difference_between(base: Path | None, new: Path | None) -> str:
    """The difference of two files of which one may not be there."""
    if base is None or new is None:
        return f"is only in {'BASE' if new is None else 'NEW'}"
    return difference_of_files(base, new)
