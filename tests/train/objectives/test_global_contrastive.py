"""SogCLR and FastCLIP beside a slow version sample by sample, and their state over steps, resumes and processes."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.train.test_run import interrupt_after
from vlm.train.checkpoint.checkpoint_files import AVERAGES, list_checkpoints
from vlm.train.objectives.global_contrastive import (
    IMAGE_AVERAGE,
    INNER_RATE,
    TEXT_AVERAGE,
    GlobalAverages,
    inner_rate_at,
    new_averages,
)
from vlm.train.objectives.loss_term import LossOptions
from vlm.train.run import train
from vlm.train.run_config import ObjectiveConfig
from vlm.train.task import LOSS_TERMS

EPSILON = 1e-14


def slow_means(images, texts, tau, same=None):
    """g of each image and each text, one exponential after the other, in double precision; None without negatives."""
    number = len(images)
    means = []
    for rows, columns in ((images, texts), (texts, images)):
        own = []
        for i in range(number):
            terms = [
                torch.exp((rows[i] @ columns[j] - rows[i] @ columns[i]) / tau)
                for j in range(number)
                if j != i and (same is None or not any(a == b != 0 for a, b in zip(same[i], same[j], strict=True)))
            ]
            own.append(torch.stack(terms).mean() if terms else None)
        means.append(own)
    return means


def slow_averages(means, old, gamma):
    """u of each image and each text; `old` holds None for what was not seen."""
    return [
        [
            before if now is None else now.item() if before is None else (1 - gamma) * before + gamma * now.item()
            for now, before in zip(own, earlier, strict=True)
        ]
        for own, earlier in zip(means, old, strict=True)
    ]


def slow_gradient_scalar(means, averages, tau, rho):
    """A scalar whose gradient is that of the papers: τ/(ε+u) ∇g, and for ρ also log(ε+u) along τ."""
    number = len(means[0])
    total = torch.zeros((), dtype=torch.float64)
    for own, held in zip(means, averages, strict=True):
        for g, u in zip(own, held, strict=True):
            if g is None:
                continue
            total = total + tau.detach() / (EPSILON + u) * g / number / 2
            if rho is not None:
                total = total + tau * math.log(EPSILON + u) / number / 2
    return total if rho is None else total + rho * tau


def drawn(seed, number=7, width=5):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, number, width, generator=generator, dtype=torch.float64)
    return F.normalize(images, dim=1).requires_grad_(), F.normalize(texts, dim=1).requires_grad_()


@pytest.mark.parametrize("name", ["sogclr", "fastclip"])
@pytest.mark.parametrize("same_pairs", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("block", [3, 1024])
def test_values_and_gradients_are_those_of_a_slow_version_over_three_batches(name, same_pairs, block):
    options = LossOptions(config=ObjectiveConfig(similarity_block=block, same_pairs=same_pairs, rho=2.5), pad_token=0)
    term = LOSS_TERMS[name]
    old = [[None] * 7, [None] * 7]
    held = {IMAGE_AVERAGE: torch.full((7,), torch.nan), TEXT_AVERAGE: torch.full((7,), torch.nan)}
    held = {key: value.double() for key, value in held.items()}
    same = torch.tensor([[1, 9], [2, 9], [1, 0], [4, 0], [5, 5], [6, 6], [7, 7]])
    for step, gamma in enumerate((1.0, 0.6, 0.2)):
        images, texts = drawn(step)
        log_scale = torch.tensor(math.log(1 / 0.05), dtype=torch.float64, requires_grad=True)
        outputs = {"image_features": images, "text_features": texts, "logit_scale": log_scale.exp()}
        inputs = held | {INNER_RATE: torch.full((7,), gamma, dtype=torch.float64), "same": same}
        held = new_averages(outputs, inputs, options)
        loss = term.batch_level(outputs, inputs | held, options)
        found = torch.autograd.grad(loss, [images, texts, log_scale])

        tau = 1 / log_scale.exp()
        means = slow_means(images, texts, tau, None if same_pairs == "negative" else same.tolist())
        old = slow_averages(means, old, gamma)
        rho = 2.5 if name == "fastclip" else None
        scalar = slow_gradient_scalar(means, old, tau if rho is not None else tau.detach(), rho)
        wanted = list(torch.autograd.grad(scalar, [images, texts, log_scale], allow_unused=True))
        if name == "sogclr":
            # the temperature is a constant
            wanted[2] = torch.zeros_like(log_scale)
            means = slow_means(images, texts, tau.detach(), None if same_pairs == "negative" else same.tolist())
            scalar = slow_gradient_scalar(means, old, tau.detach(), None)
            wanted[:2] = torch.autograd.grad(scalar, [images, texts])
        value = sum(tau.item() * math.log(EPSILON + u) for own in old for u in own) / 14 + (rho or 0) * tau.item()
        assert loss.item() == pytest.approx(value, rel=1e-9)
        for own, reference in zip(found, wanted, strict=True):
            torch.testing.assert_close(own, reference, rtol=1e-9, atol=1e-12)
        for key, reference in zip((IMAGE_AVERAGE, TEXT_AVERAGE), old, strict=True):
            torch.testing.assert_close(held[key].exp(), torch.tensor(reference, dtype=torch.float64), rtol=1e-9, atol=0)


def test_with_a_rate_of_one_it_is_the_decoupled_gradient_times_the_temperature():
    # u = g: τ ∇g/g = τ ∇log g, what DCL without its weights minimises
    images, texts = drawn(0)
    options = LossOptions(config=ObjectiveConfig(), pad_token=0)
    outputs = {"image_features": images, "text_features": texts, "logit_scale": torch.tensor(20.0).double()}
    inputs = {name: torch.full((7,), torch.nan).double() for name in (IMAGE_AVERAGE, TEXT_AVERAGE)}
    inputs |= {INNER_RATE: torch.ones(7).double()}
    inputs |= new_averages(outputs, inputs, options)
    found = torch.autograd.grad(LOSS_TERMS["sogclr"].batch_level(outputs, inputs, options), images)[0]
    wanted = torch.autograd.grad(LOSS_TERMS["dcl"].batch_level(outputs, inputs, options), images)[0]
    torch.testing.assert_close(found, wanted / 20, rtol=1e-9, atol=1e-12)


def test_a_small_temperature_overflows_nothing():
    images, texts = drawn(1)
    texts = -images.detach()
    outputs = {
        "image_features": images.float(),
        "text_features": texts.float(),
        "logit_scale": torch.tensor(100.0, requires_grad=True),
    }
    options = LossOptions(config=ObjectiveConfig(), pad_token=0)
    # an average far below and one far above what a batch gives
    inputs = {
        IMAGE_AVERAGE: torch.full((7,), -150.0),
        TEXT_AVERAGE: torch.full((7,), 150.0),
        INNER_RATE: torch.full((7,), 0.2),
    }
    inputs |= new_averages(outputs, inputs, options)
    loss = LOSS_TERMS["fastclip"].batch_level(outputs, inputs, options)
    gradients = torch.autograd.grad(loss, [images, outputs["logit_scale"]])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_rate_falls_from_one_to_its_lowest():
    rates = [inner_rate_at(epoch, lowest=0.2, decay_epochs=10) for epoch in range(15)]
    assert rates[0] == 1
    assert rates == sorted(rates, reverse=True)
    assert rates[10:] == [0.2] * 5
    assert rates[5] == pytest.approx(0.6)
    assert inner_rate_at(1, lowest=0.9, decay_epochs=0) == 0.9


def test_averages_are_kept_by_sample_and_the_last_of_two_visits_counts():
    averages = GlobalAverages.unseen(5)
    new = {IMAGE_AVERAGE: torch.tensor([1.0, 2.0, 3.0]), TEXT_AVERAGE: torch.tensor([4.0, 5.0, 6.0])}
    averages.update(torch.tensor([3, 0, 3]), new)
    read = averages.inputs(torch.tensor([0, 3, 1]))
    assert read[IMAGE_AVERAGE][:2].tolist() == [2.0, 3.0]
    assert read[TEXT_AVERAGE][:2].tolist() == [5.0, 6.0]
    assert math.isnan(read[IMAGE_AVERAGE][2])


def test_a_resumed_run_keeps_the_averages_and_micro_batches_change_nothing(configure, history):
    def config(name, **changes):
        objective = {"objective": "fastclip", "inner_rate": 0.3}
        return configure(name, objective=objective, peak_tflops=1.0, model={"patch_dropout": 0.0}, **changes)

    whole = config("whole")
    train(whole)
    again = config("again")
    interrupt_after(again, whole.run, 8)
    train(again, resume=True)
    assert history(again.run) == history(whole.run)
    files = [list_checkpoints(Path(run) / "checkpoints")[-1] / AVERAGES for run in (whole.run, again.run)]
    assert files[0].read_bytes() == files[1].read_bytes()

    parts = config("parts", micro_batch=5)
    train(parts)
    for one, other in zip(history(whole.run), history(parts.run), strict=True):
        assert one[1] == pytest.approx(other[1], rel=1e-4)
        assert one[2] == other[2]


def test_a_constant_temperature_stays_what_is_asked_for(configure):
    from vlm.models.load import load_model

    config = configure("run", steps=2, peak_tflops=1.0, objective={"objective": "sogclr", "temperature": 0.05})
    train(config)
    assert load_model(config.run).logit_scale == pytest.approx(20, rel=1e-6)
