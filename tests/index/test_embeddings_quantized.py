from pathlib import Path

import numpy as np
import pytest

from vlm.errors import UsageError, VlmError
from vlm.index.embeddings_folder import (
    Embeddings,
    EmbeddingSpace,
    EmbeddingsWriter,
    Origin,
    VectorStorage,
    normalize_rows,
    quantize_binary,
    quantize_int8,
)


def rows(count: int, dimension: int) -> np.ndarray:
    return normalize_rows(np.random.default_rng(0).standard_normal((count, dimension)).astype(np.float32))


def stored(folder: Path, vectors: np.ndarray, storage: VectorStorage) -> Embeddings:
    space = EmbeddingSpace(model="given", fingerprint="given", dimension=vectors.shape[1], modality="image")
    writer = EmbeddingsWriter(folder, space=space, identity={}, storage=storage)
    for first in range(0, len(vectors), 40):
        block = vectors[first : first + 40]
        origins = [
            Origin(
                uid=f"{row}", key=f"{row}", shard="0.tar", number=row, image_offset=0, image_size=0,
                caption_number=None, captions={}, metadata={},
            )
            for row in range(first, first + len(block))
        ]  # fmt: skip
        writer.add("0.tar", block, origins)
    writer.finish(inputs={}, details={"shards": ["0.tar"]})
    return Embeddings.open(folder, verify=True)


@pytest.mark.parametrize("dimension", [1, 20, 192])
def test_int8_is_off_by_half_a_scale_at_most(dimension: int) -> None:
    vectors = rows(100, dimension)
    codes, scales = quantize_int8(vectors)
    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int)).max(axis=1).tolist() == [127] * 100
    errors = np.abs(codes * scales[:, None] - vectors).max(axis=1)
    assert (errors <= 0.5001 * scales).all()
    assert (scales <= 1.0001 / 127).all()


def test_cosines_of_int8_are_near_and_those_of_signs_follow_the_angle() -> None:
    vectors = rows(200, 512)
    exact = vectors @ vectors.T
    codes, scales = quantize_int8(vectors)
    decoded = codes * scales[:, None]
    assert np.abs(decoded @ decoded.T - exact).max() < 0.01
    bits = np.unpackbits(quantize_binary(vectors), axis=1).astype(int)
    differing = (bits[:, None] != bits[None]).mean(axis=2)
    # P(signs differ) = angle / pi (Charikar 2002); six standard deviations of 512 draws
    assert np.abs(differing - np.arccos(np.clip(exact, -1, 1)) / np.pi).max() < 6 * 0.5 / np.sqrt(512)


def test_signs_are_packed_with_zeros_at_the_end() -> None:
    assert quantize_binary(np.array([[1, -1, 0, 1, 1, 1, 1, -1, 1, -1]], np.float32)).tolist() == [
        [0b10011110, 0b10000000]
    ]


def test_float32_comes_back_exactly_and_codes_lie_beside_it_with_checksums(tmp_path: Path) -> None:
    vectors = rows(100, 20)
    found = stored(tmp_path / "e", vectors, VectorStorage(store="float32", codes=("binary", "int8")))
    codes, scales = (np.concatenate(arrays) for arrays in zip(*found.codes("int8"), strict=True))
    assert np.array_equal(codes, quantize_int8(vectors)[0])
    assert np.array_equal(scales, quantize_int8(vectors)[1])
    assert np.array_equal(np.concatenate([bits for (bits,) in found.codes("binary")]), quantize_binary(vectors))
    kept = np.concatenate([np.load(tmp_path / "e" / "parts" / f"{part.name}.npy") for part in found.parts])
    assert kept.dtype == np.float32
    assert np.array_equal(kept, vectors)
    path = tmp_path / "e" / "parts" / "part-00001.binary.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(VlmError, match=r"part-00001.binary.npy is damaged"):
        Embeddings.open(tmp_path / "e", verify=True)


def test_codes_that_were_not_asked_for_are_said_to_be_missing(tmp_path: Path) -> None:
    found = stored(tmp_path / "e", rows(3, 8), VectorStorage(codes=("int8",)))
    with pytest.raises(UsageError, match=r"no binary codes.*--quantize binary"):
        list(found.codes("binary"))
