"""Metadata set, shards relocated, and the version before brought back; the vectors stay."""

import shutil
from pathlib import Path

import pytest

from tests.index.index_fixture import MakeIndex, make_batch, uids_of, vectors
from vlm.errors import UsageError, VlmError
from vlm.index.catalog import Entry
from vlm.index.filter_language import parse_filter
from vlm.index.reader import Index
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter


def entry_of(index: Index, uid: str) -> Entry:
    """The entry of a uid that exists."""
    entry = index.catalogue.find(uid)
    assert entry is not None
    return entry


def rows_of(folder: Path, text: str) -> list[int]:
    """The rows that a filter selects."""
    index = Index.open(folder)
    return list(index.catalogue.where(parse_filter(text)))


def test_metadata_is_set_exactly_and_filters_see_the_new_values_alone(make_index: MakeIndex) -> None:
    folder, exact = make_index(20), 2**53 + 1
    with IndexWriter(folder) as writer:
        change = writer.set_metadata({3: {"number": exact, "price": 12.5}, 4: {"split": None}, 5: {"number": 5}})
    assert (change.generation, change.edited, change.rows, change.added, change.removed) == (2, 2, 20, 0, 0)
    assert entry_of(Index.open(folder), "k3").metadata == {"number": exact, "split": "first", "price": 12.5}
    assert rows_of(folder, f"number = {exact}") == [3]
    assert rows_of(folder, f"number = {exact - 1}") == rows_of(folder, "number = 3") == []
    assert rows_of(folder, "price > 12 and price < 13") == [3]
    assert rows_of(folder, "split is missing") == [4]
    assert check_index(folder).faults == ()
    assert uids_of(Index.open(folder), vectors(20, 0)[3], 1) == ["k3"]


def test_an_open_reader_keeps_the_metadata_of_its_version(make_index: MakeIndex) -> None:
    folder = make_index(20)
    reader = Index.open(folder)
    with IndexWriter(folder) as writer:
        writer.set_metadata({3: {"split": "second"}})
        writer.set_metadata({4: {"split": "second"}})
    assert entry_of(reader, "k3").metadata["split"] == "first"
    assert reader.refresh()
    assert entry_of(reader, "k3").metadata["split"] == "second"


def test_nothing_to_set_makes_no_version(make_index: MakeIndex) -> None:
    with IndexWriter(make_index(20)) as writer:
        assert writer.set_metadata({}).generation == writer.relocate({"/x.tar": "/x.tar"}).generation == 1
        assert writer.relocate({"/nowhere.tar": "/elsewhere.tar"}).generation == 1


def test_values_that_rows_have_already_make_no_version_and_leave_the_one_before_to_roll_back_to(
    make_index: MakeIndex,
) -> None:
    folder = make_index(20)
    with IndexWriter(folder) as writer:
        assert writer.set_metadata({3: {"price": 1}, 4: {"price": 2}}).generation == 2
        again = writer.set_metadata({3: {"price": 1, "absent": None}, 4: {"price": 2}})
        assert (again.generation, again.edited) == (2, 0)
        # equal in Python, but not as stored
        assert writer.set_metadata({3: {"price": 1.0}, 4: {"price": 2}}).edited == 1
        writer.rollback()
    assert rows_of(folder, "price > 0") == [3, 4]
    assert entry_of(Index.open(folder), "k3").metadata["price"] == 1


def test_shards_lie_elsewhere_and_may_exchange_or_share_their_places(make_index: MakeIndex) -> None:
    folder = make_index(20)
    with IndexWriter(folder) as writer:
        writer.add(make_batch(3, 1))
        writer.update(make_batch(1, 2))
        change = writer.relocate({"/nowhere/1.tar": "/nowhere/0.tar", "/nowhere/0.tar": "/new/0.tar"})
        assert (change.edited, change.rows) == (23, 23)
        assert check_index(folder).faults == ()
        assert entry_of(Index.open(folder), "n1").shard == "/nowhere/0.tar"
        writer.relocate({"/nowhere/0.tar": "/new/1.tar", "/new/0.tar": "/new/1.tar"})
    index = Index.open(folder)
    assert {entry_of(index, uid).shard for uid in ("k1", "n1")} == {"/new/1.tar"}
    assert index.details.shards == ("/new/1.tar",)
    assert check_index(folder).faults == ()


