"""Small runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a run keeps its checkpoints; the run's folder exists."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def make_teacher(scene_tokenizer):
    """A function from a seed, and the pixels it sees, to a small model with weights drawn from the seed."""

    from vlm.data.tokenizers import open_tokenizer
    from vlm.data.transforms import EvalTransform
    from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer, model_config

    def make(seed: int, *, size: int = 32, embed_dim: int = 16) -> VisionLanguageModel:
        tokenizer = open_tokenizer(str(scene_tokenizer), 24)
        config: dict[str, Any] = fit_to_tokenizer(model_config("micro"), tokenizer) | {"embed_dim": embed_dim}
        config["vision_cfg"]["image_size"] = size
        torch.manual_seed(seed)
        network = build_network(config).eval()
        with torch.no_grad():  # fresh towers make nearly the same of everything
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter *= 4
        view = EvalTransform(size=size)
        return VisionLanguageModel(name=str(seed), network=network, config=config, view=view, tokenizer=tokenizer)

    return make
