"""A condition as a tree. Every leaf is about one field, and is true of a row when one of the field's values fits."""

from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Literal

from vlm.index.facts import Value

Order = Literal["<", "<=", ">", ">="]


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """place: where the name of the field stands in the text, from 1; for messages."""

    field: str
    place: int = attribute(default=1, compare=False)


@dataclass(frozen=True, kw_only=True)
class OneOf(Leaf):
    """A value is one of these."""

    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class Ordered(Leaf):
    """A value of the same kind, number or text, stands so to this one."""

    order: Order
    value: Value


@dataclass(frozen=True, kw_only=True)
class Like(Leaf):
    """A text fits the pattern, in which % is any run of characters; A to Z count as a to z."""

    pattern: str


@dataclass(frozen=True, kw_only=True)
class Missing(Leaf):
    """There is no value."""


@dataclass(frozen=True)
class Not:
    """What the condition does not choose."""

    condition: "Condition"


@dataclass(frozen=True)
class Every:
    """What all of the conditions choose."""

    conditions: tuple["Condition", ...]


@dataclass(frozen=True)
class Some:
    """What any of the conditions chooses."""

    conditions: tuple["Condition", ...]


Condition = OneOf | Ordered | Like | Missing | Not | Every | Some


def leaves(condition: Condition) -> list[Leaf]:
    """All leaves, from left to right."""
    match condition:
        case Leaf():
            return [condition]
        case Not(inner):
            return leaves(inner)
        case Every(parts) | Some(parts):
            return [leaf for part in parts for leaf in leaves(part)]
