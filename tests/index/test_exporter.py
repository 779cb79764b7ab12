"""What leaves an index can be read by others without us, and comes back as it was."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest

import vlm
from tests.index.index_fixture import SPACE, MakeIndex, make_batch, vectors
from tests.index.origin_fixture import make_origin
from vlm.cli.main import main
from vlm.errors import UsageError
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings, EmbeddingsWriter, Origin
from vlm.index.filter_language import parse_filter
from vlm.index.interop.exporter import ExportFormat, export_index
from vlm.index.interop.importer import ImportSummary, import_embeddings
from vlm.index.reader import Index
from vlm.index.writer import IndexWriter

QUERIES = vectors(20, 99)
TARGETS: list[ExportFormat] = ["npy", "clip-retrieval", "parquet"]


@pytest.fixture
def changed(make_index: MakeIndex) -> Path:
    """300 rows, then 40 more, of which some are deleted and some in the place of others; dead rows in two segments."""
    index = make_index(300)
    with IndexWriter(index) as writer:
        writer.add(make_batch(40, 1, split="second"))
        writer.update(make_batch(3, 2, "k", split="third"))
        writer.delete([f"k{number}" for number in range(10, 20)] + ["n5"])
    return index


def answers(index: Path) -> list[list[tuple[str, float]]]:
    """Uids and scores for some questions."""
    found = Index.open(index).search(QUERIES, 5)
    return [[(hit.entry.uid, round(hit.score, 5)) for hit in line] for line in found]


def origins_by_uid(index: Path) -> dict[str, dict[str, Any]]:
    opened = Index.open(index)
    names = [field.name for field in fields(Origin)]
    entries = opened.catalogue.entries(opened.snapshot.rows.tolist())
    return {entry.uid: {name: getattr(entry, name) for name in names} for entry in entries}


def come_back(folder: Path, out: Path) -> ImportSummary:
    """Imported without a word about the model, which the export names."""
    return import_embeddings(folder, out, model_spec="", load=pytest.fail)


@pytest.mark.parametrize("to", TARGETS)
def test_what_was_exported_and_imported_answers_as_before(changed, tmp_path, to):
    summary = export_index(changed, tmp_path / "out", to=to)
    assert (summary.rows, summary.generation) == (329, 4)
    assert come_back(tmp_path / "out", tmp_path / "again").rows == 329
    build_index(tmp_path / "again", tmp_path / "index2")
    assert answers(tmp_path / "index2") == answers(changed)
    assert origins_by_uid(tmp_path / "index2") == origins_by_uid(changed)
    assert Embeddings.open(tmp_path / "again").space == SPACE
    where = parse_filter("split = 'third' or number >= 295")
    uids = [
        sorted(entry.uid for entry in opened.catalogue.entries(list(opened.catalogue.where(where))))
        for opened in (Index.open(changed), Index.open(tmp_path / "index2"))
    ]
    assert uids[0] == uids[1] != []


def test_npy_is_the_stored_rows_beside_a_table_of_them(changed, tmp_path):
    export_index(changed, tmp_path / "out", to="npy")
    matrix = np.load(tmp_path / "out" / "embeddings.npy", allow_pickle=False)
    table = pq.read_table(tmp_path / "out" / "metadata.parquet").to_pydict()
    assert matrix.dtype == np.float16
    assert matrix.shape == (329, 16)
    index = Index.open(changed)
    rows = index.catalogue.rows_by_uid(table["uid"])
    stored = index.snapshot.vectors(np.array([rows[uid] for uid in table["uid"]]))
    np.testing.assert_allclose(matrix, stored, atol=1e-3)
    assert json.loads(table["metadata"][table["uid"].index("k2")])["split"] == "third"
    assert "k10" not in table["uid"]
    # a second round changes no bit
    come_back(tmp_path / "out", tmp_path / "again")
    build_index(tmp_path / "again", tmp_path / "index2")
    export_index(tmp_path / "index2", tmp_path / "out2", to="npy")
    assert (tmp_path / "out2" / "embeddings.npy").read_bytes() == (tmp_path / "out" / "embeddings.npy").read_bytes()


def test_single_precision_rows_have_length_one(changed, tmp_path):
    export_index(changed, tmp_path / "out", to="npy", precision="float32")
    matrix = np.load(tmp_path / "out" / "embeddings.npy")
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-6)


def test_clip_retrieval_and_autofaiss_find_what_they_read(changed, tmp_path):
    """They take every .npy of img_emb and every Parquet file of metadata in the order of their names, and join rows by
    position (embedding_reader 1.8: numpy_reader, parquet_numpy_reader)."""
    export_index(changed, tmp_path / "out", to="clip-retrieval")
    matrices = sorted((tmp_path / "out" / "img_emb").glob("**/*.npy"))
    tables = sorted((tmp_path / "out" / "metadata").glob("**/*.parquet"))
    assert [path.name for path in (*matrices, *tables)] == ["img_emb_0.npy", "metadata_0.parquet"]
    matrix, table = np.load(matrices[0]), pq.read_table(tables[0], columns=["image_path", "caption", "url"]).to_pydict()
    assert len(matrix) == len(table["caption"]) == 329
    # k0 to k2 were updated: the new rows stand at the end
    assert table["image_path"][0] == "k3"
    assert table["caption"][0] == "caption of k3"
    assert set(table["url"]) == {None}


def test_parquet_has_a_column_of_vectors(changed, tmp_path):
    export_index(changed, tmp_path / "out", to="parquet")
    table = pq.read_table(tmp_path / "out" / "embeddings.parquet")
    matrix = np.stack(table["embedding"].to_numpy())
    assert matrix.dtype == np.float32
    export_index(changed, tmp_path / "half", to="parquet", precision="float16")
    half = np.stack(pq.read_table(tmp_path / "half" / "embeddings.parquet")["embedding"].to_numpy())
    assert half.dtype == np.float16
    np.testing.assert_allclose(matrix, half, atol=1e-3)


def faiss_answers(folder: Path) -> list[list[str]]:
    """Asked with FAISS alone; ids are rows of the table."""
    index = faiss.read_index(str(folder / "index.faiss"))
    names = pq.read_table(folder / "metadata.parquet")["uid"].to_pylist()
    assert index.ntotal == len(names)
    _, ids = index.search(QUERIES, 5)
    return [[names[number] for number in line] for line in ids]


def test_a_faiss_file_of_several_segments_holds_their_living_rows(changed, tmp_path):
    summary = export_index(changed, tmp_path / "out", to="faiss")
    assert (summary.faiss_kind, summary.files) == ("flat", ("index.faiss", "metadata.parquet"))
    assert faiss_answers(tmp_path / "out") == [[uid for uid, _ in line] for line in answers(changed)]


def test_a_faiss_file_of_a_whole_segment_is_the_segments_own(make_index, tmp_path):
    index = make_index(kind="ivf", tuning=TuningParams(nlist=8, nprobe=8))
    assert export_index(index, tmp_path / "out", to="faiss").faiss_kind == "ivf"
    own = (index / "segments" / "segment-00000.faiss").read_bytes()
    assert (tmp_path / "out" / "index.faiss").read_bytes() == own
    assert faiss_answers(tmp_path / "out") == [[uid for uid, _ in line] for line in answers(index)]


def test_a_faiss_file_is_made_of_the_indexs_kind_where_that_fits(make_index, tmp_path):
    index = make_index(kind="ivf", tuning=TuningParams(nlist=8, nprobe=8))
    with IndexWriter(index) as writer:
        writer.delete(["k7"])
    assert export_index(index, tmp_path / "most", to="faiss").faiss_kind == "ivf"
    assert faiss.extract_index_ivf(faiss.read_index(str(tmp_path / "most" / "index.faiss"))).nlist == 8
    assert export_index(index, tmp_path / "few", to="faiss", where="number < 5").faiss_kind == "flat"
    assert set(faiss_answers(tmp_path / "few")[0]) == {f"k{number}" for number in range(5)}


@pytest.mark.parametrize("to", [*TARGETS, "faiss"])
def test_a_filter_exports_a_part(changed, tmp_path, to):
    assert export_index(changed, tmp_path / "out", to=to, where="split = 'second' and number < 10").rows == 9
    assert not list(tmp_path.glob(".out*"))


def test_texts_keep_their_caption_and_modality(tmp_path):
    origin = replace(make_origin("a#1", {"width": 3}, {"de": ("ein Hund",)}), caption_number=1)
    writer = EmbeddingsWriter(tmp_path / "texts", space=replace(SPACE, modality="text"), identity={})
    writer.add("/nowhere/0.tar", vectors(1, 0), [origin])
    writer.finish(inputs={}, details={"shards": ["/nowhere/0.tar"]})
    build_index(tmp_path / "texts", tmp_path / "index")
    export_index(tmp_path / "index", tmp_path / "out", to="clip-retrieval")
    assert (tmp_path / "out" / "text_emb" / "text_emb_0.npy").is_file()
    assert come_back(tmp_path / "out", tmp_path / "again").modality == "text"
    assert list(Embeddings.open(tmp_path / "again").origins()) == [origin]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "number > 1000"}, "selects none"),
        ({"where": "number >"}, "filter"),
        ({"where": "hight > 3"}, "No row has the field 'hight'"),
    ],
)
def test_nothing_is_written_where_nothing_is_chosen(changed, tmp_path, options, message):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match=message):
        export_index(changed, tmp_path / "out", to="npy", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_export_of_another_model_is_not_taken_for_this_one(changed, tmp_path, make_model):
    export_index(changed, tmp_path / "out", to="npy")
    with pytest.raises(UsageError, match=r"of given \(fingerprint given\), not of colours"):
        import_embeddings(
            tmp_path / "out",
            tmp_path / "again",
            model_spec="colours",
            load=lambda spec: make_model(embedding_size=16),
        )


def test_the_command_exports_a_part_and_refuses_what_is_there(changed, tmp_path, capsys):
    words = ["index", "export", str(changed), str(tmp_path / "out"), "--to", "parquet", "--where", "number < 3"]
    assert main([*words, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["rows"], summary["files"]) == (6, ["embeddings.parquet"])
    called = vlm.export_index(changed, tmp_path / "called", to="parquet", where="number < 3").to_json()
    assert called | {"folder": summary["folder"], "seconds": summary["seconds"]} == summary
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["index", "export", str(tmp_path / "out"), str(tmp_path / "o2"), "--to", "npy"]) == 2
    assert "'export'" in capsys.readouterr().err
