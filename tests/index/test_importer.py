"""Folders as clip-retrieval and autofaiss leave them, written by hand, become embeddings that an index takes."""

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import vlm
from tests.index.clip_retrieval_fixture import D, bring, clip_retrieval, unit, write_matrix, write_table
from vlm.cli.main import main
from vlm.errors import UsageError
from vlm.files import read_lines
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings, Origin
from vlm.index.engine_writer import InsertBatch
from vlm.index.filter_language import parse_filter
from vlm.index.interop.import_layouts import ColumnChoice
from vlm.index.reader import Index
from vlm.index.writer import IndexWriter
from vlm.service.query import Query
from vlm.service.search import SearchService


def origins_in(folder: Path) -> list[Origin]:
    return list(Embeddings.open(folder, verify=True).origins())


def rows_in(folder: Path) -> np.ndarray:
    return np.concatenate(list(Embeddings.open(folder).blocks()))


def test_a_clip_retrieval_folder_comes_in_part_by_part_and_row_by_row(tmp_path):
    # eleven parts, so that 10 would stand before 2 if names were sorted as texts
    images = clip_retrieval(tmp_path / "source", (2,) * 11)
    summary = bring(tmp_path / "source", tmp_path / "out")
    assert (summary.rows, summary.bad, summary.scaled, summary.files, summary.dimension) == (22, 0, 0, 11, D)
    found = origins_in(tmp_path / "out")
    assert [origin.uid for origin in found] == [f"{part:05d}{row:04d}" for part in range(11) for row in range(2)]
    np.testing.assert_allclose(rows_in(tmp_path / "out"), images.astype(np.float32), atol=1e-3)
    last = found[-1]
    assert last.captions == {"": ("caption 000100001",)}
    assert last.metadata == {"image_path": last.key, "url": f"http://nowhere/{last.key}.jpg", "width": 1101}
    assert (last.number, last.image_size, last.shard) == (
        1, 0, str(tmp_path / "source" / "metadata" / "metadata_10.parquet"),
    )  # fmt: skip
    assert found[0].captions == {}
    assert found[0].metadata["exif.iso"] == 100.5


def test_its_texts_come_in_as_captions(tmp_path):
    clip_retrieval(tmp_path / "source", width=2)
    summary = bring(tmp_path / "source", tmp_path / "out", modality="text")
    assert summary.modality == "text"
    assert [origin.caption_number for origin in origins_in(tmp_path / "out")] == [0] * 5
    np.testing.assert_allclose(rows_in(tmp_path / "out")[:3], unit(3, 100).astype(np.float32), atol=1e-3)


def test_an_imported_index_answers_filters_words_and_stored_items(tmp_path):
    images = clip_retrieval(tmp_path / "source", (30, 30))
    bring(tmp_path / "source", tmp_path / "out")
    build_index(tmp_path / "out", tmp_path / "index")
    index = Index.open(tmp_path / "index")
    chosen = index.catalogue.where(parse_filter("width >= 205 and exif.iso > 150 and url like 'http://%'"))
    assert list(chosen) == list(range(35, 60))
    hits = index.search(images[40:41].astype(np.float32), 3, chosen)[0]
    assert hits[0].entry.row == 40
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    assert [entry.row for entry in index.catalogue.search_text("caption 000010007", 5)] == [37]
    service = SearchService(index=index, load=pytest.fail)
    result = service.search(Query(items=("000010010",), top=2, where="width > 200"))
    assert result.hits[0].entry.uid == "000010010"


def test_a_second_import_is_added_to_the_index_of_the_first(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write_matrix(tmp_path / f"{name}.npy", unit(4, seed))
        write_table(tmp_path / f"{name}.parquet", {"key": [f"{name}{row}" for row in range(4)]})
        assert bring(tmp_path / f"{name}.npy", tmp_path / name).rows == 4
    build_index(tmp_path / "a", tmp_path / "index")
    with IndexWriter(tmp_path / "index") as writer:
        assert writer.add(InsertBatch.from_folder(tmp_path / "b")).rows == 8


def test_npy_alone_is_named_by_number_over_all_files(tmp_path):
    write_matrix(tmp_path / "source" / "x2.npy", unit(2, 2, "float32"))
    write_matrix(tmp_path / "source" / "x10.npy", unit(3, 10, "float64"))
    bring(tmp_path / "source", tmp_path / "out")
    assert [(origin.uid, origin.number) for origin in origins_in(tmp_path / "out")] == [
        ("0", 0), ("1", 1), ("2", 0), ("3", 1), ("4", 2),
    ]  # fmt: skip
    np.testing.assert_allclose(rows_in(tmp_path / "out"), np.concatenate([unit(2, 2), unit(3, 10)]), atol=1e-3)


def test_tables_elsewhere_are_named(tmp_path):
    write_matrix(tmp_path / "e" / "emb_0.npy", unit(2))
    write_table(tmp_path / "m" / "meta_0.parquet", {"id": [7, 8]})
    bring(tmp_path / "e", tmp_path / "out", metadata=tmp_path / "m", column_choice=ColumnChoice(uid="id"))
    assert [(origin.uid, origin.metadata) for origin in origins_in(tmp_path / "out")] == [
        ("7", {"id": 7}),
        ("8", {"id": 8}),
    ]


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float16(), D), pa.large_list(pa.float64())])
def test_vectors_in_a_column_of_parquet(tmp_path, kind):
    rows = unit(5, dtype="float32")
    lists = pa.array([row.astype(np.float16) if "half" in str(kind) else row for row in rows], kind)
    other = pa.array([[0.5, 0.5]] * 5, pa.list_(pa.float32()))
    columns = {"id": list("abcde"), "embedding": lists, "text_embedding": other, "thumb": [b"\xff"] * 5}
    write_table(tmp_path / "source.parquet", columns)
    summary = bring(tmp_path / "source.parquet", tmp_path / "out", column_choice=ColumnChoice(uid="id"))
    assert summary.left_out == ("text_embedding", "thumb")
    np.testing.assert_allclose(rows_in(tmp_path / "out"), rows, atol=1e-3)
    assert origins_in(tmp_path / "out")[4].metadata == {"id": "e"}


