import math
import sqlite3
from typing import Any

import pytest

from tests.index.origin_fixture import make_origin
from vlm.index.metadata import LONGEST_TEXT, SCHEMA, field_types, insert_metadata_fields, metadata_fields


@pytest.fixture
def database() -> sqlite3.Connection:
    opened = sqlite3.connect(":memory:")
    opened.executescript(SCHEMA)
    return opened


def facts(database: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return database.execute(
        "SELECT name, value, row FROM facts JOIN fields ON fields.id = field ORDER BY row, name, value"
    ).fetchall()


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"width": 640, "ratio": 1.5}, {("width", 640), ("ratio", 1.5)}),
        ({"exif": {"width": 640, "lens": {"name": "x"}}}, {("exif.width", 640), ("exif.lens.name", "x")}),
        ({"objects": [{"label": "dog"}, {"label": "cat"}]}, {("objects.label", "dog"), ("objects.label", "cat")}),
        ({"tags": ["dog", "wet"]}, {("tags", "dog"), ("tags", "wet")}),
        ({"tags": "dog, wet,,"}, {("tags", "dog"), ("tags", "wet")}),
        ({"good": True, "bad": False}, {("good", 1), ("bad", 0)}),
        ({"nothing": None, "none": [], "empty": {}, "nan": math.nan}, set()),
        ({"captions": ["x"], "captions_zh": ["y"], "caption_weights": [1]}, set()),
        ({"vector": [0.5] * 33, "box": [1, 2, 3, 4]}, {("box", number) for number in (1, 2, 3, 4)}),
        ({"long": "x" * 5000}, {("long", "x" * LONGEST_TEXT)}),
        ({"big": 2**70, "huge": -(10**400)}, {("big", 2.0**70), ("huge", -math.inf)}),
        ({"odd": "a\0b\ud800"}, {("odd", "a\N{REPLACEMENT CHARACTER}b?")}),
    ],
)
def test_metadata_become_facts(metadata: dict[str, Any], expected: set[tuple[str, Any]]) -> None:
    assert set(metadata_fields(make_origin("k", metadata))) == expected | {("key", "k")}


def test_key_languages_and_captions_are_fields_beside_what_metadata_calls_so() -> None:
    given = make_origin("7", {"language": "fr", "caption": "un chien"}, {"": ("a dog",), "zh": ("狗", "犬")})
    assert set(metadata_fields(given)) == {
        ("key", "7"),
        ("language", "zh"),
        ("language", "fr"),
        *(("caption", text) for text in ("a dog", "狗", "犬", "un chien")),
    }


def test_what_is_nested_without_end_is_left_out() -> None:
    nested: dict[str, Any] = {"x": 1}
    for _ in range(500):
        nested = {"x": nested}
    assert set(metadata_fields(make_origin("k", nested))) == {("key", "k")}


def test_values_keep_their_kind_and_are_kept_once(database: sqlite3.Connection) -> None:
    insert_metadata_fields(
        database, [(3, make_origin("k", {"a": [1, 1.0, "1", True], "b": "x"})), (5, make_origin("k", {"a": 0.5}))]
    )
    insert_metadata_fields(database, [(6, make_origin("k", {"c": "later", "b": 2}))])
    assert facts(database) == [
        ("a", 1, 3), ("a", "1", 3), ("b", "x", 3), ("key", "k", 3),
        ("a", 0.5, 5), ("key", "k", 5),
        ("b", 2, 6), ("c", "later", 6), ("key", "k", 6),
    ]  # fmt: skip
    assert field_types(database) == {
        "a": ("number", "text"),
        "b": ("number", "text"),
        "c": ("text",),
        "key": ("text",),
    }
