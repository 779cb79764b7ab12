import pytest
import torch
from torch.nn import functional as F

from vlm.models.coca import text_log_likelihoods
from vlm.models.model import build_network, model_config
from vlm.models.network import Captioner

PAD, START, END = 0, 1, 2


@pytest.fixture
def network() -> torch.nn.Module:
    """A captioner of random weights, large enough that texts and images differ."""
    torch.manual_seed(0)
    network = build_network(model_config("micro-coca")).eval()
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(2)
    return network


def rows() -> torch.Tensor:
    """Texts of 4, 9 and 3 tokens, padded to the context length."""
    tokens = torch.full((3, 24), PAD)
    for row, length in enumerate((4, 9, 3)):
        tokens[row, :length] = torch.tensor([START, *range(7 + row, 5 + row + length), END])
    return tokens


@torch.no_grad()
def slow_likelihood(network: torch.nn.Module, image: torch.Tensor, tokens: torch.Tensor) -> float:
    """An image and a whole row through open_clip's own forward."""
    outputs = network(image[None], tokens[None])
    losses = F.cross_entropy(outputs["logits"][0], outputs["labels"][0], reduction="none")
    return -float(losses[outputs["labels"][0] != PAD].mean())


def test_likelihoods_are_those_of_each_pair_alone(network: Captioner) -> None:
    torch.manual_seed(1)
    pixels, tokens = torch.randn(4, 3, 32, 32), rows()
    with torch.no_grad():
        found = text_log_likelihoods(network, pixels, tokens, pad_token=PAD)
    expected = [[slow_likelihood(network, image, row) for row in tokens] for image in pixels]
    assert found.shape == (4, 3)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)
    assert float(found.std(dim=0).min()) > 1e-3


def test_a_token_that_is_numbered_as_padding_does_not_cut_the_text(network: Captioner) -> None:
    torch.manual_seed(1)
    pixels, tokens = torch.randn(2, 3, 32, 32), rows()[1:2]
    tokens[0, 3] = PAD
    with torch.no_grad():
        found = text_log_likelihoods(network, pixels, tokens, pad_token=PAD)
    expected = [slow_likelihood(network, image, tokens[0]) for image in pixels]
    assert torch.allclose(found[:, 0], torch.tensor(expected), atol=1e-4)
