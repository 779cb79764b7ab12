from pathlib import Path

import numpy as np
import pytest

from vlm.errors import VlmError
from vlm.index.embeddings_folder import Origin, Part, open_vectors, read_origins, write_part


def origin(number: int) -> Origin:
    return Origin(
        uid=f"u{number}",
        key=f"k{number}",
        shard="/shards/0.tar",
        number=number,
        image_offset=512 * number,
        image_size=100,
        caption_number=None,
        captions={"": ("a dog",), "zh": ("狗", "一只狗")},
        metadata={"width": 4, "tags": ["ä", None], "nested": {"a": 1.5}},
    )


def write(folder: Path) -> Part:
    (folder / "parts").mkdir()
    vectors = np.eye(4, dtype=np.float32)[:3]
    return write_part(folder, "part-00000", vectors, [origin(n) for n in range(3)], shard="/shards/0.tar", bad=1)


def test_a_part_gives_back_its_vectors_as_float16_and_its_rows_unchanged(tmp_path: Path) -> None:
    part = write(tmp_path)
    vectors = open_vectors(tmp_path, part)
    assert vectors.dtype == np.float16
    assert np.array_equal(vectors, np.eye(4)[:3])
    assert list(read_origins(tmp_path, part)) == [origin(n) for n in range(3)]


def test_the_line_of_a_part_gives_the_part_back(tmp_path: Path) -> None:
    part = write(tmp_path)
    assert Part.from_line(part.to_line()) == part


@pytest.mark.parametrize("name", ["part-00000.npy", "part-00000.parquet"])
@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_file_is_named_with_its_cure(tmp_path: Path, name: str, damage: bytes | None) -> None:
    part = write(tmp_path)
    path = tmp_path / "parts" / name
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(VlmError, match=f"{name}.*embed again"):
        list(read_origins(tmp_path, part)) if name.endswith("parquet") else open_vectors(tmp_path, part)
