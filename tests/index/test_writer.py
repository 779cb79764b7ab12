from pathlib import Path

import pytest

from tests.index.index_fixture import MakeIndex, insert_batch, make_batch, origins, uids_of, vectors
from vlm.errors import UsageError
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.filter_language import parse_filter
from vlm.index.reader import Index
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter
from vlm.manifest import read_manifest


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - {"manifest.json", "writer.lock"}


def test_added_rows_are_found_and_the_ones_before_them_too(make_index: MakeIndex) -> None:
    folder, new = make_index(), vectors(20, 1)
    with IndexWriter(folder) as writer:
        change = writer.add(make_batch(20, 1))
    assert (change.generation, change.rows, change.added, change.segments) == (2, 320, 20, 2)
    index = Index.open(folder)
    assert uids_of(index, new[7], 1) == ["n7"]
    assert uids_of(index, vectors(300, 0)[123], 1) == ["k123"]
    assert [entry.uid for entry in index.catalogue.search_text("n7", 5)] == ["n7"]


def test_a_uid_that_is_there_is_not_added_but_updated(make_index: MakeIndex) -> None:
    folder = make_index()
    new = insert_batch(vectors(3, 5), origins(["k4", "fresh", "k9"]))
    with IndexWriter(folder) as writer:
        with pytest.raises(UsageError, match=r"has 'k[49]' already \(2 of the 3 new rows.*vlm index update"):
            writer.add(new)
        assert writer.snapshot.number == 1
        change = writer.update(new)
    assert (change.added, change.replaced, change.rows, change.dead) == (1, 2, 301, 2)
    index = Index.open(folder)
    assert uids_of(index, vectors(3, 5)[0], 1) == ["k4"]
    assert "k4" not in uids_of(index, vectors(300, 0)[4], 300)[:1]
    entry = index.catalogue.find("k4")
    assert entry is not None
    assert entry.shard == "/nowhere/1.tar"


def test_deleted_rows_are_never_found_again_by_vector_word_uid_or_filter(make_index: MakeIndex) -> None:
    folder = make_index()
    with IndexWriter(folder) as writer:
        change = writer.delete(["k0", "k7"])
    assert (change.removed, change.rows, change.dead) == (2, 298, 2)
    index = Index.open(folder)
    found = uids_of(index, vectors(300, 0)[7], 1000)
    assert len(found) == 298
    assert "k7" not in found
    assert index.catalogue.find("k7") is None
    assert index.catalogue.search_text("k7", 5) == []
    assert len(index.catalogue.where(parse_filter("split = 'first'"))) == 298


def test_a_deleted_row_is_not_found_though_the_allowed_rows_name_it(make_index: MakeIndex) -> None:
    folder = make_index()
    with IndexWriter(folder) as writer:
        rows_before = writer.snapshot.catalogue.rows()
        writer.delete(["k7"])
    _, rows = Index.open(folder).nearest(vectors(300, 0)[7:8], 1000, rows_before)
    assert sorted(rows[0].tolist()) == [row for row in range(300) if row != 7]


def test_an_updated_row_is_gone_from_the_segment_it_is_merged_into(make_index: MakeIndex) -> None:
    folder = make_index()
    uids = ["n3", *(f"m{number}" for number in range(24))]
    with IndexWriter(folder) as writer:
        writer.add(make_batch(20, 1))
        change = writer.update(insert_batch(vectors(25, 5), origins(uids)))
    assert (change.replaced, change.rows, change.segments, change.dead) == (1, 344, 2, 0)
    found = uids_of(Index.open(folder), vectors(20, 1)[3], 1000)
    assert len(found) == len(set(found)) == 344
    assert found[0] != "n3"


def test_deleting_what_is_not_there_names_it_and_deletes_nothing(make_index: MakeIndex) -> None:
    folder = make_index()
    with IndexWriter(folder) as writer, pytest.raises(UsageError, match=r"no 'ghost' \(1 of 2 uids.*nothing was"):
        writer.delete(["k1", "ghost"])
    assert read_manifest(folder, "index").generation == 1


