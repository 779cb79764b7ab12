"""Random filters over random metadata, against Python's own comparisons."""

import contextlib
import random
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.index.metadata_fixture import Metadata, chosen, open_bitmaps, open_facts
from vlm.errors import UsageError

NUMBERS = st.sampled_from([0, 1, -1, 2, 0.5, 1.0, 2**62, 2**62 + 1, float(2**62)])
TEXTS = st.sampled_from(["", "a", "A", "ab", "b", "ä", "Ä", "1", "a'b", "a_b", "axb", "狗"])
VALUES = NUMBERS | TEXTS | st.booleans()
ROWS = st.lists(st.dictionaries(st.sampled_from("xyz"), VALUES | st.lists(VALUES, max_size=3)), max_size=8)
Predicate = Callable[[Metadata], bool]


def values_of(metadata: Metadata, name: str) -> list[Any]:
    value = metadata.get(name, [])
    return value if isinstance(value, list) else [value]


def written(value: float | str, quote: str = "'") -> str:
    return quote + value.replace(quote, quote * 2) + quote if isinstance(value, str) else str(value).lower()


def is_like(text: Any, pattern: str) -> bool:
    """By trying every cut, capitals A to Z as small letters."""
    if not isinstance(text, str):
        return False
    small = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
    text, pattern = text.translate(small), pattern.translate(small)
    if not pattern or pattern[0] != "%":
        return text == pattern if not (text and pattern) else text[0] == pattern[0] and is_like(text[1:], pattern[1:])
    return any(is_like(text[cut:], pattern[1:]) for cut in range(len(text) + 1))


ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


@st.composite
def leaf_conditions(draw: st.DrawFn) -> tuple[str, Predicate]:
    name = draw(st.sampled_from("xyz"))
    kind = draw(st.sampled_from(["=", "!=", "order", "in", "not in", "like", "not like", "missing", "not missing"]))
    value = draw(VALUES)

    def any_of(fits: Callable[[Any], bool]) -> Predicate:
        return lambda metadata: any(fits(each) for each in values_of(metadata, name))

    def none_of(fits: Callable[[Any], bool]) -> Predicate:
        return lambda metadata: bool(values_of(metadata, name)) and not any_of(fits)(metadata)

    match kind:
        case "=":
            sign, quote = draw(st.sampled_from([("=", "'"), ("==", '"'), ("has", '"')]))
            return f"{name} {sign} {written(value, quote)}", any_of(lambda each: each == value)
        case "!=":
            return f"{name}!={written(value)}", none_of(lambda each: each == value)
        case "order":
            sign = draw(st.sampled_from(sorted(ORDERS)))
            return f"{name} {sign} {written(value)}", any_of(
                lambda each: isinstance(each, str) == isinstance(value, str) and ORDERS[sign](each, value)
            )
        case "in" | "not in":
            values = [value, *draw(st.lists(VALUES, max_size=3))]
            quantified = any_of if kind == "in" else none_of
            return f"{name} {kind} ({', '.join(map(written, values))})", quantified(lambda each: each in values)
        case "like" | "not like":
            pattern = draw(st.text("aAb%_xä'", max_size=4))
            quantified = any_of if kind == "like" else none_of
            return f"{name} {kind} {written(pattern)}", quantified(lambda each: is_like(each, pattern))
        case "missing":
            return f"{name} is missing", lambda metadata: not values_of(metadata, name)
    return f"{name} is not missing", lambda metadata: bool(values_of(metadata, name))


def joined(parts: st.SearchStrategy[tuple[str, Predicate]]) -> st.SearchStrategy[tuple[str, Predicate]]:
    def all_of(some: list[tuple[str, Predicate]]) -> tuple[str, Predicate]:
        return " and ".join(f"({text})" for text, _ in some), lambda row: all(fits(row) for _, fits in some)

    def any_of(some: list[tuple[str, Predicate]]) -> tuple[str, Predicate]:
        return " OR ".join(f"({text})" for text, _ in some), lambda row: any(fits(row) for _, fits in some)

    several = st.lists(parts, min_size=1, max_size=3)
    denied = parts.map(lambda part: (f"not ({part[0]})", lambda row: not part[1](row)))
    return several.map(all_of) | several.map(any_of) | denied


CONDITIONS = st.recursive(leaf_conditions(), joined, max_leaves=6)
# so that every field has numbers and texts, and each comparison is allowed
BOTH_KINDS: Metadata = {name: [7, "seven"] for name in "xyz"}


@settings(deadline=None, max_examples=250)
@given(rows=ROWS, condition=CONDITIONS, facts_per_bitmap=st.integers(1, 5))
def test_a_filter_chooses_what_python_would(
    rows: list[Metadata], condition: tuple[str, Predicate], facts_per_bitmap: int
) -> None:
    text, fits = condition
    rows = [BOTH_KINDS, *rows]
    expected = [row for row, metadata in enumerate(rows) if fits(metadata)]
    database = open_bitmaps(rows, facts_per_bitmap=facts_per_bitmap)
    assert chosen(database, text) == chosen(database, text, use_bitmaps=True) == expected


def _many_rows() -> list[Metadata]:
    pool: list[Metadata] = [
        {"x": 0, "y": "a"},
        {"x": [1, "b"], "z": 2},
        {"y": ["A", "ab", 2]},
        {},
        {"x": "", "z": "狗"},
    ]
    return [BOTH_KINDS, *random.Random(0).choices(pool, k=30_000)]


MANY_ROWS = _many_rows()


@pytest.fixture(scope="module")
def many() -> sqlite3.Connection:
    return open_bitmaps(MANY_ROWS, facts_per_bitmap=4096)


@pytest.fixture(scope="module")
def few() -> sqlite3.Connection:
    return open_facts([{"width": 5, "language": "en"}, {"width": "5"}])


@settings(deadline=None, max_examples=30)
@given(condition=CONDITIONS)
def test_sets_too_large_to_hand_on_are_joined_as_python_would(
    many: sqlite3.Connection, condition: tuple[str, Predicate]
) -> None:
    text, fits = condition
    expected = [row for row, metadata in enumerate(MANY_ROWS) if fits(metadata)]
    assert chosen(many, text) == chosen(many, text, use_bitmaps=True) == expected


PIECES = [
    *("width", "language", "nope", "=", "!=", "<", ">=", "in", "(", ")", ",", "and", "or", "not", "like", "has", "is"),
    *(
        "missing",
        "'en'",
        "'",
        '"',
        "5",
        "1e400",
        "-",
        ".",
        "true",
        "%",
        "\0",
        "--",
        ";",
        " ",
        "\N{COMBINING ACUTE ACCENT}",
    ),
]
PIECED = st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join)


@settings(deadline=None, max_examples=500)
@given(text=st.text(max_size=40) | PIECED)
def test_any_text_is_a_filter_or_a_usage_error(few: sqlite3.Connection, text: str) -> None:
    with contextlib.suppress(UsageError):
        assert set(chosen(few, text)) <= {0, 1}
