from dataclasses import asdict

import pytest

from vlm.errors import UsageError
from vlm.train.run_config import (
    FREE_ON_RESUME,
    TrainConfig,
    changed_config_error,
    changed_settings,
    check_allowed_keys,
    disallowed_changes,
)

CHANGED = ["batch_size: 20 → 30", "optimizer.learning_rate: 0.1 → 0.2", "optimizer.beta1: 0.9 → 0.8", "val: '' → 'x'"]


@pytest.mark.parametrize(
    ("allow", "left"),
    [
        ([], [0, 1, 2]),
        (["batch_size"], [1, 2]),
        (["batch-size", "optimizer.learning-rate"], [2]),
        (["optimizer"], [0]),
        (["optim"], [0, 1, 2]),
        (["optimizer.learning_rate.more"], [0, 1, 2]),
        (["optimizer", "batch_size"], []),
    ],
)
def test_keys_and_groups_are_allowed_and_what_is_free_is_so_anyway(allow, left):
    assert disallowed_changes(CHANGED, allow, free=FREE_ON_RESUME) == [CHANGED[number] for number in left]


def test_differences_of_real_configurations_are_judged():
    changed = changed_settings(asdict(TrainConfig()), asdict(TrainConfig(seed=1, batch_size=8)))
    assert disallowed_changes(changed, ["seed"]) == ["batch_size: 256 → 8"]


def test_a_name_that_no_key_has_is_refused_with_the_nearest():
    check_allowed_keys(["optimizer", "optimizer.learning-rate", "batch_size"], asdict(TrainConfig()))
    with pytest.raises(UsageError, match=r"Unknown --allow 'batch_sise'; did you mean 'batch_size'\?"):
        check_allowed_keys(["batch_sise"], asdict(TrainConfig()))


def test_the_refusal_says_what_changed_and_what_would_allow_it():
    told = str(changed_config_error("runs/a", disallowed_changes(CHANGED, ["optimizer"], free=FREE_ON_RESUME)))
    assert "runs/a was begun with another configuration:\n  batch_size: 20 → 30\n" in told
    assert told.endswith("add: --allow batch_size")
    assert "learning_rate" not in told
