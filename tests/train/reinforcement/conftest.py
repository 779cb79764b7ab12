"""Teachers of reinforced shards."""

from typing import Any

import pytest
import torch

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.models.factory import build_network, fit_to_tokenizer, model_config
from vlm.models.model import VisionLanguageModel


@pytest.fixture
def make_teacher(scene_tokenizer):
    """A function from a seed, and the pixels it sees, to a small model with weights drawn from the seed."""

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
