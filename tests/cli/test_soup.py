import json

import pytest
import torch

import vlm
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


@pytest.fixture
def tuned(scene_tokenizer, tmp_path):
    """A model folder `start`, and a, b and c, as tuned from it: a step away each, c a long way off."""
    tokenizer = open_tokenizer(str(scene_tokenizer), 24)
    config = fit_to_tokenizer(model_config("micro"), tokenizer)
    torch.manual_seed(0)
    network = build_network(config).eval()
    start = {name: value.clone() for name, value in network.state_dict().items()}
    for number, (name, far) in enumerate((("start", 0.0), ("a", 0.05), ("b", 0.05), ("c", 3.0))):
        generator = torch.Generator().manual_seed(number)
        network.load_state_dict(start)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(far * torch.randn(parameter.shape, generator=generator))
        model = VisionLanguageModel(
            name=name, network=network, config=config, view=EvalTransform(size=32), tokenizer=tokenizer
        )
        save_model_folder(tmp_path / name, model, inputs={})
    return tmp_path


def weights(folder):
    return load_model(str(folder), device="cpu").network.state_dict()


def test_a_uniform_soup_is_a_model_folder_with_its_recipe_and_origins(capsys, tuned):
    code, out, err = run(capsys, "soup", tuned / "a", tuned / "b", "--out", tuned / "soup")
    assert code == 0, err
    assert "uniform" in out
    assert "0.5000" in out
    one, two, mean = weights(tuned / "a"), weights(tuned / "b"), weights(tuned / "soup")
    for name, value in mean.items():
        assert torch.equal(value, ((one[name].double() + two[name].double()) / 2).to(value.dtype))
    manifest = json.loads((tuned / "soup" / "manifest.json").read_text())
    origin = json.loads((tuned / "a" / "manifest.json").read_text())
    assert manifest["inputs"][f"model {tuned / 'a'}"] == origin["fingerprint"]
    assert "soup.json" in manifest["files"]
    assert json.loads((tuned / "soup" / "soup.json").read_text())["fingerprint"] == manifest["fingerprint"]


def test_a_greedy_soup_is_not_below_its_best_ingredient_on_the_shards(capsys, tuned, scene_shards):
    names = [tuned / name for name in "cab"]
    words = ["--greedy", "--val", scene_shards / "val", "--languages", "en", "--workers", "0", "--json"]
    code, out, err = run(capsys, "soup", *names, "--out", tuned / "soup", *words)
    assert code == 0, err
    found = json.loads(out)
    alone = [part["metric"] for part in found["ingredients"]]
    assert found["method"] == "greedy"
    assert found["value"] >= max(alone)
    assert alone == sorted(alone, reverse=True)
    assert sum(part["share"] for part in found["ingredients"]) == pytest.approx(1)
    # what is written is what was measured
    words = ["--retrieval", scene_shards / "val", "--languages", "en", "--workers", "0", "--json"]
    _, out, _ = run(capsys, "eval", tuned / "soup", *words)
    both = json.loads(out)["retrieval"]
    assert found["value"] == (both["text_to_image"]["recall"]["10"] + both["image_to_text"]["recall"]["10"]) / 2
    assert "val" in json.loads((tuned / "soup" / "manifest.json").read_text())["inputs"]


def test_the_table_of_a_greedy_soup_says_who_was_taken(capsys, tuned, scene_shards):
    words = ["--greedy", "--val", scene_shards / "val", "--workers", "0", "--metric", "image_to_text_recall@5"]
    code, out, err = run(capsys, "soup", tuned / "a", tuned / "c", "--out", tuned / "soup", *words)
    assert code == 0, err
    assert "added" in out
    assert "image_to_text_recall@5 alone" in out
    assert "yes" in out
    assert "measuring" in err


def test_weights_are_shares(capsys, tuned):
    code, out, _ = run(
        capsys, "soup", tuned / "a", tuned / "b", "--weights", "0.7,0.3", "--out", tuned / "soup", "--json"
    )
    assert code == 0
    assert [part["share"] for part in json.loads(out)["ingredients"]] == pytest.approx([0.7, 0.3])
    name = "visual.proj"
    by_hand = 0.7 * weights(tuned / "a")[name].double() + 0.3 * weights(tuned / "b")[name].double()
    assert torch.allclose(weights(tuned / "soup")[name], by_hand.float(), atol=1e-7)


