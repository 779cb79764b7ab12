import os
import resource
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from tests.index.index_fixture import insert_batch
from tests.index.origin_fixture import make_origin
from vlm.errors import UsageError, VlmError
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import EmbeddingSpace, EmbeddingsWriter, Origin, normalize_rows
from vlm.index.engine_writer import InsertBatch
from vlm.index.index_files import MapRecord
from vlm.index.reader import Index
from vlm.index.row_map import RowMap
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter

SPACE = EmbeddingSpace(model="given", fingerprint="given", dimension=8, modality="image")
KILLED = 77
Act = Callable[[IndexWriter], object]


def rows(uids: list[str], seed: int) -> InsertBatch:
    vectors = normalize_rows(np.random.default_rng(seed).standard_normal((len(uids), 8)).astype(np.float32))
    return insert_batch(vectors, [origin(uid, seed) for uid in uids], SPACE)


def origin(uid: str, seed: int) -> Origin:
    return make_origin(uid, {"seed": seed}, {"": (f"{uid} of {seed}",)})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder, in memory where the system has such a place: a change waits for the disk some ten times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def folder(place: Path) -> Path:
    """An ivf index of 60 rows with a second segment and tombstones in both."""
    writer = EmbeddingsWriter(place / "embeddings", space=SPACE, identity={})
    new = rows([f"k{n}" for n in range(50)], 0)
    (vectors,) = new.blocks()
    writer.add("/nowhere/0.tar", vectors, list(new.origins()))
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    build_index(place / "embeddings", place / "index", kind="ivf", tuning=TuningParams(nlist=4, nprobe=4))
    with IndexWriter(place / "index") as changing:
        changing.add(rows([f"a{n}" for n in range(10)], 1))
        changing.delete(["k3", "a3"])
    return place / "index"


CHANGES: dict[str, Act] = {
    "add": lambda writer: writer.add(rows([f"b{n}" for n in range(5)], 2)),
    "add and merge": lambda writer: writer.add(rows([f"b{n}" for n in range(20)], 2)),
    "update": lambda writer: writer.update(rows(["k1", "a1", "new"], 3)),
    "delete": lambda writer: writer.delete(["k5", "a5"]),
    "delete a segment": lambda writer: writer.delete([f"a{n}" for n in range(10) if n != 3]),
    "compact": lambda writer: writer.compact(),
    "compact and keep nothing": lambda writer: writer.compact(keep_previous=False),
    "set": lambda writer: writer.set_metadata({4: {"seed": 9}, 5: {"price": 1.5}}),
    "relocate": lambda writer: writer.relocate({"/nowhere/0.tar": "/elsewhere/0.tar"}),
    "roll back": lambda writer: writer.rollback(),
}


def state(folder: Path) -> dict[str, tuple[str, str, dict[str, Any], list[float]]]:
    """Of each uid its caption, its shard, its metadata and its vector."""
    index, found = Index.open(folder), {}
    for view in index.snapshot.views:
        vectors = view.segment.vectors.take(view.segment.positions_of(view.rows()))
        for entry, vector in zip(index.catalogue.entries(view.rows().tolist()), vectors, strict=True):
            found[entry.uid] = entry.captions[""][0], entry.shard, entry.metadata, vector.tolist()
    index.close()
    return found


