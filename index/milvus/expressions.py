"""Conditions of the filter language as boolean expressions of Milvus.

Every comparison asks first whether the row has such a value, by a term, and terms are never null. So each part is true
or false of every row, and `not` is its opposite: what Milvus makes of null, which differs between `n != 1` and
`n not in [1]`, never comes up. Values appear as keys of letters and digits, names as numbers: nothing of a filter's
text reaches Milvus.
"""

from collections.abc import Collection, Sequence

from vlm.errors import UsageError
from vlm.index.filter_language import (
    And,
    Compare,
    Condition,
    IsIn,
    IsNull,
    Like,
    Not,
    Or,
    check_fields,
    times_with_zone,
)
from vlm.index.instants import instant_of
from vlm.index.metadata import FieldValue
from vlm.index.milvus.collection import MOST_TEXTS, StoredField
from vlm.index.milvus.value_keys import number_key, pattern_key, text_key

NO_ROW = "row < 0"
"""An expression that is false of every row: their numbers are not negative."""


def expression_of(condition: Condition, fields: Sequence[StoredField], *, optional_fields: Collection[str] = ()) -> str:
    """The expression that selects the rows of a condition.

    fields: of the index. optional_fields: may be named although no row has them, and then match none.

    Raises:
        UsageError: the condition names a field that no row has, compares numbers with texts, or asks by `like` for a
            field of which a row has too many texts.
    """
    numbers = {stored.name: number for number, stored in enumerate(fields)}
    types = {stored.name: stored.types for stored in sorted(fields, key=lambda stored: stored.name) if stored.types}
    # every row has a key, so without fields there are no rows
    if not types:
        return NO_ROW
    check_fields(condition, types, numbers, optional_fields)
    return _expression(condition, fields, numbers)


def _expression(condition: Condition, fields: Sequence[StoredField], numbers: dict[str, int]) -> str:
    match condition:
        case Not(inner):
            return f"not ({_expression(inner, fields, numbers)})"
        case And(parts):
            return " and ".join(f"({_expression(part, fields, numbers)})" for part in parts)
        case Or(parts):
            return " or ".join(f"({_expression(part, fields, numbers)})" for part in parts)
    number = numbers.get(condition.field)
    if number is None:
        # an optional field that no row has: only `is missing` is true of it
        return f"not ({NO_ROW})" if isinstance(condition, IsNull) else NO_ROW
    prefix = f"f{number}"
    match condition:
        case IsNull():
            return f"not ({_has(prefix)})"
        case IsIn(values=values):
            instants = times_with_zone(condition)
            keys = ", ".join(f'"{_value_term(prefix, value, value in instants)}"' for value in values)
            return f"array_contains_any(terms, [{keys}])"
        case Compare():
            return _comparison(condition, prefix)
        case Like(pattern=pattern):
            return _like(pattern, prefix, fields[number])
    raise AssertionError(f"{condition!r} is no condition")


def _has(term: str) -> str:
    return f'array_contains(terms, "{term}")'


def _value_term(prefix: str, value: FieldValue, is_instant: bool) -> str:
    if not isinstance(value, str):
        return f"{prefix}n={number_key(value)}"
    return f"{prefix}i={text_key(str(instant_of(value)))}" if is_instant else f"{prefix}t={text_key(value)}"


def _comparison(condition: Compare, prefix: str) -> str:
    """Any value compares so if the least or the greatest does."""
    kind, _, key = _value_term(prefix, condition.value, bool(times_with_zone(condition))).partition("=")
    end = "low" if condition.operator.startswith("<") else "high"
    return f'{_has(kind)} and bounds["{kind}_{end}"] {condition.operator} "{key}"'


def _like(pattern: str, prefix: str, field: StoredField) -> str:
    if field.most_texts > MOST_TEXTS:
        raise UsageError(
            f"A row has {field.most_texts:,} texts of the field {field.name!r}; in a Milvus index, like compares at "
            f"most {MOST_TEXTS} of a row: use has or in, or a FAISS index."
        )
    key = pattern_key(pattern)
    if key == "%":
        return _has(f"{prefix}t")
    operator = "like" if "%" in key else "=="
    parts: list[str] = []
    for position in range(field.most_texts):
        name = f"{prefix}t_{position}"
        parts.append(f'({_has(name)} and bounds["{name}"] {operator} "{key}")')
    return " or ".join(parts) or NO_ROW
