import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import UsageError, VlmError
from vlm.index.ann.index_types import TuningParams
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings, normalize_rows
from vlm.index.reader import Index
from vlm.manifest import read_manifest

Write = Callable[..., Path]


def test_the_manifest_traces_the_index_to_its_embeddings_and_model(embeddings: Path, index: Path) -> None:
    manifest, source = read_manifest(index, "index"), Embeddings.open(embeddings)
    assert manifest.generation == 1
    assert manifest.counts == {"rows": 11, "dead": 0}
    assert manifest.inputs == {"model": "colours", "embeddings": source.manifest.fingerprint}
    assert sorted(manifest.files) == [f"segments/segment-00000.{suffix}" for suffix in ("faiss", "npy", "rows.npy")]


def test_a_folder_that_exists_is_refused_and_left_alone(embeddings: Path, index: Path) -> None:
    before = {path: path.read_bytes() for path in index.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="exists already"):
        build_index(embeddings, index)
    assert {path: path.read_bytes() for path in index.rglob("*") if path.is_file()} == before


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, embeddings: Path) -> None:
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the catalogue is larger than this, the segment is not
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(VlmError, match=r"catalogue.* cannot be written.*make room"):
            build_index(embeddings, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_embeddings_are_not_indexed(tmp_path: Path, embed_vectors: Write) -> None:
    folder = embed_vectors(normalize_rows(np.ones((5, 4), np.float32)))
    path = folder / "parts" / "part-00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(VlmError, match="checksum"):
        build_index(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_seed_builds_the_same_ivf_index(tmp_path: Path, embed_vectors: Write) -> None:
    rows = normalize_rows(np.random.default_rng(0).standard_normal((1500, 8)).astype(np.float32))
    folder = embed_vectors(rows)
    summaries = [build_index(folder, tmp_path / name, kind="ivf", tuning=TuningParams(seed=5)) for name in ("a", "b")]
    segments = [(tmp_path / name / "segments/segment-00000.faiss").read_bytes() for name in ("a", "b")]
    assert segments[0] == segments[1]
    assert summaries[0].parameters == {"nlist": 38, "nprobe": 8, "seed": 5}


def test_the_kind_chosen_by_auto_is_said_and_kept(
    tmp_path: Path, embeddings: Path, logged: pytest.LogCaptureFixture
) -> None:
    assert build_index(embeddings, tmp_path / "out").kind == "flat"
    assert "11 rows: a flat index" in logged.text
    assert Index.open(tmp_path / "out").info().kind == "flat"
