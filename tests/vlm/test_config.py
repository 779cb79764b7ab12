from dataclasses import asdict

import pytest

from vlm.config import from_toml, from_values, to_toml
from vlm.errors import UsageError
from vlm.train.presets import PRESETS, open_preset
from vlm.train.run_config import TrainConfig, changed_settings


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