def test_a_rollback_undoes_the_last_change_and_a_second_one_redoes_it(make_index: MakeIndex) -> None:
    folder = make_index(40)
    with IndexWriter(folder) as writer:
        writer.add(make_batch(5, 1))
        writer.delete(["k1", "n1"])
        for rows, is_there in ((45, True), (43, False), (45, True)):
            change = writer.rollback()
            index = Index.open(folder)
            assert (change.rows, len(index)) == (rows, rows)
            assert (index.catalogue.find("k1") is not None) == is_there
            assert ("k1" in uids_of(index, vectors(40, 0)[1], 1)) == is_there
            assert check_index(folder).faults == check_index(folder).strays == ()
        assert change.generation == 6


def test_a_compaction_can_be_rolled_back_unless_it_kept_nothing(make_index: MakeIndex) -> None:
    folder = make_index(40)
    with IndexWriter(folder) as writer:
        writer.delete(["k1"])
        writer.compact()
        assert writer.rollback().dead == 1
        writer.add(make_batch(1, 3))
        assert writer.rollback().rows == 39
        writer.compact(keep_previous=False)
        with pytest.raises(UsageError, match="no version before 7 to roll back to: its last change kept none"):
            writer.rollback()
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert len([name for name in names if name.startswith("catalogue")]) == 1


def test_a_compact_index_can_still_discard_the_version_before(make_index: MakeIndex) -> None:
    folder = make_index(40)
    with IndexWriter(folder) as writer:
        writer.delete(["k1"])
        writer.compact()
        before = writer.compact(keep_previous=False)
        assert before.generation == 3
        with pytest.raises(UsageError, match="its last change kept none"):
            writer.rollback()
    assert Index.open(folder).info().kept_bytes == 0
    assert check_index(folder).strays == check_index(folder).faults == ()


def test_rows_added_after_a_rollback_get_new_numbers(make_index: MakeIndex) -> None:
    folder = make_index(10)
    with IndexWriter(folder) as writer:
        writer.add(make_batch(2, 1))
        writer.rollback()
        writer.add(make_batch(2, 1))
    assert entry_of(Index.open(folder), "n0").row == 12
    assert check_index(folder).faults == ()


def test_a_reader_of_the_version_that_is_rolled_back_keeps_it(make_index: MakeIndex) -> None:
    folder = make_index(10)
    with IndexWriter(folder) as writer:
        writer.delete(["k1"])
        reader = Index.open(folder)
        writer.rollback()
        writer.add(make_batch(2, 1))
    assert len(reader) == 9
    assert reader.catalogue.find("k1") is None
    assert len(reader.catalogue.where(parse_filter("split = 'first'"))) == 9


def test_a_new_index_has_nothing_to_roll_back_to(make_index: MakeIndex) -> None:
    with IndexWriter(make_index(10)) as writer, pytest.raises(UsageError, match="nothing has changed since it was"):
        writer.rollback()


@pytest.mark.parametrize("name", ["segments/segment-00000.npy", "versions/00001.json", "catalogue-00001.sqlite"])
def test_what_is_damaged_is_not_brought_back(make_index: MakeIndex, name: str) -> None:
    folder = make_index(10)
    with IndexWriter(folder) as writer:
        writer.compact(kind="sq8")
        path = folder / name
        shutil.copy(path, folder.parent / "copy")
        if name.startswith("catalogue"):
            path.unlink()
        else:
            path.write_bytes(b"{" + path.read_bytes()[1:-3] + b"xyz")
        with pytest.raises(VlmError, match=r"damaged|cannot be restored"):
            writer.rollback()
        assert len(Index.open(folder)) == 10
        shutil.copy(folder.parent / "copy", path)
        assert writer.rollback().rows == 10
