import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vlm.config import from_toml, from_values, to_toml
from vlm.errors import UsageError
from vlm.train.presets import PRESETS, open_preset
from vlm.train.run_config import TrainConfig, changed_settings, override


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_toml_as_it_was(name, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(PRESETS[name][1]))
    assert from_toml(TrainConfig, path) == PRESETS[name][1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise = 3", "unknown key 'batch_sise'; did you mean 'batch_size'"),
        ("[optimizer]\nlerning_rate = 1", "unknown key 'optimizer.lerning_rate'; did you mean 'learning_rate'"),
        ("learning_rate = 1", r"unknown key 'learning_rate'; 'learning_rate' belongs in the table \[optimizer\]"),
        ("[optimizer]\nbatch_size = 1", "'optimizer.batch_size'; 'batch_size' belongs at the top, before the first"),
        ("lerning_rate = 1", r"did you mean 'learning_rate'\? 'learning_rate' belongs in the table \[optimizer\]"),
        ("batch_size = 'many'", "batch_size = 'many' does not fit"),
        ("precision = 'fp8'", "precision = 'fp8' does not fit"),
        ("batch_size = ", "is not TOML"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(text, message, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        from_toml(TrainConfig, path)


@pytest.mark.parametrize("base", ["tiny", "base.toml"])
def test_a_file_may_change_a_preset_or_another_file(base, tmp_path):
    (tmp_path / "base.toml").write_text(to_toml(open_preset("tiny")))
    path = tmp_path / "run.toml"
    path.write_text(f"preset = '{base}'\nepochs = 2.0\n[optimizer]\nbeta1 = 0.8\n")
    tiny = open_preset("tiny")
    changed = replace(tiny, epochs=2.0, optimizer=replace(tiny.optimizer, beta1=0.8))
    assert open_preset(str(path)) == changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset = 'tinny'", "Unknown preset 'tinny'; did you mean 'tiny'"),
        ("preset = 'run.toml'", "run.toml: preset = 'run.toml' is the file itself"),
        ("preset = 'tiny'\nbatch_sise = 3", "run.toml: unknown key 'batch_sise'"),
        ("preset = 3", "no configuration|Unknown preset '3'"),
    ],
)
def test_a_file_with_a_preset_is_refused_by_name(text, message, tmp_path):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        open_preset(str(tmp_path / "run.toml"))


def test_the_file_of_the_recipes_page_is_one(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
    [example] = re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.toml").write_text(example)
    changed = open_preset(str(tmp_path / "mine.toml"))
    assert changed.optimizer.learning_rate == 3e-3
    assert changed.model == open_preset("fashion").model


def test_resuming_a_run_that_is_not_there_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"There is no run '.*/gone' to resume; .* --run .*/gone begins it"):
        open_preset(str(tmp_path / "gone"), resume=True)
    with pytest.raises(UsageError, match=r"to resume.*did you mean 'tiny'"):
        open_preset("tinny", resume=True)
    with pytest.raises(UsageError, match="is not a run: it has no"):
        open_preset(str(tmp_path), resume=True)


def test_settings_are_set_by_their_names_those_of_their_flags_and_by_groups():
    config = override(
        TrainConfig(), {"learning_rate": 1e-4, "ema_decay": 0.9, "objective": "siglip", "loader": {"workers": 3}}
    )
    assert (config.optimizer.learning_rate, config.optimizer.average_decay) == (1e-4, 0.9)
    assert (config.objective.objective, config.loader.workers) == ("siglip", 3)
    with pytest.raises(UsageError, match="Unknown setting 'learning_rat'; did you mean 'learning_rate'"):
        override(TrainConfig(), {"learning_rat": 1})
    with pytest.raises(UsageError, match=r"settings: batch_size = 'many' does not fit"):
        override(TrainConfig(), {"batch_size": "many"})
    with pytest.raises(UsageError, match=r"unknown key .loader\.learning_rate."):
        override(TrainConfig(), {"loader": {"learning_rate": 3}})


def test_every_setting_has_a_name_of_its_own():
    # so that flags and keywords need no groups
    names = [name for name, value in asdict(TrainConfig()).items() if not isinstance(value, dict)]
    for group in asdict(TrainConfig()).values():
        names += group if isinstance(group, dict) else ()
    assert len(names) == len(set(names))


def test_differences_are_dotted_and_show_both_values():
    one = from_values(TrainConfig, {"optimizer": {"learning_rate": 0.1}}, where="test")
    other = from_values(TrainConfig, {"optimizer": {"learning_rate": 0.2}}, where="test")
    assert changed_settings(asdict(one), asdict(other)) == ["optimizer.learning_rate: 0.1 → 0.2"]


def test_an_open_clip_architecture_is_a_preset_too():
    assert open_preset("ViT-B-32").model.architecture == "ViT-B-32"
    assert open_preset("coca_ViT-B-32").objective.objective == "coca"


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'tiny'"):
        open_preset("tinny")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "--data is needed"),
        ({"data": "x"}, "--run is needed"),
        (
            {"data": "x", "run": "y", "sharding": "fsdp", "optimizer": {"optimizer": "muon"}},
            "muon needs whole matrices",
        ),
        (
            {"data": "x", "run": "y", "model": {"image_size": -1}},
            "image_size = -1 is outside its range; give at least 0",
        ),
        ({"data": "x", "run": "y", "batch_size": 1}, "batch_size = 1 is outside its range; give at least 2"),
        ({"data": "x", "run": "y", "epochs": 0.0}, "epochs = 0.0 is not a length"),
        ({"data": "x", "run": "y", "loader": {"crop_scale": (0.5, 2.0)}}, "not a range inside"),
    ],
)
def test_values_that_cannot_work_are_refused_with_their_limit(values, message):
    with pytest.raises(UsageError, match=message):
        from_values(TrainConfig, values, where="test").check()
