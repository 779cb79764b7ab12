"""FAISS files as a source: our own exports, autofaiss's `knn.index`, clip-retrieval's `image.index` with its tables."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from tests.index.clip_retrieval_fixture import D, bring, unit, write_table
from tests.index.index_fixture import MakeIndex, vectors
from vlm.cli.main import main
from vlm.errors import UsageError, VlmError
from vlm.index.ann.index_types import TuningParams
from vlm.index.embeddings_folder import Embeddings
from vlm.index.interop.exporter import export_index
from vlm.index.interop.importer import import_embeddings
from vlm.index.reader import Index


def write_faiss(path: Path, rows: np.ndarray, spec: str = "Flat") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    index = faiss.index_factory(rows.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    if spec.startswith("IDMap"):
        index.add_with_ids(rows, np.arange(7, 7 + len(rows)))
    else:
        index.add(rows)
    faiss.write_index(index, str(path))
    return path


def rows_in(folder: Path) -> np.ndarray:
    return np.concatenate(list(Embeddings.open(folder, verify=True).blocks()))


@pytest.mark.parametrize(
    ("kind", "tuning", "is_exact"),
    [
        ("flat", TuningParams(), True),
        ("hnsw", TuningParams(), True),
        ("ivf", TuningParams(nlist=8), True),
        ("ivfsq", TuningParams(nlist=8), False),
        ("sq8", TuningParams(), False),
    ],
)
def test_what_was_exported_to_faiss_comes_back(make_index: MakeIndex, tmp_path, kind, tuning, is_exact):
    index = make_index(400, kind=kind, tuning=tuning)
    assert export_index(index, tmp_path / "out", to="faiss").faiss_kind == kind
    summary = import_embeddings(tmp_path / "out", tmp_path / "again", model_spec="", load=pytest.fail)
    assert (summary.rows, summary.bad, bool(summary.approximate)) == (400, 0, not is_exact)
    stored = np.concatenate([view.segment.vectors.stored for view in Index.open(index).snapshot.views])
    found = np.concatenate([np.load(path) for path in sorted((tmp_path / "again" / "parts").glob("*.npy"))])
    assert np.abs(found.astype(np.float32) - stored.astype(np.float32)).max() <= (0 if is_exact else 0.02)
    origins = [(origin.uid, origin.metadata["split"]) for origin in Embeddings.open(tmp_path / "again").origins()]
    assert origins == [(f"k{number}", "first") for number in range(400)]


@pytest.mark.parametrize("spec", ["Flat", "HNSW8", "IVF4,Flat", "IVF4,SQ8", "OPQ4_8,IVF4,PQ4x4", "IVF4,RaBitQ"])
def test_an_index_of_autofaiss_alone_gives_numbered_rows(tmp_path, spec):
    rows = vectors(300, 0)[:, :D] * np.float32(2)
    write_faiss(tmp_path / "af" / "knn.index", rows, spec)
    (tmp_path / "af" / "index_infos.json").write_text("{}")
    summary = bring(tmp_path / "af", tmp_path / "out")
    assert (summary.rows, summary.dimension) == (300, D)
    assert [origin.uid for origin in Embeddings.open(tmp_path / "out").origins()] == [str(n) for n in range(300)]
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = (rows_in(tmp_path / "out") * units).sum(axis=1)
    assert cosines.mean() > (0.7 if summary.approximate else 0.99999)
    assert bool(summary.approximate) == (spec not in ("Flat", "HNSW8", "IVF4,Flat"))


@pytest.mark.parametrize("spec", ["IDMap,Flat", f"IDMap,RR{D},Flat", f"IDMap2,RR{D},Flat"])
def test_rows_in_another_order_come_back_as_they_were_put_in(tmp_path, spec):
    rows = unit(40, dtype="float32")
    order = np.random.default_rng(0).permutation(len(rows))
    index = faiss.index_factory(D, spec, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    # row i has the number order[i]
    index.add_with_ids(rows, order)
    faiss.write_index(index, str(tmp_path / "knn.index"))
    assert bring(tmp_path / "knn.index", tmp_path / "out").rows == 40
    np.testing.assert_allclose(rows_in(tmp_path / "out")[order], rows, atol=1e-3)


def test_several_tables_tell_about_the_rows_of_one_file(tmp_path):
    rows = unit(9, dtype="float32")
    write_faiss(tmp_path / "cr" / "image.index", rows)
    write_faiss(tmp_path / "cr" / "text.index", -rows)
    for part, keys in enumerate((["a", "b", "c"], ["d", "e", "f", "g", "h", "i"])):
        write_table(tmp_path / "cr" / "metadata" / f"metadata_{part}.parquet", {"key": keys, "n": [part] * len(keys)})
    assert bring(tmp_path / "cr", tmp_path / "out").rows == 9
    np.testing.assert_allclose(rows_in(tmp_path / "out"), rows, atol=1e-3)
    origins = list(Embeddings.open(tmp_path / "out").origins())
    assert [(origin.uid, origin.metadata["n"]) for origin in origins] == [(key, int(key > "c")) for key in "abcdefghi"]
    assert bring(tmp_path / "cr", tmp_path / "texts", modality="text").modality == "text"
    np.testing.assert_allclose(rows_in(tmp_path / "texts"), -rows, atol=1e-3)


def test_tables_of_another_count_and_files_that_are_none_are_refused(tmp_path):
    write_faiss(tmp_path / "a" / "knn.index", unit(3, dtype="float32"))
    write_table(tmp_path / "a" / "m.parquet", {"key": ["a", "b"]})
    with pytest.raises(UsageError, match=r"knn.index has 3 rows and .*m.parquet 2"):
        bring(tmp_path / "a", tmp_path / "out")
    write_faiss(tmp_path / "b" / "x.index", unit(3, dtype="float32"))
    write_faiss(tmp_path / "b" / "y.faiss", unit(3, dtype="float32"))
    with pytest.raises(UsageError, match=r"several FAISS files \(y.faiss, x.index\); give one"):
        bring(tmp_path / "b", tmp_path / "out")
    (tmp_path / "b" / "x.index").write_bytes(b"no index")
    with pytest.raises(VlmError, match=r"x.index cannot be read as a FAISS index"):
        bring(tmp_path / "b" / "x.index", tmp_path / "out")
    write_faiss(tmp_path / "c" / "text.index", unit(3, dtype="float32"))
    with pytest.raises(UsageError, match="--modality text"):
        bring(tmp_path / "c", tmp_path / "out")
    write_faiss(tmp_path / "d.index", unit(3, dtype="float32"), "IDMap,Flat")
    with pytest.raises(VlmError, match=r"d.index \(IndexIDMap\) cannot give its rows by number"):
        bring(tmp_path / "d.index", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_that_codes_are_only_near(tmp_path, capsys):
    write_faiss(tmp_path / "knn.index", unit(300, dtype="float32"), "SQ8")
    words = ["index", "import", str(tmp_path / "knn.index"), str(tmp_path / "out"), "--model", "unknown", "--json"]
    assert main(words) == 0
    assert "The FAISS file (IndexScalarQuantizer) stores quantized vectors" in capsys.readouterr().err
