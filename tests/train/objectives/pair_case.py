"""A batch of pairs with all that the contrastive terms read, and each loss as a plain double loop over it."""

import math
from typing import Any

import torch
from torch.nn import functional as F

from vlm.train.objectives.contrastive import CLIP, DCL, RANKING, SIGLIP, WEIGHTED_DCL
from vlm.train.objectives.distillation import DISTILL
from vlm.train.objectives.loss_term import Inputs, LossFunction, LossOptions, Outputs
from vlm.train.run_config import ObjectiveConfig

LOSS_TERMS = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "dcl": DCL,
    "weighted_dcl": WEIGHTED_DCL,
    "ranking": RANKING,
    "distill": DISTILL,
}
LOSSES: dict[str, LossFunction] = {name: term.batch_level for name, term in LOSS_TERMS.items() if term.batch_level}
TREATMENTS = ("negative", "ignore", "positive")


def unit(count: int, seed: int, width: int = 6) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1)


def options(**config: Any) -> LossOptions:
    return LossOptions(config=ObjectiveConfig(**config), pad_token=0)


def batch(count: int, seed: int = 0, width: int = 6) -> tuple[Outputs, Inputs]:
    """Outputs that require gradients, and inputs; some pairs share one of two identities, some have none."""
    outputs = {
        "image_features": unit(count, seed, width),
        "text_features": unit(count, seed + 1, width),
        "logit_scale": torch.tensor(3.0, dtype=torch.float64),
        "logit_bias": torch.tensor(-1.5, dtype=torch.float64),
    }
    draw = torch.Generator().manual_seed(seed + 2)
    inputs = {
        "same": torch.randint(0, max(count, 2), (count, 2), generator=draw),
        "teacher_image": unit(count, seed + 3, width=4),
        "teacher_text": unit(count, seed + 4, width=4),
    }
    return {name: value.requires_grad_() for name, value in outputs.items()}, inputs


def value_and_gradients(name: str, outputs: Outputs, inputs: Inputs, **config: Any) -> list[torch.Tensor]:
    """The loss and its gradients to the outputs, zero where it reads none."""
    loss = LOSSES[name](outputs, inputs, options(**config))
    found = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
    gradients = [
        torch.zeros_like(output) if gradient is None else gradient
        for output, gradient in zip(outputs.values(), found, strict=True)
    ]
    return [loss.detach(), *gradients]


def are_same(one: list[int], other: list[int]) -> bool:
    return any(first == second != 0 for first, second in zip(one, other, strict=True))


def slow_loss(name: str, outputs: Outputs, inputs: Inputs, config: ObjectiveConfig) -> float:
    """The loss by its definition, number by number."""
    images, texts = outputs["image_features"].tolist(), outputs["text_features"].tolist()
    scale, bias = float(outputs["logit_scale"].detach()), float(outputs["logit_bias"].detach())
    if name == "distill":
        teachers = inputs["teacher_image"].tolist(), inputs["teacher_text"].tolist()
        return _slow_distillation((images, texts), teachers, scale, config.teacher_scale)
    by_image = by_text = 0.0
    for number in range(len(images)):
        same = [are_same(inputs["same"][number].tolist(), row) for row in inputs["same"].tolist()]
        for rows, columns in ((images, texts), (texts, images)):
            cosines = [dot(rows[number], column) for column in columns]
            if name == "ranking":
                loss = _slow_hinge(cosines, number, same, config)
            else:
                weights = _slow_weights(images, texts, config.positive_sigma) if name == "weighted_dcl" else None
                loss = _slow_row(name, cosines, number, same, config.same_pairs, (scale, bias), weights)
            by_image, by_text = (by_image + loss, by_text) if rows is images else (by_image, by_text + loss)
    if name == "siglip":
        return by_image / len(images)
    if name == "ranking":
        wanted = {"images": by_text, "texts": by_image}.get(config.negatives, by_image + by_text)
        return wanted / len(images)
    return (by_image + by_text) / 2 / len(images)


def dot(one: list[float], other: list[float]) -> float:
    return sum(first * second for first, second in zip(one, other, strict=True))


def _slow_weights(images: list[list[float]], texts: list[list[float]], sigma: float) -> list[float]:
    raised = [math.exp(dot(image, text) / sigma) for image, text in zip(images, texts, strict=True)]
    return [2 - each * len(raised) / sum(raised) for each in raised]


def _slow_row(
    name: str,
    cosines: list[float],
    own: int,
    same: list[bool],
    treatment: str,
    scale_bias: tuple[float, float],
    weights: list[float] | None,
) -> float:
    scale, bias = scale_bias
    positives = [own] + [j for j in range(len(cosines)) if j != own and same[j] and treatment == "positive"]
    negatives = [
        j for j in range(len(cosines)) if j not in positives and not (same[j] and j != own and treatment == "ignore")
    ]
    if name == "siglip":
        loss = sum(math.log1p(math.exp(-(scale * cosines[j] + bias))) for j in positives)
        return loss + sum(math.log1p(math.exp(scale * cosines[j] + bias)) for j in negatives)
    below = negatives if name in ("dcl", "weighted_dcl") else positives + negatives
    if not below:
        return 0.0
    denominator = sum(math.exp(scale * cosines[j]) for j in below)
    if weights:
        return math.log(denominator) - sum(weights[j] * scale * cosines[j] for j in positives) / len(positives)
    return -sum(math.log(math.exp(scale * cosines[j]) / denominator) for j in positives) / len(positives)


def _slow_hinge(cosines: list[float], own: int, same: list[bool], config: ObjectiveConfig) -> float:
    hinges = [0.0]
    for column, cosine in enumerate(cosines):
        if column != own and not (same[column] and config.same_pairs != "negative"):
            hinges.append(max(0.0, config.margin + cosine - cosines[own]))
    return max(hinges) if config.negatives == "hardest" else sum(hinges)


def _slow_distillation(
    student: tuple[list, list], teacher: tuple[list, list], scale: float, teacher_scale: float
) -> float:
    total, count = 0.0, len(student[0])
    for first, second in ((0, 1), (1, 0)):
        for number in range(count):
            wanted = _softmax([teacher_scale * dot(teacher[first][number], column) for column in teacher[second]])
            found = _softmax([scale * dot(student[first][number], column) for column in student[second]])
            total += sum(p * math.log(p / q) for p, q in zip(wanted, found, strict=True))
    return total / 2 / count


def _softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]