def in_child(act: Callable[[], object]) -> int:
    """The exit code of a child of fork that does this: 0, KILLED, or 1 for an error."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def change(folder: Path, act: Act, *, die_at: int = -1) -> list[str]:
    """Do it and name the write points passed; the process ends at one of them."""
    passed: list[str] = []

    def failpoint(point: str) -> None:
        if len(passed) == die_at:
            os._exit(KILLED)
        passed.append(point)

    with IndexWriter(folder, failpoint=failpoint) as writer:
        act(writer)
    return passed


@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_any_write_point_the_index_is_as_before_or_as_after(place: Path, folder: Path, name: str) -> None:
    faiss.omp_set_num_threads(1)
    act, copy = CHANGES[name], place / "copy"
    shutil.copytree(folder, copy)
    before, points = state(folder), change(copy, act)
    after = state(copy)
    assert (after == before) == name.startswith("compact")
    found = []
    for number, point in enumerate(points):
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        assert in_child(lambda number=number: change(copy, act, die_at=number)) == KILLED
        left = state(copy)
        assert left in (before, after), f"killed at {point!r}"
        found.append(Index.open(copy).snapshot.number)
        with IndexWriter(copy):
            assert check_index(copy).strays == ()
            assert check_index(copy).faults == ()
            assert state(copy) == left
        if found[-1] == 3:
            change(copy, act)
        assert state(copy) == after
        assert check_index(copy).faults == ()
    assert found == sorted(found)
    assert set(found) == {3, 4}


def test_killed_while_a_map_is_written_there_is_the_old_one_or_the_new_one(place: Path, folder: Path) -> None:
    record = MapRecord(file="", rows=0, fitted=0, method="given", seed=0)

    def give_places(writer: IndexWriter, value: float) -> object:
        rows = writer.snapshot.rows
        return writer.set_map(rows, np.full((len(rows), 2), value, np.float32), record)

    def place_of(index: Path) -> float:
        opened = Index.open(index)
        try:
            return float(RowMap.open(opened.snapshot).places[0, 0])
        finally:
            opened.close()

    change(folder, lambda writer: give_places(writer, 0.25))
    before, copy = state(folder), place / "copy"
    shutil.copytree(folder, copy)
    points = change(copy, lambda writer: give_places(writer, 0.75))
    assert place_of(copy) == 0.75
    places = []
    for number in range(len(points)):
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        act = lambda number=number: change(copy, lambda writer: give_places(writer, 0.75), die_at=number)  # noqa: E731
        assert in_child(act) == KILLED
        places.append(place_of(copy))
        with IndexWriter(copy):
            assert (check_index(copy).strays, check_index(copy).faults) == ((), ())
        assert state(copy) == before
    assert places == sorted(places)
    assert set(places) == {0.25, 0.75}


def test_a_crash_while_a_crash_is_taken_back_is_taken_back_too(folder: Path) -> None:
    faiss.omp_set_num_threads(1)
    before, act = state(folder), CHANGES["update"]
    dies_before_the_manifest = 8
    assert in_child(lambda: change(folder, act, die_at=dies_before_the_manifest)) == KILLED
    for number in range(3):
        in_child(lambda number=number: change(folder, lambda _: None, die_at=number))
        assert state(folder) == before
    change(folder, act)
    assert state(folder)["k1"][0] == "k1 of 3"


def test_a_catalogue_killed_inside_its_commit_is_rolled_back_by_the_next_reader(place: Path, folder: Path) -> None:
    before, copy = state(folder), place / "copy"
    path = next(folder.glob("catalogue-*"))
    database = sqlite3.connect(path, isolation_level=None)
    # with so little memory changed pages go to the file before the commit, behind a journal of the old ones
    database.execute("PRAGMA cache_size = 1")
    database.execute("BEGIN")
    for number in range(40):
        database.execute("UPDATE rows SET captions = ?, died = 1", (f"{number}" * 2000,))
    shutil.copytree(folder, copy)
    database.execute("ROLLBACK")
    database.close()
    assert (copy / f"{path.name}-journal").stat().st_size > 0
    assert (copy / path.name).read_bytes() != path.read_bytes()
    assert state(copy) == before
    assert check_index(copy).faults == ()


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kibibytes", [1, 4, 24])
def test_a_full_disk_is_said_and_loses_nothing(folder: Path, name: str, kibibytes: int) -> None:
    faiss.omp_set_num_threads(1)
    before, act = state(folder), CHANGES[name]

    def fill() -> None:
        # no file may grow beyond this, as on a disk without room
        resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes << 10, kibibytes << 10))
        try:
            change(folder, act)
        except (OSError, VlmError):
            os._exit(KILLED)

    assert in_child(fill) in (KILLED, 0)
    if Index.open(folder).snapshot.number == 3:
        assert state(folder) == before
        change(folder, act)
    assert check_index(folder).faults == ()
    assert len(state(folder)) == Index.open(folder).info().rows


def test_a_writer_that_failed_goes_on_with_the_next_change(folder: Path) -> None:
    def fail_once(point: str) -> None:
        if point == "manifest" and not failed:
            failed.append(point)
            raise OSError(28, "No space left on device")

    failed: list[str] = []
    with IndexWriter(folder, failpoint=fail_once) as writer:
        with pytest.raises(OSError, match="No space left"):
            writer.update(rows(["k1"], 5))
        assert state(folder)["k1"][0] == "k1 of 0"
        assert writer.update(rows(["k2"], 6)).generation == 4
    assert state(folder)["k1"][0] == "k1 of 0"
    assert state(folder)["k2"][0] == "k2 of 6"
    assert check_index(folder).faults == ()


def test_a_writer_waits_for_nobody_and_is_freed_by_the_death_of_another(folder: Path) -> None:
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        with IndexWriter(folder):
            os.write(go, b"x")
            os.read(os.pipe()[0], 1)
    os.read(ready, 1)
    with pytest.raises(UsageError, match=rf"another process \({child}\)"):
        IndexWriter(folder)
    os.kill(child, 9)
    os.waitpid(child, 0)
    IndexWriter(folder).close()
