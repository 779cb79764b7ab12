"""The map of an index: like rows together, the same each time, new rows among their nearest, deleted ones gone."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import vlm
from tests.index.index_fixture import MakeIndex, insert_batch, make_batch, origins, vectors
from vlm.cli.main import main
from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import normalize_rows
from vlm.index.index_files import MapRecord
from vlm.index.reader import Index
from vlm.index.row_map import MOST_PLACED, RowMap, lay_out
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter

RECORD = MapRecord(file="", rows=0, fitted=0, method="given", seed=0)


def clusters(count: int, *, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows in clusters, and the cluster of each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(count), each)
    centres = rng.standard_normal((count, 64))
    return normalize_rows((centres[labels] + 0.4 * rng.standard_normal((len(labels), 64))).astype(np.float32)), labels


def circle(count: int) -> np.ndarray:
    """Places of rows, one after another on a circle."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def with_circle(folder: Path) -> Path:
    """The index with a map on which its rows lie on a circle."""
    with IndexWriter(folder) as writer:
        rows = writer.snapshot.rows
        writer.set_map(rows, circle(len(rows)), RECORD)
    return folder


def share_near(places: np.ndarray, labels: np.ndarray) -> float:
    """How many of the ten nearest on the map are of the same cluster."""
    distances = ((places[:, None] - places[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    nearest = np.argsort(distances, axis=1)[:, :10]
    return float((labels[nearest] == labels[:, None]).mean())


def test_like_rows_lie_together_and_the_same_seed_gives_the_same_map() -> None:
    rows, labels = clusters(6, each=50)
    layout = lay_out(np.arange(len(rows)), lambda numbers: rows[numbers], sample=200)
    assert layout.fitted == 200
    # the hundred beyond the sample among them
    assert share_near(layout.places, labels) > 0.9
    assert np.abs(layout.places).max() == pytest.approx(1)
    again = lay_out(np.arange(len(rows)), lambda numbers: rows[numbers], sample=200)
    assert (again.places == layout.places).all()


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_few_rows_have_a_map_too(count: int) -> None:
    rows = vectors(count, 0)
    layout = lay_out(np.arange(count), lambda numbers: rows[numbers])
    assert np.isfinite(layout.places).all()
    assert len(np.unique(layout.places, axis=0)) == (count if count > 2 else 1)


def test_equal_rows_have_a_map_too() -> None:
    rows = np.repeat(vectors(1, 0), 40, axis=0)
    assert np.isfinite(lay_out(np.arange(40), lambda numbers: rows[numbers]).places).all()


def test_a_map_is_part_of_the_index_through_every_change(make_index: MakeIndex) -> None:
    folder = with_circle(make_index(60))
    assert Index.open(folder).info().map_rows == 60
    assert check_index(folder).faults == check_index(folder).strays == ()
    with IndexWriter(folder) as writer:
        writer.add(make_batch(5, 1))
        writer.delete(["k3", "k4"])
        writer.set_metadata({5: {"colour": "red"}})
        writer.compact()
    opened = RowMap.open(Index.open(folder).snapshot)
    assert (len(opened), opened.num_new, opened.num_unplaced) == (63, 5, 0)
    old = opened.positions_of(np.array([0, 5, 59]))
    assert np.allclose(opened.places[old], circle(60)[[0, 5, 59]])
    assert check_index(folder).faults == check_index(folder).strays == ()


def test_a_new_row_lies_where_its_like_are_and_a_deleted_one_vanishes(make_index: MakeIndex) -> None:
    folder = with_circle(make_index(60))
    before = RowMap.open(Index.open(folder).snapshot)
    with IndexWriter(folder) as writer:
        writer.add(insert_batch(vectors(60, 0)[7:8], origins(["twin"])))
        writer.delete(["k7", "k8"])
        # placed among what is left
        writer.add(insert_batch(vectors(60, 0)[9:10], origins(["other"])))
    opened = RowMap.open(Index.open(folder).snapshot, before)
    rows = {entry.uid: row for row, entry in Index.open(folder).snapshot.entries()}
    assert len(opened.positions_of(np.array([7, 8]))) == 0
    [other] = opened.positions_of(np.array([rows["other"]]))
    assert np.allclose(opened.places[other], circle(60)[9], atol=0.01)
    [twin] = opened.positions_of(np.array([rows["twin"]]))
    assert np.abs(opened.places[twin]).max() <= 1
    # a reader that goes on keeps the places that it has given
    with IndexWriter(folder) as writer:
        writer.delete(["k9"])
    later = RowMap.open(Index.open(folder).snapshot, opened)
    assert (later.places[later.positions_of(np.array([rows["other"]]))] == opened.places[other]).all()


def test_more_new_rows_than_a_reader_places_are_counted(make_index: MakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_PLACED >= 1000
    monkeypatch.setattr("vlm.index.row_map.MOST_PLACED", 3)
    folder = with_circle(make_index(20))
    with IndexWriter(folder) as writer:
        writer.add(make_batch(5, 1))
    opened = RowMap.open(Index.open(folder).snapshot)
    assert (len(opened), opened.num_new, opened.num_unplaced) == (23, 3, 2)


def test_a_map_whose_rows_are_all_deleted_places_nothing(make_index: MakeIndex) -> None:
    folder = with_circle(make_index(5))
    with IndexWriter(folder) as writer:
        writer.update(make_batch(2, 1))
        writer.delete([f"k{number}" for number in range(5)])
    opened = RowMap.open(Index.open(folder).snapshot)
    assert (len(opened), opened.num_unplaced) == (0, 2)
    assert opened.sample(None, 10)[0].tolist() == opened.positions_of(np.array([1])).tolist() == []


def test_a_region_shows_the_same_rows_from_near_and_far(make_index: MakeIndex) -> None:
    opened = RowMap.open(Index.open(with_circle(make_index(300))).snapshot)
    far, everything = opened.sample(None, 50)
    near, inside = opened.sample([0, 0, 1, 1], 50)
    assert (len(far), everything, len(near)) == (50, 300, 50)
    assert inside == pytest.approx(75, abs=2)
    in_box = {position for position in far.tolist() if (opened.places[position] >= 0).all()}
    assert in_box < set(near.tolist())
    filtered, matching = opened.sample([0, 0, 1, 1], 50, np.array([0, 1, 200]))
    assert (sorted(filtered.tolist()), matching) == ([0, 1], 2)


def test_a_map_is_made_anew_and_rolled_back(make_index: MakeIndex) -> None:
    folder = with_circle(make_index(20))
    with IndexWriter(folder) as writer:
        writer.set_map(writer.snapshot.rows, -circle(20), RECORD)
        assert np.allclose(RowMap.open(writer.snapshot).places, -circle(20))
        writer.rollback()
        assert np.allclose(RowMap.open(writer.snapshot).places, circle(20))
        writer.rollback()
        assert np.allclose(RowMap.open(writer.snapshot).places, -circle(20))
    assert check_index(folder).faults == check_index(folder).strays == ()


def test_a_damaged_map_is_found_by_the_check_and_said_by_the_reader(make_index: MakeIndex) -> None:
    folder = with_circle(make_index(20))
    [path] = (folder / "maps").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x7F
    path.write_bytes(data)
    assert [fault.part for fault in check_index(folder).faults] == ["files"]
    path.write_bytes(data[:200])
    with pytest.raises(VlmError, match=r"maps/00002\.npy"):
        Index.open(folder)


def test_an_index_of_before_maps_opens_and_has_none(make_index: MakeIndex) -> None:
    folder = make_index(20)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["details"]["map"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    index = Index.open(folder)
    assert index.info().map_rows == 0
    with pytest.raises(UsageError, match="has no map; make one with vlm index map"):
        RowMap.open(index.snapshot)


def test_the_command_and_the_call_make_the_same_map(make_index: MakeIndex, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_index(20)
    assert main(["index", "map", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"generation": 2, "rows": 20, "fitted": 20}.items() <= shown.items()
    by_command = RowMap.open(Index.open(folder).snapshot)
    with vlm.open_index(folder) as index:
        assert index.make_map().to_json().keys() == shown.keys()
        assert index.info().map_rows == 20
    assert (RowMap.open(Index.open(folder).snapshot).places == by_command.places).all()
    assert main(["index", "map", str(folder)]) == 0
    assert "next: vlm serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "3"], "sample = 3 is out of range: a map needs at least 30."),
        (["--seed", "-1"], "seed = -1 is out of range"),
    ],
)
def test_a_mistake_is_one_clear_sentence(
    make_index: MakeIndex, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["index", "map", str(make_index(20)), *options]) == 2
    assert message in capsys.readouterr().err


def test_without_the_extra_the_cure_is_named(
    make_index: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    assert main(["index", "map", str(make_index(20))]) == 2
    assert "A map needs umap: pip install 'vlm-pipeline[map]'." in capsys.readouterr().err


def test_an_index_without_rows_has_no_map(make_index: MakeIndex) -> None:
    folder = make_index(2)
    with vlm.open_index(folder) as index:
        index.delete(["k0", "k1"])
        with pytest.raises(UsageError, match="has no rows to lay out"):
            index.make_map()
