"""A model with random weights for the adaptors to stand around."""

from pathlib import Path

import pytest
import torch

import vlm
from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.models.factory import build_network, fit_to_tokenizer, model_config
from vlm.models.load import save_model_folder
from vlm.models.model import VisionLanguageModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene_tokenizer) -> Path:
    """Its folder."""
    tokenizer = open_tokenizer(str(scene_tokenizer), 24)
    config = fit_to_tokenizer(model_config("tiny"), tokenizer)
    torch.manual_seed(0)
    encoder = VisionLanguageModel(
        name="random",
        network=build_network(config).eval(),
        config=config,
        view=EvalTransform(size=32),
        tokenizer=tokenizer,
    )
    path = tmp_path_factory.mktemp("model") / "model"
    save_model_folder(path, encoder, inputs={})
    return path


@pytest.fixture(scope="module")
def model(folder) -> vlm.Model:
    return vlm.load(folder, device="cpu")
