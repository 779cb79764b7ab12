"""Bitmaps of rows against the facts they stand for, through random changes."""

import contextlib
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.index.index_fixture import MakeIndex, make_batch
from tests.index.metadata_fixture import chosen, open_bitmaps
from tests.index.origin_fixture import make_origin
from vlm.errors import VlmError
from vlm.index.catalog import Catalogue, update_catalogue, write_catalogue
from vlm.index.filter_language import parse_filter
from vlm.index.metadata import FieldValue, insert_field_values
from vlm.index.reader import Index
from vlm.index.row_bitmaps import MAX_ROW, bitmap_faults, has_bitmaps, row_ids, to_bitmap, update_bitmaps
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter

Fact = tuple[str, FieldValue, int]
VALUES = st.integers(0, 12) | st.sampled_from([0.5, 7.5, "", "a", "b", "c", "ä"])
FACTS = st.sets(st.tuples(st.sampled_from("xy"), VALUES, st.integers(0, 9)), max_size=25)


def delete_facts(database: sqlite3.Connection, facts: set[Fact]) -> None:
    """As an edit of metadata does."""
    query = "DELETE FROM facts WHERE field = (SELECT id FROM fields WHERE name = ?) AND value = ? AND row = ?"
    database.executemany(query, list(facts))


@settings(deadline=None, max_examples=100)
@given(changes=st.lists(FACTS, min_size=1, max_size=4), facts_per_bitmap=st.integers(1, 6), data=st.data())
def test_bitmaps_follow_random_changes_of_facts(
    changes: list[set[Fact]], facts_per_bitmap: int, data: st.DataObject
) -> None:
    database = open_bitmaps([{}], facts_per_bitmap=facts_per_bitmap)
    present: set[Fact] = set()
    for facts in changes:
        removed = data.draw(st.sets(st.sampled_from(sorted(present, key=repr)))) if present else set()
        added = facts - present
        delete_facts(database, removed)
        insert_field_values(database, added)
        update_bitmaps(database, added, removed, facts_per_bitmap=facts_per_bitmap)
        present = (present - removed) | added
        assert list(bitmap_faults(database)) == []
    for name in {field for field, _, _ in present}:
        for value in {7, "b"} & {value for field, value, _ in present if field == name}:
            expected = sorted(row for field, other, row in present if field == name and other == value)
            assert chosen(database, f"{name} = {value!r}", use_bitmaps=True) == expected


def test_a_value_of_many_rows_becomes_a_bitmap_of_its_own_and_others_share_one() -> None:
    database = open_bitmaps([{"x": [row, "same"]} for row in range(40)], facts_per_bitmap=10)
    query = "SELECT low, high, facts FROM bitmaps JOIN fields ON id = field WHERE name = 'x' ORDER BY low"
    numbers = [(first, first + 9, 10) for first in range(0, 40, 10)]
    assert database.execute(query).fetchall() == [*numbers, ("same", "same", 40)]
    assert chosen(database, "x > 8 and x < 31", use_bitmaps=True) == list(range(9, 31))


def test_a_bitmap_that_differs_from_its_facts_is_a_fault() -> None:
    database = open_bitmaps([{"x": row} for row in range(4)], facts_per_bitmap=2)
    database.execute("DELETE FROM facts WHERE value = 3")
    faults = list(bitmap_faults(database))
    assert faults == ["the bitmap of 'x' from 2 to 3 is not that of its facts"]


def test_a_damaged_bitmap_is_an_error_of_the_filter_and_a_fault_of_the_check() -> None:
    database = open_bitmaps([{"x": 1}] * 4, facts_per_bitmap=2)
    database.execute("UPDATE bitmaps SET rows = substr(rows, 1, 9) WHERE low = 1")
    with pytest.raises(VlmError, match=r"A bitmap of the catalogue is damaged \(.*\); build the index again"):
        chosen(database, "x = 1", use_bitmaps=True)
    assert list(bitmap_faults(database)) == ["the bitmap of 'x' from 1 to 1 is not that of its facts"]


def test_row_numbers_of_32_bits_are_held_and_higher_ones_refused() -> None:
    rows = np.array([0, 7, MAX_ROW])
    assert (row_ids(to_bitmap(rows)) == rows).all()
    with pytest.raises(VlmError, match="row number 4,294,967,296 is above 4,294,967,295"):
        to_bitmap(rows + 1)


