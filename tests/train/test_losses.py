import math

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.nn import functional as F

from vlm.train.losses import caption_loss, softmax_contrastive_loss


def unit(count, seed):
    rows = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1)


def slow_contrastive(images, texts, scale):
    total = torch.tensor(0.0, dtype=images.dtype)
    for number in range(len(images)):
        by_image = torch.log_softmax(scale * texts @ images[number], dim=0)[number]
        by_text = torch.log_softmax(scale * images @ texts[number], dim=0)[number]
        total = total - (by_image + by_text) / 2
    return total / len(images)


def test_the_contrastive_loss_is_its_definition():
    images, texts, scale = unit(7, 0), unit(7, 1), torch.tensor(3.0, dtype=torch.float64)
    assert torch.allclose(softmax_contrastive_loss(images, texts, scale), slow_contrastive(images, texts, scale))


def test_it_equals_open_clips():
    from open_clip.loss import ClipLoss

    images, texts, scale = unit(5, 2), unit(5, 3), torch.tensor(10.0, dtype=torch.float64)
    assert torch.allclose(softmax_contrastive_loss(images, texts, scale), ClipLoss()(images, texts, scale))


def test_it_is_log_of_the_batch_when_nothing_is_known():
    same = F.normalize(torch.ones(16, 4), dim=-1)
    assert float(softmax_contrastive_loss(same, same, torch.tensor(5.0))) == pytest.approx(math.log(16), rel=1e-5)


def test_reordering_the_pairs_changes_nothing():
    images, texts, scale = unit(8, 4), unit(8, 5), torch.tensor(7.0, dtype=torch.float64)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        softmax_contrastive_loss(images, texts, scale), softmax_contrastive_loss(images[order], texts[order], scale)
    )


def test_padding_has_no_part_in_the_caption_loss():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, 4, 0, 0], [5, 0, 0, 0]])
    by_hand = -(logits[0].log_softmax(-1)[[0, 1], [3, 4]].sum() + logits[1].log_softmax(-1)[0, 5]) / 3
    assert torch.allclose(caption_loss(logits, labels, pad_token=0), by_hand)


def _gradients_of_share(rank, world, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    share = 6 // world
    rows = slice(rank * share, (rank + 1) * share)
    weight = torch.eye(6, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    images, texts = F.normalize(unit(6, 0)[rows] @ weight, dim=-1), unit(6, 1)[rows]
    labels = torch.tensor([[1, 2, 0], [1, 0, 0], [2, 2, 2], [1, 1, 0], [2, 0, 0], [1, 2, 1]])[rows]
    logits = (images @ weight).unsqueeze(1).expand(-1, 3, -1)
    # a loss as DDP would average it over processes
    loss = softmax_contrastive_loss(images, texts, scale) + caption_loss(logits, labels, pad_token=0)
    gradients = [*torch.autograd.grad(loss, [weight, scale]), loss.detach()]
    for tensor in gradients:
        torch.distributed.all_reduce(tensor)
        tensor /= world
    if rank == 0:
        queue.put([gradients[0].tolist(), float(gradients[1]), float(gradients[2])])
    torch.distributed.destroy_process_group()


def _run_in_processes(world, port):
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_gradients_of_share, args=(rank, world, port, queue)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * world
    return queue.get()


def test_two_processes_give_the_loss_and_gradients_of_one(free_port):
    one, two = _run_in_processes(1, free_port()), _run_in_processes(2, free_port())
    assert torch.allclose(torch.tensor(one[0]), torch.tensor(two[0]), atol=1e-12)
    assert one[1:] == pytest.approx(two[1:], abs=1e-12)
