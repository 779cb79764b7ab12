"""The gradient of a batch in parts, on several processes, is that of the undivided batch."""

import json
import os
import sys

import pytest
import torch

from tests import preloaded
from tests.train.step_case import Case, undivided
from vlm.train.task import LOSS_TERMS

OBJECTIVES = [*LOSS_TERMS, "clip + 2*caption"]
# a decoder's rows are never cut, see `enable_padding_trim`
TRIMMED = [name for name in LOSS_TERMS if name not in ("caption", "cappa")] + ["dreamlip", "gpt4image", "rs-m-clip"]
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


def assert_processes_are_one(out, processes, cases, port, **parts):
    """parts: for each sharding the numbers of parts that each share is cut into."""
    words = [sys.executable, "-m", "tests.train.step_ranks", str(out), json.dumps(cases), json.dumps(parts)]
    preloaded.run_ranks(words, processes=processes, port=port, env=dict(os.environ))
    results = json.loads(out.read_text())
    assert len(results) == len(cases) * sum(len(splits) for splits in parts.values())
    wholes = {}
    for result in results:
        objective, trims = result["case"]
        told = [result["case"], result["sharding"], result["split"]]
        if (objective, trims) not in wholes:
            wholes[objective, trims] = undivided(Case(objective, trims=trims, samples=16))
        whole_loss, wanted = wholes[objective, trims]
        assert result["loss"] == pytest.approx(whole_loss, rel=1e-9), told
        gradients = {name: torch.tensor(value, dtype=torch.float64) for name, value in result["gradients"].items()}
        assert_alike(gradients, wanted, BOUNDS[torch.float64])


def test_two_processes_are_one_replicated_or_sharded(tmp_path, free_port):
    assert_processes_are_one(tmp_path / "found.json", 2, ON_PROCESSES, free_port(), none=[1, 4], fsdp=[2])


def test_four_processes_are_one(tmp_path, free_port):
    cases = [("siglip", True), ("weighted_dcl", True), ("dreamlip", True), ("coca", False)]
    assert_processes_are_one(tmp_path / "found.json", 4, cases, free_port(), none=[1, 4], fsdp=[1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_processes_are_one_for_every_objective_and_split(sharding, processes, tmp_path, free_port):
    parts = {sharding: [1, 2, 4, 8] if processes == 2 else [1, 2, 4]}
    assert_processes_are_one(tmp_path / "found.json", processes, ON_PROCESSES, free_port(), **parts)
