"""Two or four processes give the loss and gradients of one, for every term that compares the pairs of a batch."""

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.leaving import leave_group
from tests.train.objectives.pair_case import LOSS_TERMS, TREATMENTS, batch, value_and_gradients
from vlm.train.distributed import gather_detached, gather_with_gradient, local_columns
from vlm.train.objectives.global_contrastive import IMAGE_AVERAGE, TEXT_AVERAGE, GlobalAverages
from vlm.train.objectives.loss_term import SHARED_OUTPUTS

PAIRS = 12
CASES = [
    (name, {"same_pairs": treatment, "negatives": negatives, "similarity_block": block})
    for name in LOSS_TERMS
    for treatment in TREATMENTS
    for negatives in (("both", "images", "texts", "hardest") if name == "ranking" else ("both",))
    for block in (2, 100)
]


def _share(rank, world):
    """The outputs and inputs of one process."""
    outputs, inputs = batch(PAIRS)
    size = PAIRS // world
    rows = slice(rank * size, (rank + 1) * size)
    outputs = {
        name: (value if name in SHARED_OUTPUTS else value[rows]).detach().requires_grad_()
        for name, value in outputs.items()
    }
    return outputs, {name: value[rows] for name, value in inputs.items()}


def _as_averaged(rank, world, name, config):
    """The loss and gradients of the global batch, from what each process finds, averaged as DDP averages."""
    outputs, inputs = _share(rank, world)
    loss, *gradients = value_and_gradients(name, outputs, inputs, **config)
    averaged = [loss / world]
    torch.distributed.all_reduce(averaged[0])
    for output, gradient in zip(outputs, gradients, strict=True):
        if output in SHARED_OUTPUTS:
            torch.distributed.all_reduce(gradient)
            averaged.append(gradient / world)
        else:
            averaged.append(gather_detached(gradient / world))
    return averaged


def _measure(rank, world, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    from vlm.train import distributed

    found = [_as_averaged(rank, world, name, config) for name, config in CASES]
    distributed._BACKENDS_WITHOUT_REDUCE_SCATTER = frozenset({"gloo"})
    found += [_as_averaged(rank, world, name, config) for name, config in CASES]
    places = local_columns(PAIRS // world, torch.device("cpu"))
    averages = GlobalAverages.unseen(PAIRS + 1)
    averages.update(places, {IMAGE_AVERAGE: places * 1.0, TEXT_AVERAGE: -places * 1.0})
    kept = [averages.images.tolist(), averages.texts.tolist()]
    if rank == world - 1:
        queue.put(([[tensor.tolist() for tensor in tensors] for tensors in found], places.tolist(), kept))
    leave_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def of_processes(request):
    """What processes find: for each case the loss and gradients, twice; and where the last one's columns are."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=_measure, args=(rank, request.param, port, queue)) for rank in range(request.param)
    ]
    for worker in workers:
        worker.start()
    found = queue.get(timeout=300)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    return found


def test_processes_give_the_loss_and_gradients_of_one(of_processes):
    found = of_processes[0]
    assert len(found) == 2 * len(CASES)
    for (name, config), tensors in zip([*CASES, *CASES], found, strict=True):
        outputs, inputs = batch(PAIRS)
        wanted = value_and_gradients(name, outputs, inputs, **config)
        for one, other in zip(tensors, wanted, strict=True):
            assert torch.allclose(torch.tensor(one, dtype=torch.float64), other, rtol=0, atol=1e-12), (name, config)


def test_the_columns_of_the_last_process_follow_those_of_the_others(of_processes):
    places = of_processes[1]
    assert places == list(range(PAIRS - len(places), PAIRS))


def test_every_process_keeps_the_averages_of_all_samples(of_processes):
    images, texts = of_processes[2]
    assert images[:-1] == [-text for text in texts[:-1]] == list(range(PAIRS))
    assert images[-1] != images[-1]


def test_one_process_has_its_own_rows():
    rows = torch.ones(3, 2, requires_grad=True)
    assert gather_with_gradient(rows) is rows
    assert not gather_detached(rows).requires_grad
    assert local_columns(3, rows.device).tolist() == [0, 1, 2]
