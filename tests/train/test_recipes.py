import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from tests.docs_script import is_up_to_date
from vlm.cli.main import VERBS, split_verb
from vlm.config import config_differences, from_values, to_toml
from vlm.errors import UsageError
from vlm.train.presets import PRESETS
from vlm.train.recipes import RECIPES, find_recipe, matching_recipe, measured_curves
from vlm.train.run_config import TrainConfig
from vlm.train.task import parse_objective

ROOT = Path(__file__).resolve().parents[2]


def test_every_preset_has_its_recipe_and_every_recipe_its_preset():
    assert list(RECIPES) == list(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_that_would_be_accepted(name):
    config = dataclasses.replace(PRESETS[name][1], data="shards", run="run")
    config.check()
    parse_objective(config.objective.objective)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.preset)
def test_a_recipe_s_commands_exist(recipe):
    for command in (*recipe.prepare, recipe.train, recipe.evaluate):
        if "vlm " not in command:
            continue
        words = shlex.split(command[command.index("vlm ") :])[1:]
        verb, rest = split_verb(words)
        assert verb in VERBS
        assert verb != "train" or rest[0] == recipe.preset


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.preset)
def test_bands_are_in_order_and_have_a_source(recipe):
    for reference in recipe.reference_curves:
        assert reference.source
        shares = [share for share, _, _ in reference.points]
        assert shares == sorted(set(shares))
        assert 0 < shares[0] <= shares[-1] <= 1
        assert all(0 <= low <= high for _, low, high in reference.points)
        assert (reference.kind == "measured") == (reference.width > 0)


def test_datacomp_s_scales_are_the_published_ones():
    for name, seen in (("datacomp-small", 12_800_000), ("datacomp-medium", 128_000_000)):
        config = PRESETS[name][1]
        assert config.steps * config.batch_size == seen
        assert (config.batch_size, config.optimizer.learning_rate, config.optimizer.warmup_steps) == (4096, 5e-4, 500)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'fashion'"):
        find_recipe("fashon")


def test_the_page_is_what_the_table_says():
    assert is_up_to_date("recipes.md"), "python scripts/write_docs.py"
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(re.search(rf"^## {name}$", written, re.MULTILINE) for name in RECIPES)


def test_the_page_of_objectives_is_what_the_table_says():
    assert is_up_to_date("objectives.md"), "python scripts/write_docs.py"


def test_measured_curves_belong_to_recipes_and_are_used():
    assert measured_curves().keys() <= RECIPES.keys()
    assert all(RECIPES[name].reference_curves == curves for name, curves in measured_curves().items())


def saved(name, **changes):
    import tomllib

    return tomllib.loads(to_toml(dataclasses.replace(PRESETS[name][1], **changes)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_is_known_by_its_recipe_whatever_its_data_and_seed(name):
    assert matching_recipe(saved(name, data="x", run="y", seed=7, micro_batch=16)) == name


def test_a_change_that_matters_makes_it_another_run():
    assert matching_recipe(saved("fashion", batch_size=64)) == ""
    assert matching_recipe({}) == ""


def test_settings_that_differ_are_listed_with_all_values():
    one, other = saved("fashion"), saved("fashion", batch_size=64)
    del other["model"]["dropout"]
    assert config_differences([one, other, one]) == {"batch_size": [256, 64, 256], "model.dropout": [0.0, None, 0.0]}


def test_tuples_and_the_lists_of_a_file_are_the_same():
    config = PRESETS["fashion"][1]
    assert config_differences([dataclasses.asdict(config), saved("fashion")]) == {}
    assert from_values(TrainConfig, saved("fashion"), where="test") == config
