import torch
from torch.nn import functional as F

from vlm.train.objectives.distillation import LOCAL_TO_GLOBAL, local_to_global
from vlm.train.objectives.loss_term import LossOptions
from vlm.train.run_config import ObjectiveConfig

OPTIONS = LossOptions(config=ObjectiveConfig(), pad_token=0)


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(crops, target):
    return local_to_global({"local_features": crops}, {"global_target": target}, OPTIONS)


def test_it_is_its_definition():
    crops, target = F.normalize(values(3, 2, 6, seed=0), dim=-1), values(3, 6, seed=1)
    wanted = 0.0
    for sample in range(3):
        for view in range(2):
            one, other = crops[sample, view], target[sample]
            wanted += (1 - float(one @ other) / float(other.norm() * one.norm())) / 2
    assert torch.allclose(loss_of(crops, target), torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


def test_it_is_nothing_where_crops_and_whole_agree():
    target = F.normalize(values(3, 6, seed=2), dim=-1)
    assert float(loss_of(target[:, None].repeat(1, 4, 1), target)) < 1e-12


def test_parts_of_a_batch_add_up_to_its_gradient():
    crops, target = F.normalize(values(4, 2, 6, seed=3), dim=-1), values(4, 6, seed=4)
    whole, parts = crops.clone().requires_grad_(), crops.clone().requires_grad_()
    loss_of(whole, target).backward()
    for rows in (slice(0, 3), slice(3, 4)):
        loss_of(parts[rows], target[rows]).backward()
    assert whole.grad is not None
    assert parts.grad is not None
    assert torch.allclose(whole.grad, parts.grad, atol=1e-15)


def test_the_teacher_gets_no_gradient():
    crops, target = values(2, 2, 6, seed=5).requires_grad_(), values(2, 6, seed=6).requires_grad_()
    loss_of(crops, target).backward()
    assert target.grad is None
    assert float(LOCAL_TO_GLOBAL.normaliser({"global_target": target}, OPTIONS)) == 2