@pytest.mark.parametrize(("alpha", "end"), [("0", "start"), ("1", "a")])
def test_the_ends_of_an_interpolation_are_its_inputs(capsys, tuned, alpha, end):
    code, out, err = run(
        capsys, "soup", tuned / "a", "--interpolate", tuned / "start", "--alphas", alpha, "--out", tuned / "x", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["fingerprint"] == load_model(str(tuned / end), device="cpu").fingerprint


def test_of_several_alphas_the_best_is_written(capsys, tuned, scene_shards):
    words = ["--val", scene_shards / "val", "--languages", "en", "--workers", "0", "--json"]
    code, out, err = run(capsys, "soup", tuned / "a", "--interpolate", tuned / "start", "--out", tuned / "x", *words)
    assert code == 0, err
    found = json.loads(out)
    assert [point["alpha"] for point in found["sweep"]] == [0, 0.25, 0.5, 0.75, 1]
    best = max(found["sweep"], key=lambda point: point["value"])
    assert found["ingredients"][1]["share"] == best["alpha"]
    assert found["value"] == best["value"]


def test_a_path_is_measured_on_both_data_sets_drawn_and_bounded(capsys, tuned, scene_shards):
    words = ["--val", scene_shards / "val", "--val-other", scene_shards / "val", "--languages", "en", "--workers", "0"]
    words += ["--alphas", "0.5,1", "--max-drift", "0"]
    code, out, err = run(capsys, "soup", tuned / "c", "--interpolate", tuned / "start", "--out", tuned / "x", *words)
    assert code == 0, err
    assert "on other data" in out
    assert (tuned / "x/path.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tuned / "x/soup.json").read_text())
    assert [point["alpha"] for point in saved["sweep"]] == [0, 0.5, 1]
    assert all(point["other"] == point["value"] for point in saved["sweep"])
    at_start = saved["sweep"][0]["other"]
    assert [point["is_allowed"] for point in saved["sweep"]] == [point["other"] >= at_start for point in saved["sweep"]]
    inputs = json.loads((tuned / "x/manifest.json").read_text())["inputs"]
    assert inputs["val-other"] == inputs["val"]


def test_a_call_makes_and_gives_what_the_verb_does(capsys, tuned, scene_shards):
    val = scene_shards / "val"
    words = ["--val", val, "--val-other", val, "--alphas", "0.5,1", "--max-drift", "1", "--workers", "0", "--json"]
    base = ["--interpolate", tuned / "start"]
    code, out, err = run(capsys, "soup", tuned / "a", *base, "--out", tuned / "x", *words)
    assert code == 0, err
    (tuned / "x").rename(tuned / "of-the-verb")
    summary = vlm.soup(
        tuned / "a",
        tuned / "x",
        interpolate=tuned / "start",
        val=[val],
        val_other=val,
        alphas=[0.5, 1],
        max_drift=1,
        workers=0,
    )
    assert summary.to_json() == json.loads(out) == json.loads((tuned / "x/soup.json").read_text())
    with pytest.raises(vlm.UsageError, match="greedy chooses by a metric on held-out shards"):
        vlm.soup([tuned / "a", tuned / "b"], tuned / "y", greedy=True)


def test_a_checkpoint_of_a_run_is_an_ingredient(capsys, tuned):
    checkpoint = tuned / "run" / "checkpoints" / "step-00000004"
    checkpoint.parent.mkdir(parents=True)
    (tuned / "b").rename(checkpoint)
    (checkpoint / "manifest.json").unlink()  # a checkpoint has none
    code, _, err = run(capsys, "soup", tuned / "a", checkpoint, "--out", tuned / "soup")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a"], "two models or more"),
        (["a", "b", "--greedy"], "held-out shards: give them as val"),
        (["a", "b", "--greedy", "--weights", "1,2"], "greedy and weights are different ways"),
        (["a", "b", "--interpolate", "start"], "needs one tuned model besides it; 2 were given"),
        (["a", "b", "--alphas", "0.5"], "give the base of the one model as interpolate"),
        (["a", "--interpolate", "start", "--val-other", "shards"], "measured beside val"),
        (["a", "--interpolate", "start", "--max-drift", "-1"], "not a share"),
        (["a", "b", "--weights", "1"], "2 models need 2 weights"),
        (["a", "b", "--weights", "half,half"], "not a list of numbers"),
        (["a", "--interpolate", "start", "--alphas", "0,1"], "--val SHARDS"),
        (["a", "b", "--metric", "recall@11"], "did you mean 'recall@1"),
        (["a", "nowhere"], "There is no model 'nowhere'"),
        (["a", "a"], "the same model"),
    ],
)
def test_misuse_is_said_and_nothing_is_written(capsys, tuned, monkeypatch, words, message):
    monkeypatch.chdir(tuned)
    before = sorted(tuned.iterdir())
    code, _, err = run(capsys, "soup", *words, "--out", "soup")
    assert code == 2
    assert message in err
    assert sorted(tuned.iterdir()) == before


def test_an_out_that_exists_is_left_alone(capsys, tuned):
    before = (tuned / "start" / "manifest.json").read_bytes()
    code, _, err = run(capsys, "soup", tuned / "a", tuned / "b", "--out", tuned / "start")
    assert code == 2
    assert "exists" in err
    assert (tuned / "start" / "manifest.json").read_bytes() == before


def test_a_full_disk_leaves_nothing_half_written(capsys, tuned, monkeypatch):
    import errno

    import vlm.models.load

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vlm.models.load, "save_file", full)
    before = sorted(tuned.iterdir())
    code, _, err = run(capsys, "soup", tuned / "a", tuned / "b", "--out", tuned / "soup")
    assert code == 1
    assert "disk is full" in err
    assert sorted(tuned.iterdir()) == before
