"""A complete embeddings folder that was damaged is whole again after the same command."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.index.embed_fixture import embed_shards
from tests.index.test_embed import contents
from vlm.errors import VlmError
from vlm.index.build import build_index
from vlm.index.embeddings_folder import Embeddings


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [os.unlink, cut, flip])
@pytest.mark.parametrize(
    ("name", "batches"),
    [("parts/part-00001.npy", 2), ("parts/part-00000.parquet", 2), ("parts.jsonl", 0), ("incidents.jsonl", 0)],
)
def test_only_the_damaged_part_is_made_again(
    tmp_path: Path,
    shards: list[str],
    make_model: Callable[..., Any],
    damage: Callable[[Path], None],
    name: str,
    batches: int,
    logged: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    embed_shards(make_model(), shards, out, model_spec="colours", batch_size=3)
    whole = contents(out)
    damage(out / name)
    with pytest.raises(VlmError, match=rf"{name}.* run the same vlm embed again"):
        build_index(out, tmp_path / "index")
    again = make_model()
    summary = embed_shards(again, shards, out, model_spec="colours", batch_size=3)
    assert (summary.was_complete, summary.missing_parts, summary.rows, again.batches) == (False, 0, 11, batches)
    assert f"{name} is" in logged.text
    assert contents(out) == whole
    assert embed_shards(make_model(), shards, out, model_spec="colours", batch_size=3).was_complete


def test_killed_while_it_is_mended_it_is_mended_the_next_time(
    tmp_path: Path, shards: list[str], make_model: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    embed_shards(make_model(), shards, out, model_spec="colours", batch_size=3)
    whole = contents(out)
    flip(out / "parts/part-00001.npy")
    with pytest.raises(InterruptedError):
        embed_shards(make_model(fail_on_batch=1), shards, out, model_spec="colours", batch_size=3)
    embed_shards(make_model(), shards, out, model_spec="colours", batch_size=3)
    assert contents(out) == whole


def test_imported_rows_are_not_to_be_embedded_again(tmp_path: Path) -> None:
    from tests.index.clip_retrieval_fixture import bring, unit, write_matrix

    bring(write_matrix(tmp_path / "e.npy", unit(2)), tmp_path / "out")
    (tmp_path / "out/parts/part-00000.npy").unlink()
    with pytest.raises(VlmError, match="import the rows again"):
        Embeddings.open(tmp_path / "out")
