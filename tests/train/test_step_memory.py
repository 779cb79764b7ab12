"""What a step holds while a batch goes through in parts: one part's inputs at a time, gradients where there is room."""

import contextlib
import weakref

import pytest
import torch
from torch import nn

from tests.train.step_case import Case
from vlm.train import step
from vlm.train.run_setup import open_session
from vlm.train.step import MicroBatches, backward_with_gradient_caching, compute_gradients, reserved_gradients


def gradients_of(session):
    session.state.task.zero_grad(set_to_none=True)
    result = compute_gradients(session, next(session.open_batches()))
    weights = session.state.task.named_parameters()
    return result, {name: weight.grad for name, weight in weights if weight.grad is not None}


@pytest.mark.parametrize("channels_last", [False, True])
def test_reserved_gradients_are_the_same_bits(configure, monkeypatch, channels_last):
    config = configure("run", micro_batch=2, model={"channels_last": channels_last})
    session = open_session(config, resume=False)
    assert session.num_micro_batches > 1
    entered = []
    monkeypatch.setattr(step, "reserved_gradients", lambda weights: entered.append(True) or contextlib.nullcontext())
    wanted_result, wanted = gradients_of(session)
    assert entered  # of the session as it is, gradients are reserved
    monkeypatch.undo()
    result, found = gradients_of(session)
    assert result == wanted_result
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert found[name].stride() == gradient.stride()
        assert found[name].numpy().tobytes() == gradient.numpy().tobytes(), name


def test_a_weight_without_gradient_has_none_and_hooks_go():
    used, unused, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    frozen.requires_grad_(False)
    with reserved_gradients([used, unused, frozen]):
        (used * frozen).sum().backward()
        reserved = used.grad
        (used * -2).sum().backward()
    assert used.grad is reserved
    assert reserved is not None
    assert reserved.tolist() == [-1, -1, -1]
    assert unused.grad is None
    assert frozen.grad is None
    used.grad = None
    used.sum().backward()
    assert used.grad is not reserved


@pytest.mark.parametrize("objective", ["clip", "clip + 2*caption"])
def test_one_part_is_held_at_a_time(objective):
    case = Case(objective)
    held = []

    def part(number, names=frozenset()):
        assert [pixels for pixels in held if pixels() is not None] == []
        rows = {name: tensor[2 * number :][:2].clone() for name, tensor in case.inputs.items()}
        case.noise.rows = rows["rows"]
        held.append(weakref.ref(rows["pixels"]))
        return rows

    def outputs(inputs, names):
        return case.forward(case.task, inputs, names)

    micro_batches = MicroBatches(
        count=4,
        inputs=part,
        non_image_inputs=lambda number: {name: tensor[2 * number :][:2] for name, tensor in case.inputs.items()},
        forward=outputs,
        backward=lambda loss: loss.backward(),
    )
    backward_with_gradient_caching(micro_batches, case.terms, case.options)
    assert len(held) == 8