def test_rows_are_deleted_by_a_filter(make_index: MakeIndex) -> None:
    folder = make_index()
    with IndexWriter(folder) as writer:
        condition = parse_filter("number < 10 or number >= 290")
        assert writer.delete_rows(writer.snapshot.catalogue.where(condition)).removed == 20
        assert writer.delete_rows(writer.snapshot.catalogue.where(condition)).removed == 0
    assert read_manifest(folder, "index").generation == 2


def test_a_uid_may_come_back_after_its_deletion_and_its_row_number_does_not(make_index: MakeIndex) -> None:
    folder, numbers = make_index(), []
    with IndexWriter(folder) as writer:
        for _ in range(3):
            writer.add(make_batch(1, 1))
            entry = writer.snapshot.catalogue.find("n0")
            assert entry is not None
            numbers.append(entry.row)
            writer.delete(["n0"])
            writer.compact()
    assert numbers == [300, 301, 302]


def test_everything_may_be_deleted_and_filled_again(make_index: MakeIndex) -> None:
    folder = make_index(40)
    with IndexWriter(folder) as writer:
        writer.delete([f"k{n}" for n in range(40)])
        assert Index.open(folder).search(vectors(2, 3), 5) == [[], []]
        assert writer.compact().segments == 0
        assert Index.open(folder).info().rows == 0
        writer.add(make_batch(6, 1))
    assert uids_of(Index.open(folder), vectors(6, 1)[2], 1) == ["n2"]


def test_compaction_leaves_one_segment_of_the_index_kind_and_no_dead_rows(make_index: MakeIndex) -> None:
    folder = make_index(500, kind="ivf", tuning=TuningParams(nlist=10, nprobe=10))
    with IndexWriter(folder) as writer:
        writer.add(make_batch(100, 1))
        writer.delete([f"k{n}" for n in range(50)])
        before = [[hit.entry.uid for hit in hits] for hits in Index.open(folder).search(vectors(20, 9), 10)]
        change = writer.compact(keep_previous=False)
        assert writer.compact().generation == change.generation
    assert (change.rows, change.segments, change.dead) == (550, 1, 0)
    index = Index.open(folder)
    assert [[hit.entry.uid for hit in hits] for hits in index.search(vectors(20, 9), 10)] == before
    info = index.info()
    assert (info.kind, info.parameters["nlist"], info.dead, info.fresh) == ("ivf", 10, 0, 0)
    assert files_in(folder) == {f"segment-00002.{suffix}" for suffix in ("faiss", "npy", "rows.npy")} | {
        "catalogue-00004.sqlite"
    }


def test_a_kind_that_no_longer_fits_gives_way_to_flat_and_says_so(
    make_index: MakeIndex, logged: pytest.LogCaptureFixture
) -> None:
    folder = make_index(500, kind="ivf")
    with IndexWriter(folder) as writer:
        writer.delete([f"k{n}" for n in range(450)])
        writer.compact()
        assert "does not fit these rows" in logged.text
        with pytest.raises(UsageError, match="at least 312 rows"):
            writer.compact(kind="ivf")
        assert len(Index.open(folder)) == 50
    assert Index.open(folder).info().kind == "flat"


def test_many_small_additions_stay_few_segments(make_index: MakeIndex) -> None:
    folder = make_index(200)
    with IndexWriter(folder) as writer:
        changes = [writer.add(make_batch(1, number, name=f"x{number}-")) for number in range(33)]
    assert max(change.segments for change in changes) <= 8
    assert changes[-1].rows == 233
    assert uids_of(Index.open(folder), vectors(1, 20)[0], 1) == ["x20-0"]


