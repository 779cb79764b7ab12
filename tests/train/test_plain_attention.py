"""Attention in bfloat16 on a CPU, as two batched products: as exact as torch's own, in every way a tower calls it."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm.train.attention import PlainAttention
from vlm.train.run_config import ModelConfig
from vlm.train.task import TrainingTask, compute_in_bfloat16

LENGTH = 7
CAUSAL = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)


def heads(*, sharpness: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randn(4, 3, LENGTH, 16, generator=draw) * scale for scale in (sharpness, sharpness, 1.0)]
    # as bfloat16 holds them, so that both sides begin with the same numbers
    return [row.to(torch.bfloat16).to(dtype).requires_grad_() for row in rows]


def results(rows: list[Any], **call: Any) -> list[Any]:
    output = F.scaled_dot_product_attention(*rows, **call)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    output.backward(weights.to(output.dtype))
    return [output.detach(), *(row.grad for row in rows)]


def deviation(found, wanted):
    return max(float((one.float() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("call", [{}, {"attn_mask": CAUSAL}, {"is_causal": True}, {"scale": 0.5}])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_it_is_about_as_exact_as_torchs_plain_kernel(call, sharpness):
    wanted = results(heads(sharpness=sharpness, dtype=torch.float32), **call)
    with sdpa_kernel(SDPBackend.MATH):
        torchs = deviation(results(heads(sharpness=sharpness), **call), wanted)
    with PlainAttention(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = deviation(results(heads(sharpness=sharpness), **call), wanted)
    # with scores rounded to bfloat16 it would be ten times as much where they are large; 2^-8 is one rounding
    assert 0 < ours < 3 * torchs < 0.01


@pytest.mark.parametrize(
    "call",
    [
        {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)},  # a row with nothing to attend to
        {"attn_mask": CAUSAL.expand(4, 1, -1, -1)},
        {"dropout_p": 0.5},
    ],
)
def test_other_attention_is_torchs(call: Any):
    rows = heads()
    torch.manual_seed(1)
    wanted = F.scaled_dot_product_attention(*rows, **call)
    torch.manual_seed(1)
    with PlainAttention():
        assert torch.equal(F.scaled_dot_product_attention(*rows, **call), wanted)


def test_single_precision_is_torchs():
    rows = heads(dtype=torch.float32)
    wanted = F.scaled_dot_product_attention(*rows)
    with PlainAttention():
        assert torch.equal(F.scaled_dot_product_attention(*rows), wanted)


def test_one_head_of_keys_for_all_queries_is_torchs():
    query, key, value = heads()
    # as MobileNetV4's multi-query attention calls it
    rows = query, key[:, :1], value[:, :1]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(*rows)
        with PlainAttention():
            assert torch.equal(F.scaled_dot_product_attention(*rows), wanted)


@pytest.mark.parametrize(
    ("settings", "is_plain", "by_products"),
    [
        ({}, True, True),
        # dynamo would have to trace the mode
        ({"compile": True}, True, False),
        ({"gradient_checkpointing": True}, False, False),
    ],
)
def test_what_is_compiled_or_computed_again_has_torchs_attention(settings, is_plain, by_products):
    seen = []

    class Task(TrainingTask):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.network: Any = torch.nn.Identity()

        def forward(self, inputs, outputs=None):
            seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.overrides._get_current_function_mode()))
            return {}

    task: Any = Task()
    compute_in_bfloat16(task, torch.device("cpu"), ModelConfig(**settings))
    task.forward({})
    ((is_fused, mode),) = seen
    assert is_fused is not is_plain
    assert isinstance(mode, PlainAttention) is by_products
