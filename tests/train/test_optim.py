"""Which weights move by what."""

import math

import pytest
import torch
from torch import nn

from vlm.train.optim import build_optimizer, set_learning_rate
from vlm.train.run_config import OptimizerConfig


class Tower(nn.Module):
    """Of every sort of weight one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token_embedding = nn.Embedding(7, 4)
        self.positional_embedding = nn.Parameter(torch.randn(3, 4))
        self.patches = nn.Conv2d(3, 4, 2)
        self.hidden = nn.Linear(4, 6)
        self.query = nn.Parameter(torch.randn(1, 4))
        self.norm = nn.LayerNorm(6)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def stepped(tower: Tower, config: OptimizerConfig, steps: int = 1) -> Tower:
    """After steps with made-up gradients, the same for every call."""
    optimizer = build_optimizer(tower, config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in tower.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, config.learning_rate)
        optimizer.step()
    return tower


def moved(before: Tower, after: Tower, name: str) -> torch.Tensor:
    """By how much a weight moved."""
    return (after.get_parameter(name) - before.get_parameter(name)).detach()


def test_only_matrices_decay():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    plain = stepped(Tower(), OptimizerConfig(learning_rate=0.1, weight_decay=0.0))
    after = stepped(Tower(), config)
    changed = {name for name, weight in after.named_parameters() if not torch.equal(weight, plain.get_parameter(name))}
    assert changed == {
        "token_embedding.weight",
        "positional_embedding",
        "patches.weight",
        "hidden.weight",
        "query",
    }


def test_muon_moves_a_matrix_by_an_orthogonal_one_and_the_rest_as_adamw():
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, optimizer="muon")
    after, plain = stepped(Tower(), config, 3), stepped(Tower(), OptimizerConfig(learning_rate=0.01, weight_decay=0), 3)
    for name, weight in after.named_parameters():
        assert torch.equal(weight, plain.get_parameter(name)) == (name != "hidden.weight")
    once = moved(Tower(), stepped(Tower(), config), "hidden.weight")
    singular = torch.linalg.svdvals(once) / (0.01 * 0.2 * math.sqrt(6))
    # five Newton-Schulz iterations bring singular values near one, not to one (Jordan 2024)
    assert (singular > 0.5).all()
    assert (singular < 1.3).all()


def test_muon_moves_kernels_in_channels_last_as_in_the_usual_layout():
    config = OptimizerConfig(learning_rate=0.01, optimizer="muon")
    results: list[torch.Tensor] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        kernels = nn.Conv2d(8, 6, 3).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        optimizer = build_optimizer(kernels, config)
        for gradient in torch.randn(3, 6, 8, 3, 3, generator=torch.Generator().manual_seed(1)):
            kernels.weight.grad = gradient.clone(memory_format=torch.preserve_format)
            optimizer.step()
        results.append(kernels.weight.detach())
    torch.testing.assert_close(results[0], results[1].contiguous(), rtol=0, atol=1e-4)
    assert not torch.allclose(results[0], results[0].flip(3), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "faster"),
    [
        ("token_embedding.weight", OptimizerConfig(learning_rate=0.01, weight_decay=0.0, table_rate=5.0)),
        ("norm.weight", OptimizerConfig(learning_rate=0.01, weight_decay=0.0, gain_rate=5.0)),
        ("patches.weight", OptimizerConfig(learning_rate=0.01, weight_decay=0.0, kernel_rate=5.0)),
        ("logit_scale", OptimizerConfig(learning_rate=0.01, weight_decay=0.0, temperature_rate=5.0)),
    ],
)
def test_relative_rates_scale_the_steps_of_their_weights_alone(name, faster):
    plain = OptimizerConfig(learning_rate=0.01, weight_decay=0.0)
    before, once, five = Tower(), stepped(Tower(), plain), stepped(Tower(), faster)
    assert torch.allclose(moved(before, five, name), 5 * moved(before, once, name), rtol=1e-4)
    for other in ("hidden.weight", "positional_embedding", "query"):
        assert torch.equal(five.get_parameter(other), once.get_parameter(other))