def rows_of(path: Path, text: str) -> list[int]:
    """The rows of a catalogue that a filter selects."""
    return list(Catalogue(path).where(parse_filter(text)))


def agrees(path: Path) -> bool:
    """Whether a catalogue has bitmaps that filters use."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return has_bitmaps(database, path.name)


def test_a_catalogue_that_an_older_version_changed_is_read_by_its_facts(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    write_catalogue(path, [(row, make_origin(f"u{row}", {"x": row % 2})) for row in range(6)])
    assert agrees(path)
    assert rows_of(path, "x = 1") == [1, 3, 5]
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        # a row as it was inserted before there were bitmaps
        database.execute("CREATE TABLE kept AS SELECT * FROM bitmaps")
        database.execute("CREATE TABLE kept_state AS SELECT * FROM bitmap_state")
    update_catalogue(path, generation=1, inserted=[(6, make_origin("u6", {"x": 1}))], deleted=np.zeros(0, np.int64))
    assert agrees(path)
    assert rows_of(path, "x = 1") == [1, 3, 5, 6]
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        for name, kept in (("bitmaps", "kept"), ("bitmap_state", "kept_state")):
            database.execute(f"DELETE FROM {name}")
            database.execute(f"INSERT INTO {name} SELECT * FROM {kept}")
    assert not agrees(path)
    assert rows_of(path, "x = 1") == [1, 3, 5, 6]
    # and a change of it does not make them agree
    update_catalogue(path, generation=1, inserted=[(7, make_origin("u7", {"x": 1}))], deleted=np.zeros(0, np.int64))
    assert not agrees(path)
    assert rows_of(path, "x = 1") == [1, 3, 5, 6, 7]
    # nor does a copy of it under another name, which is how metadata were set
    copy = tmp_path / "d.sqlite"
    copy.write_bytes(path.read_bytes())
    assert not agrees(copy)


def test_a_catalogue_without_bitmaps_answers_and_changes_as_before(make_index: MakeIndex) -> None:
    folder = make_index(20)
    path = Index.open(folder).catalogue.path
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE bitmaps")
        database.execute("DROP TABLE bitmap_state")
    with IndexWriter(folder) as writer:
        writer.add(make_batch(3, 1, number=30))
        writer.set_metadata({2: {"number": 30}})
    index = Index.open(folder)
    assert list(index.catalogue.where(parse_filter("number = 30"))) == [2, 20, 21, 22]
    assert check_index(folder).faults == ()
    with IndexWriter(folder) as writer:
        writer.delete_rows(np.array([2]))
        writer.compact()
        assert agrees(writer.snapshot.catalogue.path)
    assert list(Index.open(folder).catalogue.where(parse_filter("number = 30"))) == [20, 21, 22]


def test_changes_of_an_index_keep_its_bitmaps(make_index: MakeIndex) -> None:
    folder = make_index(20)
    with IndexWriter(folder) as writer:
        for change in (
            lambda: writer.add(make_batch(3, 1)),
            lambda: writer.update(make_batch(2, 2, number=5)),
            lambda: writer.set_metadata({4: {"number": 5, "new": "x"}}),
            lambda: writer.delete(["k0"]),
            writer.rollback,
            writer.compact,
        ):
            change()
            assert agrees(writer.snapshot.catalogue.path)
            assert writer.snapshot.catalogue.recorded_count() == len(writer.snapshot)
            assert check_index(folder).faults == ()
    assert list(Index.open(folder).catalogue.where(parse_filter("new = 'x'"))) == [4]


@pytest.mark.parametrize("statement", ["DROP TABLE counts", "DELETE FROM counts", "UPDATE counts SET rows = 7"])
def test_an_index_whose_rows_an_older_version_did_not_count_is_counted(make_index: MakeIndex, statement: str) -> None:
    folder = make_index(20)
    path = Index.open(folder).catalogue.path
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)
    assert len(Index.open(folder)) == 20
    with IndexWriter(folder) as writer:
        writer.delete(["k0"])
        assert writer.snapshot.catalogue.recorded_count() == 19
