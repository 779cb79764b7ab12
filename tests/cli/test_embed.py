import json

import pytest

from tests.data.tar_fixture import write_tar
from tests.random_model import write_random_model
from vlm.cli.main import main
from vlm.index.embeddings_folder import Embeddings
from vlm.models.load import load_model


@pytest.fixture
def model(scene_tokenizer, tmp_path):
    """A folder with a tiny model of random weights."""
    return write_random_model(tmp_path / "model", "micro", scene_tokenizer)


def test_both_modalities_of_a_prefix_with_codes_by_two_processes(scene_shards, model, tmp_path, capfd):
    write_tar(tmp_path / "broken.tar", ["", "unreadable image", ""])
    words = ["embed", f"{model}#8", f"{scene_shards / 'val'}::{tmp_path / 'broken.tar'}"]
    options = ["--modality", "both", "--store", "float32", "--codes", "int8", "binary", "--json", "--workers", "0"]
    assert main([*words, str(tmp_path / "out"), *options, "--processes", "2"]) == 0
    printed = capfd.readouterr()
    told = json.loads(printed.out)
    images = Embeddings.open(tmp_path / "out" / "images", verify=True)
    texts = Embeddings.open(tmp_path / "out" / "texts", verify=True)
    assert (told["image"]["rows"], told["image"]["missing_parts"], told["image"]["bad"]) == (len(images), 0, 1)
    assert told["image"]["incidents"] == {"unreadable image": 1}
    assert "unreadable image" in printed.err
    assert "incidents.jsonl" in printed.err
    for found in (images, texts):
        assert found.dimension == 8
        assert found.space.model == f"{model}#8"
        assert found.space.fingerprint == load_model(found.space.model).fingerprint
        assert len(list(found.codes("int8"))) == 2
    assert main([*words, str(tmp_path / "alone"), *options]) == 0
    again = Embeddings.open(tmp_path / "alone" / "images")
    assert again.manifest.files == images.manifest.files


def test_mistakes_are_told_before_anything_is_written(scene_shards, model, tmp_path, capsys):
    place = [str(scene_shards / "val"), str(tmp_path / "out")]
    assert main(["embed", f"{model}#17", *place]) == 2
    assert "have 16 dimensions" in capsys.readouterr().err
    assert main(["embed", f"{model}#x", *place]) == 2
    assert "is not a number of dimensions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    assert main(["embed", str(model), *place, "--modality", "both"]) == 2
    assert "needs a folder of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "-1"), "workers = -1; 0 is the least"),
        (("--batch-size", "0"), "batch_size = 0 is out of range: it must be at least 1"),
        (("--device", "foo"), "There is no device 'foo'"),
        (("--device", "cuda:99"), "torch sees no device 'cuda:99' here"),
        (("--device", "meta"), "torch sees no device 'meta' here"),
    ],
)
def test_what_cannot_be_is_refused_before_a_folder_is_begun(scene_shards, model, tmp_path, capsys, words, message):
    assert main(["embed", str(model), str(scene_shards / "val"), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_number_that_json_has_not_is_null_from_shards_to_answers(model, tmp_path, capsys):
    write_tar(tmp_path / "odd.tar", [""], metadata={"nan": float("nan"), "far": [float("inf"), 1.5]})
    embeddings, index = tmp_path / "embeddings", tmp_path / "index"
    assert main(["embed", str(model), str(tmp_path / "odd.tar"), str(embeddings), "--workers", "0"]) == 0
    (origin,) = Embeddings.open(embeddings).origins()
    assert (origin.metadata["nan"], origin.metadata["far"]) == (None, [None, 1.5])
    assert main(["index", "build", str(embeddings), str(index)]) == 0
    capsys.readouterr()
    assert main(["search", str(index), "--like", origin.uid, "--json"]) == 0
    hit = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["hits"][0]
    assert hit["metadata"]["nan"] is None
