"""Folders that do not hold together, and wishes they cannot meet, are refused; nothing is left behind."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.index.clip_retrieval_fixture import D, bring, clip_retrieval, unit, write_matrix, write_table
from vlm.errors import UsageError, VlmError
from vlm.index.interop.import_layouts import ColumnChoice


def damaged(folder: Path, what: str) -> None:
    """One fault in a folder of two parts."""
    clip_retrieval(folder)
    table, matrix = folder / "metadata" / "metadata_1.parquet", folder / "img_emb" / "img_emb_1.npy"
    if what == "rows":
        write_matrix(matrix, unit(4))
    elif what == "dimensions":
        write_matrix(matrix, np.ones((2, D + 1), np.float16))
    elif what == "no table":
        table.unlink()
    elif what == "no tables":
        (folder / "metadata").rename(folder / "elsewhere")
    elif what == "cut npy":
        matrix.write_bytes(matrix.read_bytes()[:-5])
    elif what == "no npy":
        matrix.write_bytes(b"<html>")
    elif what == "cut parquet":
        table.write_bytes(table.read_bytes()[:-5])
    elif what == "damaged column":
        data = bytearray(table.read_bytes())
        data[4:60] = bytes(56)
        table.write_bytes(data)
    elif what == "integers":
        write_matrix(matrix, np.ones((2, D), np.int8))
    elif what == "null uid":
        write_table(table, {"key": ["a", None], "image_path": ["a", "b"], "caption": ["", ""]})
    elif what == "empty uid":
        write_table(table, {"key": ["a", ""], "image_path": ["a", "b"], "caption": ["", ""]})
    elif what == "no column":
        write_table(table, {"url": ["a", "b"]})
    elif what == "zeros":
        for path in (matrix, folder / "img_emb" / "img_emb_0.npy"):
            write_matrix(path, np.zeros_like(np.load(path)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", r"img_emb_1.npy has 4 rows and .*metadata_1.parquet 2"),
        ("dimensions", r"img_emb_0.npy has vectors of 8 dimensions, .*img_emb_1.npy of 9"),
        ("no table", r"img_emb_1.npy has no partner"),
        ("no tables", r"no tables in metadata/"),
        ("cut npy", r"img_emb_1.npy cannot be read as an array"),
        ("no npy", r"img_emb_1.npy cannot be read as an array"),
        ("cut parquet", r"metadata_1.parquet cannot be read as Parquet"),
        ("damaged column", r"metadata_1.parquet cannot be read as Parquet"),
        ("integers", r"img_emb_1.npy holds int8 of shape \(2, 8\)"),
        ("null uid", r"Row 1 of .*metadata_1.parquet has no 'key'"),
        ("empty uid", r"Row 1 of .*metadata_1.parquet has no 'key' \(1 such\)"),
        ("no column", r"metadata_1.parquet has no column 'key'"),
        ("zeros", r"No vector can be used"),
    ],
)
def test_what_does_not_hold_together_is_refused_and_leaves_nothing(tmp_path, what, message):
    damaged(tmp_path / "source", what)
    with pytest.raises(VlmError, match=message):
        bring(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("column_choice", "message"),
    [
        (ColumnChoice(uid="kye"), "no column 'kye'; did you mean 'key'"),
        (ColumnChoice(caption="title"), "no column 'title'"),
        (ColumnChoice(uid="exif.iso"), "holds double; a uid is a text or a whole number"),
    ],
)
def test_a_column_that_is_not_there_or_does_not_fit_is_refused(tmp_path, column_choice, message):
    clip_retrieval(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        bring(tmp_path / "source", tmp_path / "out", column_choice=column_choice)


def test_the_column_of_vectors_must_be_clear(tmp_path):
    vectors = pa.array([[1.0, 0.0]], pa.list_(pa.float32()))
    write_table(tmp_path / "s.parquet", {"a": vectors, "b": vectors, "n": [1]})
    with pytest.raises(UsageError, match="several: a, b"):
        bring(tmp_path / "s.parquet", tmp_path / "out")
    with pytest.raises(UsageError, match=r"'n' .* does not hold lists"):
        bring(tmp_path / "s.parquet", tmp_path / "out", column_choice=ColumnChoice(embedding="n"))
    assert bring(tmp_path / "s.parquet", tmp_path / "out", column_choice=ColumnChoice(embedding="b")).left_out == ("a",)


def test_sources_without_vectors_and_folders_that_are_there_are_refused(tmp_path):
    with pytest.raises(UsageError, match="There is no"):
        bring(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"neither \.npy nor \.parquet"):
        bring(tmp_path / "empty", tmp_path / "out")
    write_matrix(tmp_path / "e.npy", unit(2))
    bring(tmp_path / "e.npy", tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        bring(tmp_path / "e.npy", tmp_path / "out")
    with pytest.raises(UsageError, match="embeddings folder already"):
        bring(tmp_path / "out", tmp_path / "again")
    write_matrix(tmp_path / "text_emb" / "text_emb_0.npy", unit(2))
    with pytest.raises(UsageError, match="--modality text"):
        bring(tmp_path, tmp_path / "again")
