"""The engine: blocks change nothing but memory, and precision is kept."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.train.objectives.pair_case import LOSS_TERMS, LOSSES, TREATMENTS, batch, options, value_and_gradients
from vlm.train.objectives.loss_term import same_identity, sum_over_blocks

COUNT, WIDTH, BLOCK = 64, 4, 8


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(LOSS_TERMS)),
    treatment=st.sampled_from(TREATMENTS),
    negatives=st.sampled_from(("both", "images", "texts", "hardest")),
    count=st.integers(1, 9),
    block=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_any_block_gives_the_value_and_gradients_of_the_whole(name, treatment, negatives, count, block, seed):
    outputs, inputs = batch(count, seed)
    config = {"same_pairs": treatment, "negatives": negatives}
    whole = value_and_gradients(name, outputs, inputs, similarity_block=count, **config)
    blocked = value_and_gradients(name, outputs, inputs, similarity_block=block, **config)
    for one, other in zip(whole, blocked, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


class Sizes(TorchDispatchMode):
    """Notes the size of the largest tensor any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return made


@pytest.mark.parametrize("name", LOSS_TERMS)
def test_no_tensor_is_larger_than_a_block_of_rows(name):
    outputs, inputs = batch(COUNT, width=WIDTH)
    for treatment in TREATMENTS:
        with Sizes() as sizes:
            value_and_gradients(name, outputs, inputs, same_pairs=treatment, similarity_block=BLOCK)
        assert sizes.largest == BLOCK * COUNT
    with Sizes() as sizes:
        value_and_gradients(name, outputs, inputs, similarity_block=COUNT)
    assert sizes.largest == COUNT * COUNT


@pytest.mark.parametrize(("count", "rows"), [(1_000, 1_048), (2_048, 512), (4_096, 256), (100_000, 256)])
def test_a_block_holds_a_million_similarities_and_at_least_256_rows(count, rows):
    assert options().config.rows_at_once(count) == rows
    assert options(similarity_block=7).config.rows_at_once(count) == 7


def peak_bytes(count: int, block: int) -> int:
    """The most memory held at once, above what was held before, while a loss and its gradients are computed."""
    outputs, inputs = batch(count, width=WIDTH)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value_and_gradients("clip", outputs, inputs, same_pairs="ignore", similarity_block=block)
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_twice_the_batch_takes_twice_the_memory_in_blocks_and_four_times_without():
    peak_bytes(64, 8)
    assert peak_bytes(512, 8) < 2.3 * peak_bytes(256, 8)
    assert peak_bytes(512, 512) > 3.5 * peak_bytes(256, 256)


def under_autocast(name, outputs, inputs):
    """The loss, computed inside bfloat16 autocast, and its gradients, taken outside as accelerate does."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](outputs, inputs, options(similarity_block=4))
    return [loss.detach(), *torch.autograd.grad(loss, [outputs["image_features"], outputs["text_features"]])]


def in_precision(dtype, values):
    return {key: value.detach().to(dtype).requires_grad_() for key, value in values.items()}


@pytest.mark.parametrize("name", LOSS_TERMS)
def test_autocast_does_not_touch_the_similarities(name):
    outputs, inputs = batch(6)
    outputs = in_precision(torch.float32, outputs)
    plain = value_and_gradients(name, outputs, inputs, similarity_block=4)[:3]
    assert all(torch.equal(*both) for both in zip(plain, under_autocast(name, outputs, inputs), strict=True))


@pytest.mark.parametrize("name", LOSS_TERMS)
def test_bfloat16_features_are_compared_in_single_precision(name):
    outputs, inputs = batch(6)
    halves = in_precision(torch.bfloat16, outputs)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    found = under_autocast(name, halves, inputs)
    wanted = value_and_gradients(name, in_precision(torch.float32, halves), inputs, similarity_block=4)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(found[1:], wanted[1:3], strict=True))


@given(
    st.integers(1, 3).flatmap(
        lambda width: st.lists(st.lists(st.integers(-2, 2), min_size=width, max_size=width), min_size=1, max_size=6)
    )
)
def test_pairs_share_an_identity_where_a_column_says_so(rows):
    found = same_identity(torch.tensor(rows), torch.tensor(rows)).tolist()
    for one, of_one in zip(rows, found, strict=True):
        for other, is_same in zip(rows, of_one, strict=True):
            assert is_same == any(first == second != 0 for first, second in zip(one, other, strict=True))


def test_what_a_block_reads_besides_its_rows_gets_its_gradient():
    rows = torch.arange(10.0).reshape(5, 2).requires_grad_()
    columns = torch.ones(3, 2, requires_grad=True)
    blocked = sum_over_blocks(lambda part: (part @ columns.T).square().sum(), [rows], 2)
    whole = (rows @ columns.T).square().sum()
    for one, other in zip(
        torch.autograd.grad(blocked, [rows, columns]), torch.autograd.grad(whole, [rows, columns]), strict=True
    ):
        assert torch.equal(one, other)


def test_without_gradients_a_loss_is_its_value():
    outputs, inputs = batch(6)
    with torch.no_grad():
        for loss in LOSSES.values():
            assert not loss(outputs, inputs, options(similarity_block=2)).requires_grad
