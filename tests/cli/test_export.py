import io
import json

import open_clip
import pytest
import torch
from PIL import Image

import vlm
from tests.models.huggingface_fixture import clip_folder
from vlm.cli.main import main
from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.models.load import load_model, save_model_folder
from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer, model_config


def run(capsys, *words):
    """(exit code, stdout, stderr) of a command."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def saved(folder, architecture, tokenizer):
    config = fit_to_tokenizer(model_config(architecture), tokenizer)
    torch.manual_seed(0)
    model = VisionLanguageModel(
        name="test",
        network=build_network(config).eval(),
        config=config,
        view=EvalTransform(size=32, mean=(0.4, 0.5, 0.6)),
        tokenizer=tokenizer,
    )
    save_model_folder(folder, model, inputs={})
    return model


@pytest.mark.parametrize("architecture", ["micro", "micro-coca"])
def test_open_clip_loads_what_is_exported_and_the_fingerprint_stays(capsys, scene_tokenizer, tmp_path, architecture):
    model = saved(tmp_path / "model", architecture, open_tokenizer(str(scene_tokenizer), 24))
    code, out, err = run(capsys, "export", tmp_path / "model", tmp_path / "out", "--to", "open-clip", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["fingerprint"] == model.fingerprint
    assert values["largest_difference"] <= 1e-5
    assert not values["has_tokenizer"]
    called = vlm.export(tmp_path / "model", tmp_path / "called").to_json()
    assert json.loads(json.dumps(called).replace(str(tmp_path / "called"), str(tmp_path / "out"))) == values
    opened = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")[0]
    assert torch.equal(opened.state_dict()["logit_scale"], model.network.state_dict()["logit_scale"])
    assert load_model(str(tmp_path / "out"), device="cpu").fingerprint == model.fingerprint


def test_the_tokens_of_clip_are_open_clips_own(capsys, tmp_path):
    saved(tmp_path / "model", "micro", open_tokenizer("clip", 24))
    code, out, err = run(capsys, "export", tmp_path / "model", tmp_path / "out")
    assert code == 0, err
    assert "True" in out
    assert "vlm.adaptors" not in err


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "clip", "huggingface"])
def test_the_code_that_export_shows_runs(capsys, scene_tokenizer, tmp_path, tokenizer):
    """It gives the cosines that the model itself gives."""
    sources = {"sentencepiece": str(scene_tokenizer), "clip": "clip", "huggingface": ""}
    if tokenizer == "huggingface":
        sources["huggingface"] = str(clip_folder(tmp_path / "huggingface"))
    model = saved(tmp_path / "model", "micro", open_tokenizer(sources[tokenizer], 24))
    code, _, err = run(capsys, "export", tmp_path / "model", tmp_path / "out")
    assert code == 0, err
    snippet = err.partition("Next, in Python:\n\n")[2]
    assert ("vlm.adaptors" in snippet) == (tokenizer == "sentencepiece")
    names = {}
    exec(compile(snippet, "snippet", "exec"), names)
    black = io.BytesIO()
    Image.new("RGB", (64, 64)).save(black, "PNG")
    image = model.embed_images(torch.from_numpy(model.view(black.getvalue()))[None])
    expected = image @ model.embed_texts(["a red circle", "a blue star"]).T
    assert (names["images"] @ names["texts"].T - expected).abs().max() <= 1e-5
    assert capsys.readouterr().out.startswith("tensor")


def test_a_network_that_embeds_otherwise_there_is_not_handed_over(capsys, scene_tokenizer, tmp_path, monkeypatch):
    saved(tmp_path / "model", "micro", open_tokenizer(str(scene_tokenizer), 24))
    genuine = open_clip.create_model_and_transforms

    def spoiled(name):
        network, train, view = genuine(name)
        with torch.no_grad():
            network.get_parameter("visual.proj").mul_(torch.linspace(1, 1.01, 16))
        return network, train, view

    monkeypatch.setattr(open_clip, "create_model_and_transforms", spoiled)
    code, _, err = run(capsys, "export", tmp_path / "model", tmp_path / "out")
    assert code == 1
    assert "embeddings differ from those of" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_network_open_clip_does_not_know_is_refused(scene_tokenizer, tmp_path):
    from vlm.errors import UsageError
    from vlm.models.export import export_open_clip

    model = saved(tmp_path / "model", "micro", open_tokenizer(str(scene_tokenizer), 24))
    model.config["vision_cfg"]["pooling_of_ours"] = "simpool"
    with pytest.raises(UsageError, match=r"open_clip cannot build the network.*pooling_of_ours"):
        export_open_clip(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_misuse_is_said(capsys, scene_tokenizer, tmp_path):
    saved(tmp_path / "model", "micro", open_tokenizer(str(scene_tokenizer), 24))
    code, _, err = run(capsys, "export", tmp_path / "model", tmp_path / "model")
    assert code == 2
    assert "exists" in err
    code, out, err = run(capsys, "export", tmp_path / "model", tmp_path / "out", "--to", "coreml")
    assert code == 2
    assert "open-clip" in out + err


@pytest.mark.parametrize(
    "words", [("export", "{}", "{out}", "--to", "open-clip"), ("soup", "{}", "{}", "--out", "{out}")]
)
def test_a_prefix_has_no_weights_to_give(capsys, scene_tokenizer, tmp_path, words):
    saved(tmp_path / "model", "micro", open_tokenizer(str(scene_tokenizer), 24))
    filled = [word.format(f"{tmp_path / 'model'}#4", out=tmp_path / "out") for word in words]
    code, _, err = run(capsys, *filled)
    assert code == 2
    assert f"derived from those of {tmp_path / 'model'}. Give that one." in err
    assert not (tmp_path / "out").exists()