def test_a_reader_stays_on_its_generation_until_it_refreshes(make_index: MakeIndex) -> None:
    folder, new = make_index(), vectors(20, 1)
    readers = [Index.open(folder), Index.open(folder)]
    with IndexWriter(folder) as writer:
        writer.add(make_batch(20, 1))
        writer.delete(["k1"])
        writer.compact()
        writer.delete(["k2"])
    assert readers[0].refresh()
    assert not readers[0].refresh()
    assert uids_of(readers[0], new[3], 1) == ["n3"]
    assert [len(reader) for reader in readers] == [318, 300]
    old = uids_of(readers[1], vectors(300, 0)[1], 1000)
    assert old[0] == "k1"
    assert len(old) == 300
    assert readers[1].refresh()
    assert "k1" not in uids_of(readers[1], vectors(300, 0)[1], 1000)


def test_refreshing_opens_only_what_is_new(make_index: MakeIndex) -> None:
    folder = make_index()
    index = Index.open(folder)
    held = index.snapshot.views[0].segment
    with IndexWriter(folder) as writer:
        writer.add(make_batch(20, 1))
    index.refresh()
    assert index.snapshot.views[0].segment is held


def test_a_folder_built_anew_under_the_same_name_is_noticed(make_index: MakeIndex, tmp_path: Path) -> None:
    folder = make_index()
    index = Index.open(folder)
    folder.rename(tmp_path / "away")
    with pytest.raises(UsageError, match="has no manifest"):
        index.refresh()
    assert len(index) == 300
    build_index(tmp_path / "embeddings", folder)
    assert index.refresh()
    assert uids_of(index, vectors(300, 0)[5], 1) == ["k5"]


def test_rows_that_no_segment_has_any_more_leave_the_catalogue_with_the_next_compaction(make_index: MakeIndex) -> None:
    folder = make_index(40)
    with IndexWriter(folder) as writer:
        writer.add(make_batch(4, 1))
        writer.delete([f"n{n}" for n in range(4)])
        assert (len(writer.snapshot.dead), writer.snapshot.catalogue.count_hidden()) == (0, 4)
        writer.compact()
        assert writer.snapshot.catalogue.count_hidden() == 0
        assert writer.compact().generation == 4


def test_info_tells_what_lives_and_where(make_index: MakeIndex) -> None:
    folder = make_index(500, kind="ivf")
    with IndexWriter(folder) as writer:
        writer.add(make_batch(30, 1))
        writer.delete(["k0", "n0"])
    info = Index.open(folder).info()
    assert (info.rows, info.dead, info.fresh, info.generation, info.num_shards) == (528, 2, 29, 3, 2)
    assert [(segment.kind, segment.rows, segment.dead) for segment in info.segments] == [
        ("ivf", 499, 1),
        ("flat", 29, 1),
    ]


def test_only_rows_of_a_filter_are_replaced(make_index: MakeIndex) -> None:
    folder = make_index(50)
    rows, new = vectors(30, 7), origins([f"k{n}" for n in range(25, 50)] + [f"n{n}" for n in range(5)], split="new")
    with IndexWriter(folder) as writer:
        chosen = writer.snapshot.catalogue.where(parse_filter("number >= 40 or number < 3"))
        change = writer.update(insert_batch(rows, new), allowed_rows=chosen)
        assert (change.added, change.replaced, change.left_out, change.rows, change.dead) == (0, 10, 20, 50, 10)
        nobody = writer.snapshot.catalogue.where(parse_filter("number < 3 and split = 'first'"))
        change = writer.update(insert_batch(rows, new), allowed_rows=nobody)
        assert (change.replaced, change.left_out, change.generation) == (0, 30, 2)
    index = Index.open(folder)
    replaced = index.catalogue.where(parse_filter("split = 'new'"))
    assert {entry.uid for entry in index.catalogue.entries(list(replaced))} == {f"k{n}" for n in range(40, 50)}
    assert uids_of(index, rows[15], 1) == ["k40"]
    assert uids_of(index, vectors(50, 0)[30], 1) == ["k30"]
    assert check_index(folder).faults == ()
