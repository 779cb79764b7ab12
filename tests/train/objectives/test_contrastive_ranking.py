"""The ranking term against its definition and by hand."""

import pytest
import torch

from tests.train.objectives.pair_case import TREATMENTS, batch, slow_loss, value_and_gradients
from vlm.train.run_config import ObjectiveConfig

NEGATIVES = ("both", "images", "texts", "hardest")


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_it_is_its_definition(negatives, treatment, count):
    config = {"same_pairs": treatment, "negatives": negatives, "margin": 0.3}
    for seed in range(4):
        outputs, inputs = batch(count, seed)
        wanted = slow_loss("ranking", outputs, inputs, ObjectiveConfig(**config))
        assert float(value_and_gradients("ranking", outputs, inputs, **config)[0]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("negatives", "wanted"),
    [
        # images against wrong texts: 0.5, 0.1; 0.3, 0; 0, 0. Texts against wrong images: 0.5, 0; 0.3, 0; 0.1, 0
        ("texts", 0.9),
        ("images", 0.9),
        ("both", 1.8),
        ("hardest", 0.5 + 0.3 + 0.5 + 0.3 + 0.1),
    ],
)
def test_wrong_partners_by_hand(negatives, wanted):
    cosines = torch.tensor([[0.5, 0.8, 0.4], [0.8, 0.7, 0.1], [0.1, 0.2, 0.5]], dtype=torch.float64)
    outputs = {"image_features": cosines, "text_features": torch.eye(3, dtype=torch.float64)}
    outputs = {name: value.requires_grad_() for name, value in outputs.items()}
    found = value_and_gradients("ranking", outputs, {}, negatives=negatives, margin=0.2)[0]
    assert float(found) == pytest.approx(wanted / 3)


def test_it_is_zero_once_every_negative_keeps_its_distance():
    outputs = {"image_features": torch.eye(4).requires_grad_(), "text_features": torch.eye(4).requires_grad_()}
    for negatives in NEGATIVES:
        loss, *gradients = value_and_gradients("ranking", outputs, {}, negatives=negatives, margin=0.9)
        assert float(loss) == 0
        assert all(float(gradient.abs().max()) == 0 for gradient in gradients)
        assert float(value_and_gradients("ranking", outputs, {}, negatives=negatives, margin=1.1)[0]) > 0


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_gradients_are_those_of_finite_differences(negatives):
    outputs, inputs = batch(5, seed=3)
    found = value_and_gradients("ranking", outputs, inputs, negatives=negatives, similarity_block=2)[1]
    step = 1e-6
    for row in range(5):
        moved = {name: value.detach().clone().requires_grad_() for name, value in outputs.items()}
        with torch.no_grad():
            moved["image_features"][row, 0] += step
        above = value_and_gradients("ranking", moved, inputs, negatives=negatives)[0]
        with torch.no_grad():
            moved["image_features"][row, 0] -= 2 * step
        below = value_and_gradients("ranking", moved, inputs, negatives=negatives)[0]
        assert float(above - below) / 2 / step == pytest.approx(float(found[row, 0]), abs=1e-6)
