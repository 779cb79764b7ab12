import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.index.index_fixture import MakeIndex, insert_batch, make_batch, origins, vectors
from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import EmbeddingSpace
from vlm.index.reader import Index
from vlm.index.writer import IndexWriter


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - {"manifest.json", "writer.lock"}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"fingerprint": "other", "model": "runs/b"}, r"by given \(fingerprint given\).*runs/b \(fingerprint other\)"),
        ({"modality": "text"}, "image embeddings of 16 dimensions, the new rows are text embeddings of 16"),
        ({"dimension": 8}, "16 dimensions, the new rows are image embeddings of 8"),
    ],
)
def test_rows_of_another_space_are_refused(make_index: MakeIndex, space: dict[str, Any], message: str) -> None:
    folder = make_index(20)
    given_space: dict[str, Any] = {"model": "given", "fingerprint": "given", "dimension": 16, "modality": "image"}
    other = EmbeddingSpace(**given_space | space)
    rows = vectors(2, 1)[:, : other.dimension]
    with IndexWriter(folder) as writer, pytest.raises(UsageError, match=message):
        writer.add(insert_batch(rows, origins(["a", "b"]), other))


@pytest.mark.parametrize("what", ["missing", "empty", "cut", "overwritten", "no tables"])
def test_a_damaged_catalogue_is_named_and_not_the_disk(make_index: MakeIndex, what: str) -> None:
    folder = make_index(2000)
    (path,) = folder.glob("catalogue-*.sqlite")
    data = path.read_bytes()
    path.unlink()
    if what == "no tables":
        sqlite3.connect(path).execute("CREATE TABLE other (x)").connection.close()
    elif what != "missing":
        contents = {"empty": b"", "cut": data[: len(data) // 2], "overwritten": b"\xff" * len(data)}
        path.write_bytes(contents[what])
    with pytest.raises(VlmError, match=r"(damaged|missing).*build the index again") as raised:
        IndexWriter(folder)
    assert "disk is full" not in str(raised.value)


@pytest.mark.parametrize(("value", "length"), [(0.0, "0"), (np.nan, "nan"), (np.inf, "inf")])
def test_vectors_without_a_direction_are_refused_and_nothing_is_lost(
    make_index: MakeIndex, value: float, length: str
) -> None:
    folder, rows = make_index(20), vectors(3, 1)
    rows[1] = value
    stored = insert_batch(rows, origins(["a", "b", "c"]))
    before = files_in(folder)
    with IndexWriter(folder) as writer:
        with pytest.raises(VlmError, match=rf"Row 1 of the embeddings has length {length}.*Embed again"):
            writer.add(stored)
        assert files_in(folder) == before
        assert writer.add(make_batch(2, 1)).rows == 22


def test_two_new_rows_with_one_uid_are_refused(make_index: MakeIndex) -> None:
    folder = make_index(20)
    with IndexWriter(folder) as writer, pytest.raises(VlmError, match="same uid 'a'"):
        writer.add(insert_batch(vectors(2, 1), origins(["a", "a"])))


def test_a_second_writer_is_refused_and_the_first_is_named(make_index: MakeIndex) -> None:
    folder = make_index(20)
    with IndexWriter(folder), pytest.raises(UsageError, match=rf"changed by another process \({os.getpid()}\)"):
        IndexWriter(folder)
    with IndexWriter(folder) as writer:
        writer.delete(["k1"])


def test_an_index_of_an_older_layout_is_refused_with_its_cure(make_index: MakeIndex) -> None:
    folder = make_index(20)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"layout": 2', '"layout": 1'))
    for opened in (Index.open, IndexWriter):
        with pytest.raises(UsageError, match="index layout 1, this version reads 2; build the index again"):
            opened(folder)
