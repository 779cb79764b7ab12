"""Small runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm.config import from_values
from vlm.train.run_config import TrainConfig

SMALL = {
    "architecture": "micro",
    "image_size": 32,
    "context_length": 24,
}


@pytest.fixture
def configure(scene_shards, scene_tokenizer, tmp_path) -> Callable[..., TrainConfig]:
    """A function from a run's name and changes to the configuration of a small run."""

    def make(name: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "data": str(scene_shards / "train"),
            "run": str(tmp_path / name),
            "batch_size": 20,
            "steps": 12,
            "log_every": 1,
            "evaluate_every": 100,
            "model": SMALL | {"tokenizer": str(scene_tokenizer)} | changes.pop("model", {}),
            "loader": {"workers": 0, "shuffle_window": 50, "languages": ("en",)} | changes.pop("loader", {}),
            "safety": {"checkpoint_every": 4} | changes.pop("safety", {}),
            "optimizer": {"warmup_steps": 2, "learning_rate": 3e-3} | changes.pop("optimizer", {}),
        }
        return from_values(TrainConfig, values | changes, where="test")

    return make


@pytest.fixture
def history() -> Callable[[Path | str], list[tuple]]:
    """A function from a run to (step, loss, digest of the sample keys) of each logged step."""
    from vlm.train.history import read_metrics

    return lambda run: [
        (line["step"], line["loss"], line["samples"]) for line in read_metrics(Path(run) / "metrics.jsonl")
    ]
