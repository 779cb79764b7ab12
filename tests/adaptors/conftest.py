"""A model with random weights for the adaptors to stand around."""

from pathlib import Path

import pytest

import vlm
from tests.random_model import write_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, scene_tokenizer) -> Path:
    """Its folder."""
    return write_random_model(tmp_path_factory.mktemp("model") / "model", "tiny", scene_tokenizer)


@pytest.fixture(scope="module")
def model(folder) -> vlm.Model:
    return vlm.load(folder, device="cpu")
