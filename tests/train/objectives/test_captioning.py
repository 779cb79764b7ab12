import math

import pytest
import torch

from vlm.train.objectives.captioning import CAPTION, caption, next_token_loss
from vlm.train.objectives.loss_term import LossOptions
from vlm.train.run_config import ObjectiveConfig

OPTIONS = LossOptions(config=ObjectiveConfig(), pad_token=0)
LABELS = torch.tensor([[3, 4, 2, 0, 0], [2, 0, 0, 0, 0], [5, 6, 7, 8, 2], [1, 2, 0, 0, 0]])
TOKENS = torch.cat([torch.ones(4, 1, dtype=torch.int64), LABELS], dim=1)


def logits_of(dtype=torch.float64):
    return torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def mean_loss(logits, labels, tokens):
    normaliser = CAPTION.normaliser({"tokens": tokens}, OPTIONS)
    return caption({"logits": logits, "labels": labels}, {"tokens": tokens}, OPTIONS) / normaliser


def test_it_is_its_definition():
    total, count = 0.0, 0
    for row, labels in zip(logits_of(), LABELS.tolist(), strict=True):
        for place, label in enumerate(labels):
            if label:
                exponentials = [math.exp(value) for value in row[place].tolist()]
                total -= math.log(exponentials[label] / sum(exponentials))
                count += 1
    assert float(mean_loss(logits_of(), LABELS, TOKENS)) == pytest.approx(total / count, rel=1e-12)


def test_its_mean_is_the_captioning_part_of_open_clips_coca_loss():
    from open_clip.loss import CoCaLoss

    features, scale = torch.eye(4, dtype=torch.float64), torch.tensor(1.0)
    parts = CoCaLoss(caption_loss_weight=1, clip_loss_weight=0)(
        features, features, logits_of(), LABELS, scale, output_dict=True
    )
    assert torch.allclose(mean_loss(logits_of(), LABELS, TOKENS), parts["caption_loss"], atol=1e-12)


def test_parts_of_a_batch_add_up_to_its_gradient():
    whole, parts = logits_of().requires_grad_(), logits_of().requires_grad_()
    caption({"logits": whole, "labels": LABELS}, {}, OPTIONS).backward()
    for rows in (slice(0, 1), slice(1, 4)):
        caption({"logits": parts[rows], "labels": LABELS[rows]}, {}, OPTIONS).backward()
    assert whole.grad is not None
    assert parts.grad is not None
    assert torch.allclose(whole.grad, parts.grad, atol=1e-15)


def test_logits_of_half_precision_are_summed_in_single():
    loss = next_token_loss(logits_of(torch.bfloat16), LABELS, pad_token=0)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, next_token_loss(logits_of(torch.bfloat16).float(), LABELS, pad_token=0))


def test_label_smoothing_spreads_a_share_over_all_tokens():
    options = LossOptions(config=ObjectiveConfig(label_smoothing=0.2), pad_token=0)
    log_probabilities = logits_of().log_softmax(dim=-1)
    is_target = LABELS != 0
    likely = log_probabilities.gather(2, LABELS[..., None])[..., 0]
    wanted = -(0.8 * likely + 0.2 * log_probabilities.mean(dim=2))[is_target].sum()
    assert torch.allclose(caption({"logits": logits_of(), "labels": LABELS}, {}, options), wanted, atol=1e-12)
