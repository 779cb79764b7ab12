from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.index.index_fixture import SPACE, origins, vectors
from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import Embeddings, EmbeddingsWriter, normalize_rows

Write = Callable[..., Path]


def random_vectors(rows: int, dimension: int = 16) -> np.ndarray:
    return normalize_rows(np.random.default_rng(0).standard_normal((rows, dimension)).astype(np.float32))


def test_the_rows_come_back_in_order_and_of_unit_length(embed_vectors: Write) -> None:
    vectors = random_vectors(2500)
    embeddings = Embeddings.open(embed_vectors(vectors))
    rows = np.concatenate(list(embeddings.blocks(rows_at_once=300)))
    assert rows.dtype == np.float32
    assert np.allclose(rows, vectors, atol=1e-3)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert [origin.number for origin in embeddings.origins()] == list(range(2500))


def test_a_sample_of_rows_is_drawn_without_repeats_from_all_parts_by_its_seed(embed_vectors: Write) -> None:
    vectors = random_vectors(2500)
    embeddings = Embeddings.open(embed_vectors(vectors))
    drawn = embeddings.sample(500, seed=1)
    rows = (drawn @ vectors.T).argmax(axis=1)
    assert len(set(rows)) == 500
    assert set(rows // 1000) == {0, 1, 2}
    assert np.array_equal(drawn, embeddings.sample(500, seed=1))
    assert not np.array_equal(drawn, embeddings.sample(500, seed=2))
    assert len(embeddings.sample(9999, seed=1)) == 2500


@pytest.mark.parametrize("name", ["parts/part-00001.npy", "parts/part-00000.parquet", "parts.jsonl"])
def test_a_missing_or_shortened_file_is_found_on_opening(embed_vectors: Write, name: str) -> None:
    folder = embed_vectors(random_vectors(1500))
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(VlmError, match=f"{name} is damaged.*vlm embed"):
        Embeddings.open(folder)
    (folder / name).unlink()
    with pytest.raises(VlmError, match=f"{name} is missing.*vlm embed"):
        Embeddings.open(folder)


def test_a_changed_byte_is_found_when_verifying(embed_vectors: Write) -> None:
    folder = embed_vectors(random_vectors(10))
    path = folder / "parts" / "part-00000.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    Embeddings.open(folder)
    with pytest.raises(VlmError, match="checksum"):
        Embeddings.open(folder, verify=True)


def test_a_folder_of_another_kind_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'index'.*'embeddings' was expected"):
        Embeddings.open(index)
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        Embeddings.open(tmp_path / "nothing")


def test_a_writer_goes_on_in_order_after_the_first_part_that_is_lost(tmp_path: Path) -> None:
    def written(folder: Path, first: int) -> EmbeddingsWriter:
        writer = EmbeddingsWriter(folder, space=SPACE, identity={})
        assert len(writer.parts) == first
        for number in range(first, 4):
            keys = [f"{number}-{row}" for row in range(5)]
            writer.add(f"{number}.tar", vectors(5, number), origins(keys))
        return writer

    written(tmp_path / "whole", 0).finish(inputs={}, details={})
    written(tmp_path / "out", 0)
    (tmp_path / "out" / "parts" / "part-00001.npy").unlink()
    written(tmp_path / "out", 1).finish(inputs={}, details={})
    found = [Embeddings.open(tmp_path / name, verify=True) for name in ("whole", "out")]
    assert found[0].manifest.files == found[1].manifest.files
    assert [part.shard for part in found[1].parts] == ["0.tar", "1.tar", "2.tar", "3.tar"]
