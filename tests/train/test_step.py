"""The gradient of a batch in parts, on several processes, is that of the undivided batch."""

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.leaving import leave_group
from tests.train.step_case import Case, undivided
from vlm.train.objectives.objective_registry import LOSS_TERMS

OBJECTIVES = [*LOSS_TERMS, "clip + 2*caption"]
# a decoder's rows are never cut, see `enable_padding_trim`
TRIMMED = [name for name in LOSS_TERMS if name not in ("caption", "cappa")] + ["dreamlip"]
ON_PROCESSES = [*((name, False) for name in OBJECTIVES), *((name, True) for name in TRIMMED)]
BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-5}


def assert_alike(found, wanted, bound):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max()) + 1e-3
        assert float((found[name] - gradient).abs().max()) <= bound * scale, name


@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_split_batch_is_the_whole(objective, split):
    case = Case(objective)
    loss, wanted = undivided(case)
    losses, found = case.gradients(split=split)
    assert float(torch.stack(list(losses.values())).sum()) == pytest.approx(loss, rel=1e-9)
    assert_alike(found, wanted, BOUNDS[torch.float64])


@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("objective", TRIMMED)
def test_parts_cut_to_their_own_longest_text_are_the_whole(objective, split):
    case = Case(objective, trims=True)
    loss, wanted = undivided(case)
    losses, found = case.gradients(split=split)
    assert float(torch.stack(list(losses.values())).sum()) == pytest.approx(loss, rel=1e-9)
    assert_alike(found, wanted, BOUNDS[torch.float64])


@pytest.mark.parametrize("split", [2, 4])
def test_it_holds_in_single_precision(split):
    case = Case("clip + 2*caption", dtype=torch.float32)
    _, wanted = undivided(case)
    assert_alike(case.gradients(split=split)[1], wanted, BOUNDS[torch.float32])


def distance(found, wanted):
    """Of all gradients together, by Euclid."""
    return float(
        torch.stack([(found[name] - gradient).square().sum() for name, gradient in wanted.items()]).sum().sqrt()
    )


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_in_mixed_precision_parts_are_as_near_to_single_precision_as_the_whole(objective, split):
    _, wanted = undivided(Case(objective, dtype=torch.float32))
    case = Case(objective, dtype=torch.bfloat16)
    _, whole = undivided(case)
    assert distance(whole, wanted) > 0
    assert distance(case.gradients(split=split)[1], wanted) <= 1.05 * distance(whole, wanted)


def _compare_in_process(rank, world, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for objective, trims in ON_PROCESSES:
        for split in (1, 2, 4):
            losses, found = Case(objective, trims=trims).gradients(split=split, process=rank, processes=world)
            total = torch.stack(list(losses.values())).sum() / world
            torch.distributed.all_reduce(total)
            if rank == 0:
                queue.put(
                    (objective, trims, split, float(total), {name: value.tolist() for name, value in found.items()})
                )
    leave_group()


def test_two_processes_are_one(free_port):
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    workers = [context.Process(target=_compare_in_process, args=(rank, 2, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(len(ON_PROCESSES) * 3):
        objective, trims, split, loss, found = queue.get(timeout=300)
        whole_loss, wanted = undivided(Case(objective, trims=trims))
        assert loss == pytest.approx(whole_loss, rel=1e-9), (objective, trims, split)
        gradients = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
        assert_alike(gradients, wanted, BOUNDS[torch.float64])
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
