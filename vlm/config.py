"""Typed configurations: dataclasses to TOML and back, unknown keys refused; arguments that are one text or several."""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from vlm.errors import UsageError


def text_list(value: Any, name: str) -> list[str]:
    """One text or several as a list; a text is never taken for its letters.

    Raises:
        UsageError: it is neither, or holds something else.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable):
        raise UsageError(f"{name} = {value!r} is not a text: give a text, or several in a list.")
    texts = list(value)
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{name} holds {text!r}, which is not a text.")
    return texts


def number_list(value: Any, name: str) -> list[Any]:
    """Numbers as a list.

    Raises:
        UsageError: it is not one, or holds something else.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{name} = {value!r} is not a list of numbers.")
    numbers = list(value)
    for number in numbers:
        if not isinstance(number, Real):
            raise UsageError(f"{name} holds {number!r}, which is not a number.")
    return numbers


Config = TypeVar("Config")

# difflib's default: one or two wrong letters of a word
_LIKE = 0.6


def suggest(name: str, known: Sequence[str]) -> str:
    """A hint with the known name nearest to `name`, or all of them if none is near.

    >>> suggest("learning_rat", ["learning_rate", "steps"])
    "did you mean 'learning_rate'?"
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=_LIKE)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def lookup(table: dict[str, Config], name: str, what: str) -> Config:
    """The entry `name` of a table; a UsageError with the nearest name if there is none."""
    if name not in table:
        raise UsageError(f"Unknown {what} {name!r}; {suggest(name, list(table))}")
    return table[name]


def to_toml(config: Any) -> str:
    """A dataclass as TOML; fields that are None are left out and come back as None."""
    import tomli_w

    return tomli_w.dumps(_without_none(asdict(config)))


def from_toml(cls: type[Config], path: Path) -> Config:
    """Read a dataclass from TOML; absent keys keep their defaults.

    Raises:
        UsageError: the file is not TOML, a key is unknown (the nearest is named), or a value does not fit.
    """
    return from_values(cls, read_toml(path), where=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables and values of a TOML file.

    Raises:
        UsageError: it does not exist, or is not TOML.
    """
    if not path.is_file():
        raise UsageError(f"There is no configuration {str(path)!r}.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def merge_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some of them changed.

    >>> merge_values({"seed": 0, "optimizer": {"beta1": 0.9, "beta2": 0.98}}, {"optimizer": {"beta2": 0.95}})
    {'seed': 0, 'optimizer': {'beta1': 0.9, 'beta2': 0.95}}
    """
    merged = dict(values)
    for name, change in changes.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(change, Mapping):
            merged[name] = merge_values(old, change)
        else:
            merged[name] = change
    return merged


def from_values(cls: type[Config], values: dict[str, Any], *, where: str) -> Config:
    """Build a (nested) dataclass from plain values, checking names and types."""
    from pydantic import TypeAdapter, ValidationError

    # pydantic ignores unknown keys of dataclasses: a misspelt setting would silently keep its default
    _check_unknown_keys(cls, values, where=where, table="", root=cls)
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        # one mistake at a time is enough for one message
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"{where}: {key} = {first['input']!r} does not fit: {first['msg']}.") from error


def _check_unknown_keys(cls: type, values: dict[str, Any], *, where: str, table: str, root: type) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for name, value in values.items():
        key = f"{table}.{name}" if table else name
        if name not in known:
            raise UsageError(f"{where}: unknown key {key!r}; {_place_or_suggestion(name, known, root)}")
        if isinstance(value, dict) and is_dataclass(hints[name]):
            _check_unknown_keys(hints[name], value, where=where, table=key, root=root)  # pyright: ignore[reportArgumentType]


def _place_or_suggestion(name: str, known: set[str], root: type) -> str:
    """Where the key belongs if another table has it, else the nearest key, of this table or of any other."""
    tables = _tables_of_keys(root)
    if name in tables:
        return _belongs(name, tables[name])
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=_LIKE)
    elsewhere = difflib.get_close_matches(name, sorted(tables), n=1, cutoff=_LIKE)
    if elsewhere and not close:
        return f"did you mean {elsewhere[0]!r}? {_belongs(elsewhere[0], tables[elsewhere[0]])}"
    return suggest(name, sorted(known))


def _belongs(name: str, tables: list[str]) -> str:
    places: list[str] = []
    for table in tables:
        places.append(f"in the table [{table}]" if table else "at the top, before the first [table]")
    return f"{name!r} belongs {' or '.join(places)}"


def _tables_of_keys(cls: type, table: str = "") -> dict[str, list[str]]:
    """The tables that have a key, by its name; the top is an empty name."""
    tables: dict[str, list[str]] = {}
    for name, kind in get_type_hints(cls).items():
        if is_dataclass(kind) and isinstance(kind, type):
            for key, places in _tables_of_keys(kind, f"{table}.{name}" if table else name).items():
                tables.setdefault(key, []).extend(places)
        else:
            tables.setdefault(name, []).append(table)
    return tables


def flatten_config(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key.

    >>> flatten_config({"seed": 0, "optimizer": {"beta1": 0.9}})
    {'seed': 0, 'optimizer.beta1': 0.9}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten_config(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def config_differences(configurations: Sequence[Mapping[str, Any]], *, absent: Any = None) -> dict[str, list[Any]]:
    """The dotted keys in which configurations differ, each with its value in all of them.

    Tuples and the lists a file gives back for them are the same. absent: the value of a key a configuration lacks.

    >>> config_differences([{"seed": 0, "scale": (0.9, 1.0)}, {"seed": 1, "scale": [0.9, 1.0]}])
    {'seed': [0, 1]}
    """
    flat = [flatten_config(configuration) for configuration in configurations]
    # a dict as an ordered set: settings stay in the order of the configuration
    keys: dict[str, None] = {}
    for own in flat:
        keys |= dict.fromkeys(own)

    differences: dict[str, list[Any]] = {}
    for key in keys:
        values = [own.get(key, absent) for own in flat]
        first = _tuples_to_lists(values[0])
        if any(_tuples_to_lists(value) != first for value in values):
            differences[key] = values
    return differences


def _tuples_to_lists(value: Any) -> Any:
    return [_tuples_to_lists(item) for item in value] if isinstance(value, list | tuple) else value


# TOML has no null
def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
