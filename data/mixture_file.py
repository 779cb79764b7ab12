"""The file that names the sources of a mixture: TOML, one `[[source]]` table each."""

import math
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm.config import nearest
from vlm.errors import UsageError

MIXTURE_SUFFIX = ".toml"
_NAME = re.compile(r"[\w][\w.\-]*")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Shards that share an order.

    weight: its share of what is drawn, against the weights of the others; 0 lets its visits times `repeats` decide.
    selection: file of a selection; empty takes every sample once.
    """

    data: str
    name: str = ""
    selection: str = ""
    weight: float = 0.0
    repeats: float = 1.0


def read_sources(address: str, selection: str = "") -> tuple[Source, ...]:
    """The sources an address means: those of a mixture file (`.toml`), or shards.

    Raises:
        UsageError: the file does not exist or says what a source does not have.
    """
    if not address.endswith(MIXTURE_SUFFIX):
        return (Source(data=address, selection=selection, name="data"),)
    if selection:
        raise UsageError(f"{address} names a selection for each of its sources; leave out --selection {selection}.")
    sources = [_source(table, f"{address}, source {number}") for number, table in enumerate(_tables(Path(address)), 1)]
    if len({source.weight > 0 for source in sources}) > 1:
        raise UsageError(f"{address} gives a weight to some sources only; give one to each, or to none.")
    named = [replace(source, name=source.name or f"source-{number}") for number, source in enumerate(sources, 1)]
    if len({source.name for source in named}) < len(named):
        raise UsageError(f"{address} gives several sources one name; each has its own ledgers and needs its own name.")
    return tuple(named)


def _tables(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"There is no mixture file {str(path)!r}.")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # what is no TOML, no UTF-8, or has endless numbers
        raise UsageError(f"{path} is not TOML: {error}.") from error
    for name in content:
        if name != "source":
            raise UsageError(f"{path}: unknown key {name!r}; a mixture has [[source]] tables and nothing else.")
    tables = content.get("source")
    if not tables or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path} has no [[source]] table; write one for each source, with data = 'SHARDS'.")
    return tables


def _source(table: dict[str, Any], where: str) -> Source:
    known = Source.__dataclass_fields__
    for name, value in table.items():
        if name not in known:
            raise UsageError(f"{where}: unknown key {name!r}; {nearest(name, list(known))}.")
        if name in ("weight", "repeats"):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UsageError(f"{where}: {name} = {value!r} must be a number.")
            if not 0 < value < math.inf:
                raise UsageError(f"{where}: {name} = {value} must be above 0, and finite.")
        elif not isinstance(value, str):
            raise UsageError(f"{where}: {name} = {value!r} must be a string.")
    if not table.get("data"):
        raise UsageError(f"{where}: data is needed: a folder, pattern or address of shards.")
    source = Source(**table)
    if source.name and not _NAME.fullmatch(source.name):
        raise UsageError(f"{where}: name = {source.name!r} names files; use letters, digits, dots and dashes.")
    return source
