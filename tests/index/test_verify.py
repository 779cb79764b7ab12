import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import UsageError
from vlm.files import sha256_file
from vlm.index.build import build_index
from vlm.index.embeddings_folder import normalize_rows
from vlm.index.verify import check_index
from vlm.index.writer import IndexWriter

SEGMENT = "segments/segment-00000"


def faults(folder: Path) -> dict[str, str]:
    return {fault.part: fault.what for fault in check_index(folder).faults}


def rewrite(folder: Path, name: str, change: Callable[[Path], None]) -> None:
    """Change a file and let the manifest say that it was written so."""
    change(folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def update_catalogue(folder: Path, statement: str) -> None:
    database = sqlite3.connect(next(folder.glob("catalogue-*.sqlite")))
    database.execute(statement)
    database.commit()
    database.close()


@pytest.fixture
def changed(index: Path) -> Path:
    """The index with two rows deleted."""
    with IndexWriter(index) as writer:
        writer.delete(["00", "21"])
    return index


@pytest.mark.parametrize("kind", ["flat", "ivf", "sq8", "hnsw", "ivfpq"])
def test_a_sound_index_of_any_kind_has_no_faults(tmp_path: Path, embed_vectors: Callable[..., Path], kind: str) -> None:
    rows = normalize_rows(np.random.default_rng(0).standard_normal((2000, 16)).astype(np.float32))
    build_index(embed_vectors(rows), tmp_path / "index", kind=kind)
    report = check_index(tmp_path / "index", sample=100)
    assert report.faults == ()
    assert (report.rows, report.files, report.segments, report.distances) == (2000, 4, 1, 100)


def test_a_sound_index_with_tombstones_has_no_faults(changed: Path) -> None:
    report = check_index(changed)
    assert (report.faults, report.strays) == ((), ())
    assert (report.generation, report.rows, report.dead, report.files) == (2, 9, 2, 5)


@pytest.mark.parametrize("name", [f"{SEGMENT}.faiss", f"{SEGMENT}.npy", f"{SEGMENT}.rows.npy", "tombstones/00002.npy"])
def test_a_changed_byte_a_lost_byte_and_a_lost_file_are_named(changed: Path, name: str) -> None:
    path = changed / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert faults(changed)["files"] == f"{name} has a different checksum than it was written with"
    path.write_bytes(data[:-1])
    assert "bytes" in faults(changed)["files"]
    path.unlink()
    assert faults(changed)["files"] == f"{name} is missing"


@pytest.mark.parametrize(
    ("statement", "part", "message"),
    [
        ("UPDATE rows SET captions = '{}' WHERE uid = '01'", "catalogue", r"row 1 \(01\) differs from what was"),
        ("UPDATE rows SET uid = 'x' WHERE uid = '01'", "catalogue", r"row 1 \(x\) differs from what was"),
        ("DELETE FROM rows WHERE uid = '01'", "joins", "is inconsistent: 9 live rows.*and 8 in"),
        ("UPDATE rows SET died = 9223372036854775807 WHERE uid = '00'", "joins", "9 live rows.*and 10 in"),
        ("DELETE FROM facts WHERE row = 1", "facts", r"the facts of row 1 \(01\)"),
        ("UPDATE facts SET value = 17 WHERE value = 16 AND row = 1", "facts", r"the facts of row 1 \(01\)"),
    ],
)
def test_a_catalogue_that_was_changed_by_hand_is_noticed(
    changed: Path, statement: str, part: str, message: str
) -> None:
    update_catalogue(changed, statement)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(faults(changed)[part])


def test_rows_of_the_catalogue_and_of_the_segments_that_differ_are_noticed_at_equal_counts(changed: Path) -> None:
    update_catalogue(changed, "UPDATE rows SET died = 9223372036854775807 WHERE uid = '00'")
    update_catalogue(changed, "UPDATE rows SET died = 2 WHERE uid = '01'")
    found = [fault.what for fault in check_index(changed).faults]
    assert found == [
        "row 1 (1 such) is in a segment, but not in the catalogue",
        "row 0 (1 such) is in the catalogue, but in no segment",
    ]


def test_vectors_that_are_not_those_of_faiss_are_noticed(changed: Path) -> None:
    def exchange(path: Path) -> None:
        rows = np.load(path)
        np.save(path, rows[::-1])

    rewrite(changed, f"{SEGMENT}.npy", exchange)
    assert "is off by" in faults(changed)["distances"]


def test_vectors_without_a_length_are_noticed(changed: Path) -> None:
    def erase(path: Path) -> None:
        rows = np.load(path)
        rows[4] = np.nan
        np.save(path, rows)

    rewrite(changed, f"{SEGMENT}.npy", erase)
    assert "row 4 has length nan" in faults(changed)["vectors"]


def test_files_of_no_generation_are_told_and_the_next_change_removes_them(changed: Path) -> None:
    (changed / "segments/segment-00009.npy").write_bytes(b"x")
    assert check_index(changed).strays == ("segments/segment-00009.npy",)
    with IndexWriter(changed):
        assert check_index(changed).strays == ()


def test_what_is_no_index_is_refused(embeddings: Path) -> None:
    with pytest.raises(UsageError, match="'index' was expected"):
        check_index(embeddings)
