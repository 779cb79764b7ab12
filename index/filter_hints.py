"""Why a filter matches no row: the part of it that matches none, and what the rows have instead."""

import difflib
from collections.abc import Collection

from vlm.index.engine_base import EngineCatalogue
from vlm.index.filter_language import And, Compare, Condition, IsIn, Like, parse_filter
from vlm.index.metadata import FieldValue

# of a field's values so many are looked through for one that is spelt alike
_MOST_VALUES = 5_000
_NUM_SHOWN = 5
_CLOSE = 0.6


def explain_no_match(catalogue: EngineCatalogue, where: str, *, optional_fields: Collection[str] = ()) -> str:
    """A sentence about a filter that matches no row of a catalogue, with the values that are near.

    optional_fields: as of `EngineCatalogue.where`.

    Raises:
        UsageError: the filter is malformed, or names a field that no row has.
    """
    condition = parse_filter(where)
    if not len(catalogue):
        return "0 rows match: the index has no rows."
    parts = condition.conditions if isinstance(condition, And) else (condition,)
    for part in parts:
        if not len(catalogue.where(part, optional_fields=optional_fields)):
            return f"0 rows match: {_explain(catalogue, part)}."
    return "0 rows match: each part of the filter matches some rows, but no row matches all of them."


def _explain(catalogue: EngineCatalogue, condition: Condition) -> str:
    if isinstance(condition, IsIn | Compare | Like) and condition.field not in catalogue.field_names():
        return f"no row has a {condition.field}"
    match condition:
        case IsIn(field=field, values=values):
            return "; ".join(_explain_value(catalogue, field, value) for value in values[:_NUM_SHOWN])
        case Compare(field=field, operator=operator, value=value):
            return f"no value of {field} is {operator} {_shown(value)}; {_listing(catalogue, field)}"
        case Like(field=field, pattern=pattern):
            return f"no value of {field} is like {pattern!r}; {_listing(catalogue, field)}"
    return "no row matches a part of the filter; try its parts one by one"


def _explain_value(catalogue: EngineCatalogue, field: str, value: FieldValue) -> str:
    for near in _near_values(catalogue, field, value):
        # a value may be one of deleted rows only
        if len(catalogue.where(IsIn(field=field, values=(near,)))):
            return f"{_shown(near)} is a value of {field}, {_shown(value)} is not"
    return f"{_shown(value)} is not a value of {field}; {_listing(catalogue, field)}"


def _near_values(catalogue: EngineCatalogue, field: str, value: FieldValue) -> list[str]:
    """Texts that differ in case or spaces, then those that are spelt much alike."""
    if not isinstance(value, str):
        return []
    # of a field with very many values only those that differ in case are found beyond the first ones
    texts = catalogue.values_like(field, value, _NUM_SHOWN)
    for text in catalogue.distinct_values(field, _MOST_VALUES):
        if isinstance(text, str):
            texts.append(text)
    folded = "".join(value.casefold().split())
    alike = [text for text in texts if "".join(text.casefold().split()) == folded]
    return alike + difflib.get_close_matches(value, texts, n=_NUM_SHOWN, cutoff=_CLOSE)


def _listing(catalogue: EngineCatalogue, field: str) -> str:
    """The values of a field, or their range where they are many."""
    values = catalogue.distinct_values(field, _MOST_VALUES)
    numbers = [value for value in values if not isinstance(value, str)]
    if len(values) <= _NUM_SHOWN:
        return f"its values are {', '.join(map(_shown, values))}"
    if len(numbers) == len(values) < _MOST_VALUES:
        return f"its values go from {numbers[0]} to {numbers[-1]}"
    return f"its first values are {', '.join(map(_shown, values[:_NUM_SHOWN]))} …"


def _shown(value: FieldValue) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