def test_values_become_what_json_and_filters_can_hold(tmp_path):
    write_matrix(tmp_path / "source" / "e.npy", unit(2))
    times = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", "UTC"))
    columns = {
        "key": ["a", "b"],
        "at": times,
        "day": [datetime.date(2024, 5, 31), None],
        "tags": [["dog", "wet"], []],
        "score": [float("inf"), 0.5],
        "ok": [True, False],
        "exif": [{"iso": 100, "raw": None}, None],
        "split": pa.array(["train", "val"]).dictionary_encode(),
        "__index_level_0__": [5, 6],
    }
    write_table(tmp_path / "source" / "e.parquet", columns)
    bring(tmp_path / "source", tmp_path / "out")
    first, second = origins_in(tmp_path / "out")
    assert first.metadata == {
        "at": "2023-11-14T22:13:20.123456789+00:00", "day": "2024-05-31", "tags": ["dog", "wet"], "ok": True,
        "exif": {"iso": 100, "raw": None}, "split": "train",
    }  # fmt: skip
    assert second.metadata == {"tags": [], "score": 0.5, "ok": False, "split": "val"}
    build_index(tmp_path / "out", tmp_path / "index")
    catalogue = Index.open(tmp_path / "index").catalogue
    rows = catalogue.where(parse_filter("tags has 'dog' and at < '2024' and ok = true and exif.iso = 100"))
    assert list(rows) == [0]


def test_values_of_a_table_stay_exact(tmp_path):
    """Hashes in DECIMAL(20, 0) became one float for many neighbours, nanoseconds were cut off, maps were lists."""
    write_matrix(tmp_path / "source" / "e.npy", unit(2))
    hashes = [1234567890123456789, 1234567890123456790]
    columns = {
        "key": ["a", "b"],
        "hash": pa.array(list(map(decimal.Decimal, hashes)), pa.decimal128(20, 0)),
        "price": pa.array([decimal.Decimal("1.10"), None], pa.decimal128(5, 2)),
        "length": pa.array([1500, None], pa.duration("ms")),
        "clock": pa.array([1, None], pa.time64("ns")),
        "counts": pa.array([[("dogs", 2)], None], pa.map_(pa.string(), pa.int64())),
        "seen": pa.array([[1], []], pa.list_(pa.timestamp("ns"))),
    }
    write_table(tmp_path / "source" / "e.parquet", columns)
    bring(tmp_path / "source", tmp_path / "out")
    first, second = origins_in(tmp_path / "out")
    assert first.metadata == {
        "hash": hashes[0], "price": 1.1, "length": "PT1.5S", "clock": "00:00:00.000000001", "counts": {"dogs": 2},
        "seen": ["1970-01-01T00:00:00.000000001"],
    }  # fmt: skip
    assert second.metadata == {"hash": hashes[1], "seen": []}
    build_index(tmp_path / "out", tmp_path / "index")
    catalogue = Index.open(tmp_path / "index").catalogue
    assert list(catalogue.where(parse_filter(f"hash = {hashes[1]}"))) == [1]
    assert list(catalogue.where(parse_filter("counts.dogs = 2"))) == [0]


