"""Small models with random weights, which tests of commands and calls need where no answer has to be right."""

from pathlib import Path

import torch

from vlm.data.tokenizers import Tokenizer, open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.models.load import save_model_folder
from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer, model_config


def random_model(architecture: str, tokenizer: Tokenizer, *, seed: int = 0) -> VisionLanguageModel:
    """A model for images of 32 pixels; the same seed gives the same weights."""
    config = fit_to_tokenizer(model_config(architecture), tokenizer)
    torch.manual_seed(seed)
    return VisionLanguageModel(
        name="random",
        network=build_network(config).eval(),
        config=config,
        view=EvalTransform(size=32),
        tokenizer=tokenizer,
    )


def write_random_model(folder: Path, architecture: str, tokenizer_file: Path) -> Path:
    """The folder, with such a model of 24 tokens in it."""
    save_model_folder(folder, random_model(architecture, open_tokenizer(str(tokenizer_file), 24)), inputs={})
    return folder
