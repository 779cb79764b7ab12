"""Which recipe a run follows, and in what two or more configurations differ."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vlm.train.config import FREE_ON_RESUME
from vlm.train.presets import PRESETS

_OWN = frozenset({"data", "val", "run", "seed", "model.tokenizer", "loader.selection", "micro_batch", "precision"})
"""What everybody sets for themselves, beside what has no influence on the weights."""


def recipe_of(configuration: Mapping[str, Any]) -> str:
    """The preset a saved configuration was made from without a change that matters; empty if none."""
    saved = _flat(configuration)
    for name, (_, preset) in PRESETS.items():
        wanted = _flat(asdict(preset))
        keys = (wanted.keys() & saved.keys()) - _OWN - FREE_ON_RESUME
        if saved and "model.architecture" in keys and all(_same(saved[key], wanted[key]) for key in keys):
            return name
    return ""


def differing(configurations: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The dotted keys in which configurations differ, each with the value in all of them; None where one has it not."""
    flat = [_flat(configuration) for configuration in configurations]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(not _same(value, values[0]) for value in values)}


def _flat(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in configuration.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether values are equal, lists of a TOML file and tuples alike."""
    return (list(one) if isinstance(one, tuple) else one) == (list(other) if isinstance(other, tuple) else other)
