from pathlib import Path

import pytest

from tests.index.conftest import ColourModel
from tests.index.embed_fixture import embed_shards
from tests.index.test_embed_processes import contents
from vlm.errors import UsageError, VlmError
from vlm.index.embed import EmbedOptions, embed_into
from vlm.index.embeddings_folder import Embeddings, Modality, VectorStorage

OPTIONS = EmbedOptions(model_spec="colours", batch_size=3)


def test_both_in_one_pass_are_what_two_passes_give(tmp_path: Path, shards: list[str]) -> None:
    done = embed_into(ColourModel(), shards, {"image": tmp_path / "i", "text": tmp_path / "t"}, OPTIONS)
    embed_shards(ColourModel(), shards, tmp_path / "images", model_spec="colours", batch_size=3)
    embed_shards(ColourModel(), shards, tmp_path / "texts", model_spec="colours", modality="text", batch_size=3)
    assert contents(tmp_path / "i") == contents(tmp_path / "images")
    assert contents(tmp_path / "t") == contents(tmp_path / "texts")
    assert (done["image"].rows, done["text"].rows) == (11, 24)
    assert done["image"].incidents == {"unreadable image": 1}
    assert done["text"].incidents == {}


@pytest.mark.parametrize("failing_batch", [1, 2, 5])
def test_both_stopped_and_repeated_leave_the_files_of_one_run(
    tmp_path: Path, shards: list[str], failing_batch: int
) -> None:
    def both(model: ColourModel, name: str) -> None:
        folders: dict[Modality, Path] = {"image": tmp_path / name / "i", "text": tmp_path / name / "t"}
        embed_into(model, shards, folders, OPTIONS)

    both(ColourModel(), "whole")
    with pytest.raises(InterruptedError):
        both(ColourModel(fail_on_batch=failing_batch), "out")
    both(ColourModel(), "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_texts_lost_alone_are_made_again_without_the_images(tmp_path: Path, shards: list[str]) -> None:
    folders: dict[Modality, Path] = {"image": tmp_path / "i", "text": tmp_path / "t"}
    with pytest.raises(InterruptedError):
        embed_into(ColourModel(fail_on_batch=5), shards, folders, OPTIONS)
    (tmp_path / "t" / "parts" / "part-00000.json").unlink()
    again = ColourModel()
    embed_into(again, shards, folders, OPTIONS)
    assert again.batches == 2
    assert len(Embeddings.open(tmp_path / "t", verify=True)) == 24


def test_the_batch_size_found_is_said_and_kept_when_the_work_goes_on(
    tmp_path: Path, shards: list[str], logged: pytest.LogCaptureFixture
) -> None:
    options = EmbedOptions(model_spec="colours", batch_size="auto")
    with pytest.raises(InterruptedError):
        embed_into(ColourModel(fail_on_batch=4), shards, {"image": tmp_path / "out"}, options)
    assert "Batch size 8, the fastest" in logged.text
    assert (tmp_path / "out" / ".batch-size").read_text() == "8\n"
    (tmp_path / "out" / ".batch-size").write_text("3\n")
    resumed = ColourModel()
    embed_into(resumed, shards, {"image": tmp_path / "out"}, options)
    assert resumed.batches == 4
    assert Embeddings.open(tmp_path / "out").manifest.details["batch_size"] == 3
    assert not (tmp_path / "out" / ".batch-size").exists()


def test_storage_is_part_of_what_a_folder_is(tmp_path: Path, shards: list[str]) -> None:
    embed_into(ColourModel(), shards, {"image": tmp_path / "out"}, OPTIONS)
    other = EmbedOptions(model_spec="colours", batch_size=3, storage=VectorStorage(store="float32"))
    with pytest.raises(UsageError, match="another store"):
        embed_into(ColourModel(), shards, {"image": tmp_path / "out"}, other)


def test_rows_of_another_precision_do_not_join_those_there(tmp_path: Path, shards: list[str]) -> None:
    embed_into(ColourModel(), shards, {"image": tmp_path / "out"}, OPTIONS)
    other = EmbedOptions(model_spec="colours", batch_size=3, precision="bf16")
    with pytest.raises(UsageError, match="another precision"):
        embed_into(ColourModel(), shards, {"image": tmp_path / "out"}, other)


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, shards: list[str]) -> None:
    options = EmbedOptions(model_spec="colours", is_compiled=True)
    with pytest.raises(UsageError, match="ColourModel cannot be compiled"):
        embed_into(ColourModel(), shards, {"image": tmp_path / "out"}, options)
    with pytest.raises(UsageError, match="leave --compile out"):
        embed_into(ColourModel(), shards, {"text": tmp_path / "texts"}, options)
    with pytest.raises(VlmError, match="batch_size = 0 is out of range"):
        embed_into(ColourModel(), shards, {"image": tmp_path / "out"}, EmbedOptions(model_spec="colours", batch_size=0))
