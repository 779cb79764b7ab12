"""Typed configurations: frozen dataclasses to TOML and back, unknown keys refused, differences by dotted key."""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from vlm.errors import UsageError

Config = TypeVar("Config")


def suggest(name: str, known: list[str]) -> str:
    """A hint with the known name nearest to `name`, or all of them if none is near.

    >>> suggest("learning_rat", ["learning_rate", "steps"])
    "did you mean 'learning_rate'?"
    """
    # 0.6 is difflib's default: one or two wrong letters of a word
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
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
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    return from_values(cls, values, where=str(path))


def from_values(cls: type[Config], values: dict[str, Any], *, where: str) -> Config:
    """Build a (nested) dataclass from plain values, checking names and types."""
    from pydantic import TypeAdapter, ValidationError

    # pydantic ignores unknown keys of dataclasses: a misspelt setting would silently keep its default
    _check_unknown_keys(cls, values, where=where, prefix="")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        # one mistake at a time is enough for one message
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"{where}: {key} = {first['input']!r} does not fit: {first['msg']}.") from error


def _check_unknown_keys(cls: type, values: dict[str, Any], *, where: str, prefix: str) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{where}: unknown key {prefix + name!r}; {suggest(name, sorted(known))}")
        if isinstance(value, dict) and is_dataclass(hints[name]):
            _check_unknown_keys(hints[name], value, where=where, prefix=f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]


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
