"""The losses open_clip has too, from its own code."""

import pytest
import torch

from tests.train.objectives.pair_case import batch, value_and_gradients


@pytest.fixture(scope="module")
def losses():
    """open_clip's losses."""
    from open_clip import loss

    return loss


def assert_equal(found, loss, outputs):
    names = list(outputs)
    gradients = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    assert torch.allclose(found[0], loss, rtol=1e-12)
    for name, one, other in zip(names, found[1:], gradients, strict=True):
        assert torch.allclose(one, torch.zeros_like(one) if other is None else other, rtol=0, atol=1e-12), name


def test_the_softmax_loss(losses):
    outputs, inputs = batch(7)
    found = value_and_gradients("clip", outputs, inputs, similarity_block=3)
    loss = losses.ClipLoss()(outputs["image_features"], outputs["text_features"], outputs["logit_scale"])
    assert_equal(found, loss, outputs)


def test_the_sigmoid_loss(losses):
    outputs, inputs = batch(7)
    found = value_and_gradients("siglip", outputs, inputs, similarity_block=3)
    assert_equal(found, losses.SigLipLoss()(**outputs), outputs)


def test_distillation_up_to_the_teachers_entropy(losses):
    outputs, inputs = batch(7)
    found = value_and_gradients("distill", outputs, inputs, similarity_block=3, teacher_scale=5.0)
    images, texts = inputs["teacher_image"], inputs["teacher_text"]
    _, theirs = losses.DistillClipLoss()(
        outputs["image_features"], outputs["text_features"], outputs["logit_scale"], images, texts, 5.0
    )
    logits = 5 * images @ texts.T
    entropy = sum(torch.distributions.Categorical(logits=rows).entropy().mean() / 2 for rows in (logits, logits.T))
    assert_equal(found, theirs - entropy, outputs)
