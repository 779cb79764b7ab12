import json

import numpy as np
import pytest
from PIL import Image

import vlm
from tests.random_model import write_random_model
from vlm.cli.main import main
from vlm.evaluation.sample_files import read_samples


@pytest.fixture(scope="module")
def models(scene_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_random_model(folder / name, "tiny", scene_tokenizer) for name in ("first", "second")]


@pytest.fixture
def suite(tmp_path):
    """Two evaluators on shards, and a set that is not there."""
    file = tmp_path / "mine.toml"
    file.write_text(
        'title = "Mine"\n[data.scenes]\npath = "val"\nlabel = "scene.shape"\n'
        '[data.gone]\npath = "gone"\nfetch = "ask for it"\n'
        '[[evaluate]]\nevaluator = "zero-shot"\ndata = ["scenes", "gone"]\ntemplates = ["a {}"]\n'
        '[[evaluate]]\nevaluator = "retrieval"\ndata = "scenes"\nlanguages = ["en"]\n'
    )
    return file


def test_a_suite_is_one_table_one_json_and_one_page_for_several_models(capsys, models, suite, scene_shards, tmp_path):
    options = {"suite": suite, "data_root": scene_shards, "workers": 0}
    evaluation = vlm.evaluate(models, **options, out=tmp_path / "out")
    words = [
        "eval",
        *models,
        "--suite",
        suite,
        "--data-root",
        scene_shards,
        "--features",
        tmp_path / "out" / "features",
    ]
    assert main([*map(str, words), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == evaluation.to_json()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == evaluation.to_json()

    first, second = evaluation.comparison.models
    assert [(one.evaluator, one.data) for one in first.measurements] == [
        ("zero-shot", "scenes"),
        ("retrieval", "scenes"),
    ]
    # equal weights: nothing differs
    assert {entry.difference for entry in evaluation.comparison.differences} == {0.0}
    assert [absent.fetch for absent in evaluation.absent] == ["ask for it"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(word in page for word in ("zero-shot", "retrieval", "first", "second"))
    tables = sorted((tmp_path / "out" / "samples").glob("*.parquet"))
    assert len(tables) == 4
    assert read_samples(tables[0]).measurement.num_images == first.measurements[0].num_images

    assert main(list(map(str, words))) == 0
    printed = capsys.readouterr().out
    assert "ask for it" in printed
    assert "difference" in printed
    # a model that is loaded already, alone
    alone = vlm.evaluate(vlm.load(second.model), **options)
    assert alone.comparison.models[0].measurements[0].values == second.measurements[0].values


def test_features_are_computed_once_for_all_evaluators_and_commands(models, suite, scene_shards, tmp_path, monkeypatch):
    options = {"suite": suite, "data_root": scene_shards, "workers": 0, "features": tmp_path / "features"}
    first = vlm.evaluate(models[0], **options)
    # of one set the images once, for the classes and the captions
    assert len(list((tmp_path / "features").glob("images-*.npy"))) == 1

    def refuse(*_):
        raise AssertionError("embedded again")

    monkeypatch.setattr("vlm.models.model.VisionLanguageModel.embed_images", refuse)
    monkeypatch.setattr("vlm.models.model.VisionLanguageModel.embed_texts", refuse)
    assert vlm.evaluate(models[0], **options).to_json() == first.to_json()


def test_images_of_none_of_the_classes_are_rejected_by_the_threshold_that_was_measured(
    capsys, models, scene_shards, tmp_path
):
    (tmp_path / "noise").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "noise" / f"{number}.png")
    options = {"classes": scene_shards / "val", "label": "scene.shape", "workers": 0}
    evaluation = vlm.evaluate(models[0], **options, out_of_distribution=tmp_path / "noise", out=tmp_path / "out")
    # what is drawn has less detail than noise, even for weights that have learnt nothing
    assert evaluation.rejection.whitened_lda.auroc > 0.9
    assert "rejection" in (tmp_path / "out" / "report.html").read_text()
    words = ["eval", models[0], "--classes", scene_shards / "val", "--label", "scene.shape", "--workers", "0"]
    assert main([*map(str, words), "--out-of-distribution", str(tmp_path / "noise")]) == 0
    assert "pass although of none" in capsys.readouterr().out
    names = ",".join(score.name for score in evaluation.zero_shot.classes)
    words = ["classify", models[0], tmp_path / "noise", "--classes", names]
    assert main([*map(str, words), "--reject", str(tmp_path / "out" / "reject.safetensors")]) == 0
    assert capsys.readouterr().out.count("none of these (score") >= 9
    with pytest.raises(vlm.UsageError, match="give --classes FOLDER, too"):
        vlm.evaluate(models[0], retrieval=scene_shards / "val", out_of_distribution=tmp_path / "noise")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "mine"], "There is no suite 'mine'"),
        (["--suite", "small-sets", "--data-root", "nowhere"], "No set of the suite small-sets is below nowhere"),
        (["--suite", "small-sets", "--retrieval", "x"], "A suite names its data itself"),
        ([], "Nothing to evaluate"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_sentence(capsys, models, words, message):
    assert main(["eval", str(models[0]), *words]) == 2
    assert message in capsys.readouterr().err


def test_several_models_need_a_suite_and_none_is_too_few(capsys, models, suite, scene_shards):
    with pytest.raises(vlm.UsageError, match="A model is given twice"):
        vlm.evaluate([models[0], models[0]], suite=suite, data_root=scene_shards)
    with pytest.raises(vlm.UsageError, match="2 models are compared by a suite"):
        vlm.evaluate(models, retrieval=scene_shards / "val")
    assert main(["eval", "--suite", "small-sets"]) == 2
    assert "No model is given" in capsys.readouterr().err


def test_an_evaluation_that_fails_is_told_by_the_exit_code_after_all_others(capsys, models, scene_shards, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        '[data.scenes]\npath = "val"\n[[evaluate]]\nevaluator = "zero-shot"\ndata = "scenes"\n'
        '[[evaluate]]\nevaluator = "retrieval"\ndata = "scenes"\n'
    )
    words = ["eval", models[0], "--suite", file, "--data-root", scene_shards, "--workers", 0]
    assert main(list(map(str, words))) == 1
    streams = capsys.readouterr()
    assert "retrieval" in streams.out
    assert "1 evaluation failed, first zero-shot on scenes" in streams.err
