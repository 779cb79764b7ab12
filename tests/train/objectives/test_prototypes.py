"""DINO's loss against its definition, and its head: teacher, centre, and what a skipped step leaves."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.train.objectives.pair_case import options
from vlm.train.objectives.distillation import DINO, PrototypeHead, dino

ROWS, VIEWS, PROTOTYPES, WIDTH = 4, 3, 7, 6


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def outputs():
    return {
        "crop_prototypes": values(ROWS, VIEWS, PROTOTYPES, seed=0),
        "target_prototypes": values(ROWS, PROTOTYPES, seed=1).requires_grad_(),
        "prototype_centre": values(PROTOTYPES, seed=2),
    }


def softmax(logits):
    raised = [math.exp(logit) for logit in logits]
    return [each / sum(raised) for each in raised]


def test_it_is_its_definition_and_the_teacher_gets_no_gradient(outputs):
    crops = outputs["crop_prototypes"].requires_grad_()
    found = dino(outputs, {}, options(prototype_temperature=0.5, target_temperature=0.2))
    wanted = 0.0
    for row in range(ROWS):
        centred = (outputs["target_prototypes"][row] - outputs["prototype_centre"]).tolist()
        target = softmax([value / 0.2 for value in centred])
        for view in range(VIEWS):
            student = softmax([value / 0.5 for value in crops[row, view].tolist()])
            wanted -= sum(p * math.log(q) for p, q in zip(target, student, strict=True)) / VIEWS
    assert float(found.detach()) == pytest.approx(wanted, abs=1e-11)
    _, no_gradient = torch.autograd.grad(found, [crops, outputs["target_prototypes"]], allow_unused=True)
    assert no_gradient is None


def test_parts_of_a_batch_add_up(outputs):
    whole = dino(outputs, {}, options())
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: rows_of if name == "prototype_centre" else rows_of[rows] for name, rows_of in outputs.items()}
        parts.append(dino(part, {}, options()))
    assert torch.allclose(torch.stack(parts).sum(), whole, atol=1e-11)
    assert int(DINO.normaliser({"global_target": values(ROWS, WIDTH, seed=0)}, options())) == ROWS


@pytest.fixture
def head():
    torch.manual_seed(0)
    return PrototypeHead(WIDTH, PROTOTYPES).double().train()


def slow_cosines(layers, prototypes, embedding):
    first, _, second, _, third = layers
    projected = third(F.gelu(second(F.gelu(first(embedding)))))
    return [float(projected @ each / projected.norm() / each.norm()) for each in prototypes]


def test_student_and_teacher_give_cosines_with_their_own_prototypes(head):
    with torch.no_grad():
        head.prototypes *= 3
        head.layers[0].weight += 0.5
    rows = values(ROWS, WIDTH, seed=3)
    with torch.no_grad():
        student, teacher = head(rows), head.teach(rows)
        assert student[2].tolist() == pytest.approx(slow_cosines(head.layers, head.prototypes, rows[2]), abs=1e-12)
        wanted = slow_cosines(head.teacher_layers, head.teacher_prototypes, rows[2])
    assert teacher[2].tolist() == pytest.approx(wanted, abs=1e-12)
    assert not torch.allclose(student, teacher, atol=1e-3)


def test_the_centre_moves_to_the_mean_of_the_batch_however_it_was_divided(head):
    rows = values(ROWS, WIDTH, seed=4)
    before = head.centre.clone()
    wanted = 0.9 * before + 0.1 * head.teach(rows).mean(dim=0)
    head.update(decay=1.0)
    assert torch.allclose(head.centre, wanted, atol=1e-12)

    head.centre.copy_(before)
    for part in (rows[:1], rows[1:]):
        head.teach(part)
    head.update(decay=1.0)
    assert torch.allclose(head.centre, wanted, atol=1e-12)


def test_the_teacher_follows_the_student(head):
    before = head.teacher_layers[0].weight.clone()
    with torch.no_grad():
        head.layers[0].weight += 1
    head.update(decay=0.75)
    assert torch.allclose(head.teacher_layers[0].weight, 0.75 * before + 0.25 * head.layers[0].weight, atol=1e-12)
    assert not [name for name, each in head.named_parameters() if name.startswith("teacher") and each.requires_grad]


def test_a_skipped_step_and_an_evaluation_leave_the_centre(head):
    head.teach(values(ROWS, WIDTH, seed=5))
    head.discard()
    head.eval().teach(values(ROWS, WIDTH, seed=6))
    head.update(decay=1.0)
    assert not head.centre.any()
