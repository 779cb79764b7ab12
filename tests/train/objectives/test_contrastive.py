"""Each contrastive term against its definition, hand-made cases, and what must not change it."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.train.objectives.pair_case import (
    LOSS_TERMS,
    LOSSES,
    TREATMENTS,
    batch,
    options,
    slow_loss,
    unit,
    value_and_gradients,
)
from vlm.train.run_config import ObjectiveConfig

CONTRASTIVE = ("clip", "siglip", "dcl", "weighted_dcl")


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("name", CONTRASTIVE)
def test_a_term_is_its_definition(name, treatment, count):
    for seed in range(4):
        outputs, inputs = batch(count, seed)
        wanted = slow_loss(name, outputs, inputs, ObjectiveConfig(same_pairs=treatment))
        found = value_and_gradients(name, outputs, inputs, same_pairs=treatment)[0]
        assert float(found) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("name", LOSS_TERMS)
def test_gradients_are_those_of_finite_differences(name, treatment):
    outputs, inputs = batch(3, width=2)
    names = LOSS_TERMS[name].outputs
    told = options(same_pairs=treatment, similarity_block=2, teacher_scale=4.0)

    def loss(*tensors):
        return LOSSES[name](dict(zip(names, tensors, strict=True)), inputs, told)

    assert torch.autograd.gradcheck(loss, [outputs[name] for name in names])


@pytest.mark.parametrize("name", LOSS_TERMS)
def test_without_the_treatment_no_identities_are_read(name):
    outputs, inputs = batch(4)
    del inputs["same"]
    assert torch.isfinite(value_and_gradients(name, outputs, inputs)[0])
    if name != "distill":
        with pytest.raises(KeyError, match="same"):
            value_and_gradients(name, outputs, inputs, same_pairs="ignore")


def log_cosines(*rows):
    """Outputs and inputs of three pairs, the first two the same; their similarities are the logs of what is given."""
    outputs = {
        "image_features": torch.tensor(rows, dtype=torch.float64).log(),
        "text_features": torch.eye(3, dtype=torch.float64),
        "logit_scale": torch.ones((), dtype=torch.float64),
        "logit_bias": torch.zeros((), dtype=torch.float64),
    }
    return {name: value.requires_grad_() for name, value in outputs.items()}, {"same": torch.tensor([[8], [8], [9]])}


@pytest.mark.parametrize(
    ("name", "treatment", "wanted"),
    [
        ("clip", "negative", [7 / 4, 6 / 3, 7 / 5, 7 / 4, 6 / 3, 7 / 5]),
        ("clip", "ignore", [5 / 4, 4 / 3, 7 / 5, 5 / 4, 4 / 3, 7 / 5]),
        ("clip", "positive", [7 / 8**0.5, 6 / 6**0.5, 7 / 5, 7 / 8**0.5, 6 / 6**0.5, 7 / 5]),
        ("dcl", "negative", [3 / 4, 3 / 3, 2 / 5, 3 / 4, 3 / 3, 2 / 5]),
        ("dcl", "ignore", [1 / 4, 1 / 3, 2 / 5, 1 / 4, 1 / 3, 2 / 5]),
        ("dcl", "positive", [1 / 8**0.5, 1 / 6**0.5, 2 / 5, 1 / 8**0.5, 1 / 6**0.5, 2 / 5]),
        # a positive of odds o costs log (1 + o) / o, a negative log (1 + o); each pair counts once, over three images
        ("siglip", "negative", [5 / 4, 3, 2, 3, 4 / 3, 2, 2, 2, 6 / 5] * 2),
        ("siglip", "ignore", [5 / 4, 2, 4 / 3, 2, 2, 2, 6 / 5] * 2),
        ("siglip", "positive", [5 / 4, 3 / 2, 2, 3 / 2, 4 / 3, 2, 2, 2, 6 / 5] * 2),
    ],
)
def test_same_pairs_by_hand(name, treatment, wanted):
    outputs, inputs = log_cosines([4, 2, 1], [2, 3, 1], [1, 1, 5])
    found = value_and_gradients(name, outputs, inputs, same_pairs=treatment)[0]
    assert float(found) == pytest.approx(sum(map(math.log, wanted)) / 6)


def test_ignored_pairs_get_no_gradient_from_each_other():
    outputs, inputs = batch(2)
    inputs["same"] = torch.tensor([[5, 0], [5, 0]])
    for name in ("clip", "dcl"):
        loss, *gradients = value_and_gradients(name, outputs, inputs, same_pairs="ignore")
        assert float(loss) == 0
        assert all(float(gradient.abs().max()) == 0 for gradient in gradients)


def test_it_is_log_of_the_batch_when_nothing_is_known():
    same = F.normalize(torch.ones(16, 4), dim=-1)
    outputs = {"image_features": same, "text_features": same, "logit_scale": torch.tensor(5.0)}
    for name, wanted in (("clip", 16), ("dcl", 15)):
        assert float(LOSSES[name](outputs, {}, options())) == pytest.approx(math.log(wanted), rel=1e-5)


@pytest.mark.parametrize("name", LOSS_TERMS)
def test_reordering_the_pairs_changes_nothing(name):
    outputs, inputs = batch(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    reordered = {key: value[order] if value.ndim else value for key, value in outputs.items()}
    told = options(same_pairs="positive")
    first = LOSSES[name](outputs, inputs, told)
    second = LOSSES[name](reordered, {key: value[order] for key, value in inputs.items()}, told)
    assert torch.allclose(first, second, rtol=1e-12)


def test_large_logits_stay_finite():
    images = unit(4, 0).float()
    outputs = {
        "image_features": images,
        "text_features": -images,
        "logit_scale": torch.tensor(1000.0),
        "logit_bias": torch.tensor(-10.0),
    }
    outputs = {name: value.requires_grad_() for name, value in outputs.items()}
    for name in CONTRASTIVE:
        assert all(torch.isfinite(value).all() for value in value_and_gradients(name, outputs, {}))