def test_rows_without_direction_are_left_out_by_number_and_others_scaled(tmp_path):
    rows = unit(6, dtype="float32") * np.array([1, 3, 1, 1e-30, 1, 1e30], np.float32)[:, None]
    rows[2, 1], rows[4] = np.nan, 0
    write_matrix(tmp_path / "source" / "e.npy", rows)
    write_table(tmp_path / "source" / "e.parquet", {"key": list("abcdef")})
    summary = bring(tmp_path / "source", tmp_path / "out")
    assert (summary.rows, summary.bad, summary.scaled) == (2, 4, 1)
    assert [origin.uid for origin in origins_in(tmp_path / "out")] == ["a", "b"]
    np.testing.assert_allclose(rows_in(tmp_path / "out"), unit(6)[:2].astype(np.float32), atol=1e-3)
    incidents = [json.loads(line) for line in read_lines(tmp_path / "out" / "incidents.jsonl")]
    assert [(line["number"], line["key"], line["reason"]) for line in incidents] == [
        (2, "c", "not finite"), (3, "d", "no direction"), (4, "e", "no direction"), (5, "f", "not finite"),
    ]  # fmt: skip


def test_a_missing_vector_in_a_table_is_left_out(tmp_path):
    vectors = pa.array([[1.0] + [0.0] * (D - 1), None, [0.0] * (D - 1) + [1.0]], pa.list_(pa.float32()))
    write_table(tmp_path / "s.parquet", {"key": list("abc"), "v": vectors})
    assert bring(tmp_path / "s.parquet", tmp_path / "out").bad == 1
    assert [origin.uid for origin in origins_in(tmp_path / "out")] == ["a", "c"]


def test_shared_keys_are_told_apart_as_among_shards(tmp_path):
    for name, keys in (("m_0", ["x", "y", "y"]), ("m_1", ["x", "z"])):
        write_matrix(tmp_path / "source" / f"{name}.npy", unit(len(keys)))
        write_table(tmp_path / "source" / f"{name}.parquet", {"key": keys})
    summary = bring(tmp_path / "source", tmp_path / "out")
    assert summary.renamed == 4
    assert [origin.uid for origin in origins_in(tmp_path / "out")] == ["x@m_0", "y@m_0:1", "y@m_0:2", "x@m_1", "z"]


def test_keys_that_look_like_names_of_shared_ones_do_not_meet_them(tmp_path):
    write_matrix(tmp_path / "a.npy", unit(5))
    write_table(tmp_path / "a.parquet", {"key": ["k", "k", "k@a:1", "k@a:1@a", "j@a"]})
    bring(tmp_path / "a.npy", tmp_path / "out")
    found = [origin.uid for origin in origins_in(tmp_path / "out")]
    assert found == ["k@a:0", "k@a:1", "k@a:1@a", "k@a:1@a@a", "j@a"]


def test_a_column_without_a_name_is_left_out_and_said(tmp_path, capsys):
    write_matrix(tmp_path / "a.npy", unit(1))
    write_table(tmp_path / "a.parquet", {"key": ["k"], "": [1], "n": [2]})
    words = ["index", "import", str(tmp_path / "a.npy"), str(tmp_path / "out"), "--model", "unknown", "--json"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["left_out"] == [""]
    assert "skipped: one without a name" in printed.err
    assert origins_in(tmp_path / "out")[0].metadata == {"n": 2}


def test_the_model_is_loaded_and_its_dimension_compared(tmp_path, make_model: Callable[..., Any]):
    write_matrix(tmp_path / "e.npy", unit(2))
    bring(tmp_path / "e.npy", tmp_path / "out", model_spec="colours", load=lambda spec: make_model())
    space = Embeddings.open(tmp_path / "out").space
    assert (space.model, space.fingerprint, space.dimension) == ("colours", "colours", 8)
    with pytest.raises(UsageError, match="8 dimensions, those of wide 9"):
        bring(tmp_path / "e.npy", tmp_path / "o2", model_spec="wide", load=lambda spec: make_model(embedding_size=9))
    with pytest.raises(UsageError, match="by --model, or --model unknown"):
        bring(tmp_path / "e.npy", tmp_path / "o2", model_spec="")


def test_the_command_imports_and_says_what_it_did(tmp_path, capsys):
    clip_retrieval(tmp_path / "source")
    rows = np.load(tmp_path / "source" / "img_emb" / "img_emb_0.npy") * 2
    write_matrix(tmp_path / "source" / "img_emb" / "img_emb_0.npy", rows)
    words = ["index", "import", str(tmp_path / "source"), str(tmp_path / "out"), "--model", "unknown", "--json"]
    assert main(words) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["rows"], summary["scaled"], summary["uid_column"]) == (5, 3, "key")
    called = vlm.import_embeddings(tmp_path / "source", tmp_path / "called", model="unknown").to_json()
    assert called | {"folder": summary["folder"], "seconds": summary["seconds"]} == summary
    assert "3 vectors were not of unit length" in printed.err
    assert main(["index", "build", str(tmp_path / "out"), str(tmp_path / "index"), "--json"]) == 0
    assert main(["index", "check", str(tmp_path / "index"), "--json"]) == 0
    capsys.readouterr()
    # an imported row has no picture in a shard: the page says so
    page = tmp_path / "page.html"
    words = ["search", str(tmp_path / "index"), "--like", "000000001", "--where", "width < 200", "--html", str(page)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["uid"] == "000000001"
    assert "missing" in page.read_text()
    assert main(["index", "import", str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
