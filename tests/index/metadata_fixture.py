"""Fixture: metadata fields in an in-memory database, and the rows a filter selects."""

import sqlite3
from collections.abc import Sequence
from typing import Any

from tests.index.origin_fixture import make_origin
from vlm.index.filter_language import matching_rows, parse_filter
from vlm.index.metadata import SCHEMA, insert_metadata_fields
from vlm.index.row_bitmaps import row_ids, write_bitmaps

Metadata = dict[str, Any]


def open_facts(rows: Sequence[Metadata]) -> sqlite3.Connection:
    """The metadata of rows 0, 1, …, whose keys are k0, k1, …"""
    database = sqlite3.connect(":memory:")
    database.executescript(SCHEMA)
    insert_metadata_fields(database, [(row, make_origin(f"k{row}", metadata)) for row, metadata in enumerate(rows)])
    return database


def open_bitmaps(rows: Sequence[Metadata], *, facts_per_bitmap: int) -> sqlite3.Connection:
    """The same with bitmaps."""
    database = open_facts(rows)
    write_bitmaps(database, facts_per_bitmap=facts_per_bitmap)
    return database


def chosen(database: sqlite3.Connection, text: str, *, use_bitmaps: bool = False) -> list[int]:
    """The rows of a filter."""
    return row_ids(matching_rows(database, parse_filter(text), use_bitmaps=use_bitmaps)).tolist()
