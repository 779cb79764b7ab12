"""Layers in bfloat16 on a CPU: as exact as torch's own, in every way a tower calls them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlm.train import bfloat16
from vlm.train.bfloat16 import BFloat16Products, compute_in_bfloat16
from vlm.train.run_config import ModelConfig
from vlm.train.task import TrainingTask

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
    with BFloat16Products(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = deviation(results(heads(sharpness=sharpness), **call), wanted)
    # with scores rounded to bfloat16 it would be ten times as much where they are large; 2^-8 is one rounding
    assert 0 < ours < 3 * torchs < 0.01


@pytest.mark.parametrize("offset", [0.0, 16.0])
def test_what_all_values_have_in_common_does_no_harm(offset):
    def shifted(dtype: torch.dtype) -> list[Any]:
        rows = heads(dtype=torch.float32)
        rows[2] = rows[2].detach() + offset
        return [row.detach().to(torch.bfloat16).to(dtype).requires_grad_() for row in rows]

    wanted = results(shifted(torch.float32))
    with BFloat16Products(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert deviation(results(shifted(torch.bfloat16)), wanted) < 0.01


def test_long_sequences_have_torchs_fused_attention():
    seen: list[bool] = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                seen.append(torch.backends.cuda.flash_sdp_enabled())
            return func(*args, **(kwargs or {}))

    rows: list[Any] = [torch.randn(1, 1, 129, 8).to(torch.bfloat16) for _ in range(3)]
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16), Watched(), BFloat16Products():
        F.scaled_dot_product_attention(*rows)
        short: list[Any] = [row[:, :, :128] for row in rows]
        F.scaled_dot_product_attention(*short, dropout_p=0.5)
    assert seen == [True, False]


@pytest.mark.parametrize(
    "call",
    [
        {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-1)},  # a row with nothing to attend to
        {"attn_mask": torch.full((LENGTH, LENGTH), -torch.inf).tril(-1)},
        {"attn_mask": torch.zeros(LENGTH, LENGTH, requires_grad=True)},
        {"attn_mask": CAUSAL.expand(4, 1, -1, -1)},
        {"dropout_p": 0.5},
    ],
)
def test_other_attention_is_torchs(call: Any):
    rows = heads()
    torch.manual_seed(1)
    wanted = F.scaled_dot_product_attention(*rows, **call)
    torch.manual_seed(1)
    with BFloat16Products():
        assert torch.equal(F.scaled_dot_product_attention(*rows, **call), wanted)


def test_single_precision_is_torchs():
    rows = heads(dtype=torch.float32)
    wanted = F.scaled_dot_product_attention(*rows)
    with BFloat16Products():
        assert torch.equal(F.scaled_dot_product_attention(*rows), wanted)


def test_one_head_of_keys_for_all_queries_is_torchs():
    query, key, value = heads()
    # as MobileNetV4's multi-query attention calls it
    rows = query, key[:, :1], value[:, :1]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(*rows)
        with BFloat16Products():
            assert torch.equal(F.scaled_dot_product_attention(*rows), wanted)


def layer_results(layer: Any, inputs: torch.Tensor, *, takes_gradient: bool = True) -> list[Any]:
    inputs = inputs.clone().requires_grad_(takes_gradient)
    layer.zero_grad()
    output = layer(inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    output.backward(weights.to(output.dtype))
    found = [output.detach(), inputs.grad, *(parameter.grad for parameter in layer.parameters())]
    return [None if each is None else each.clone() for each in found]


def rounded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).float()


LAYERS = [
    (lambda: nn.Linear(24, 96), (5, 7, 24)),
    (lambda: nn.Linear(96, 24), (30, 96)),
    (lambda: nn.Linear(24, 24, bias=False), (5, 24)),
    (lambda: nn.Conv2d(3, 24, 4, 4, bias=False), (5, 3, 12, 8)),
    (lambda: nn.Conv2d(3, 24, (2, 4), (2, 4), padding="valid"), (5, 3, 12, 8)),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_as_exact_as_autocasts_and_its_own(make: Any, shape, dtype, monkeypatch):
    torch.manual_seed(0)
    layer, inputs = make(), rounded(*shape)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    takes_gradient = not isinstance(layer, nn.Conv2d)
    wanted = layer_results(layer, inputs, takes_gradient=takes_gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torchs = layer_results(layer, inputs.to(dtype), takes_gradient=takes_gradient)
        calls: list[int] = []
        apply = bfloat16._Product.apply
        monkeypatch.setattr(bfloat16._Product, "apply", lambda *arguments: calls.append(1) or apply(*arguments))
        with BFloat16Products():
            ours = layer_results(layer, inputs.to(dtype), takes_gradient=takes_gradient)
    assert calls == [1]
    for one, other, exact in zip(ours, torchs, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            assert (one.float() - exact).norm() <= 1.1 * (other.float() - exact).norm() + 1e-6 * exact.norm()
            assert one.stride() == other.stride() or one.ndim == 4


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(24, 8), (5, 24)), (nn.Linear(24, 8), (5, 7, 24)), (nn.Conv2d(3, 8, 4, 4), (5, 3, 8, 8))],
)
def test_what_a_layer_gives_can_be_changed_in_place(layer, shape):
    inputs = rounded(*shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = F.relu(layer(inputs))
        with BFloat16Products():
            found = F.relu(layer(inputs), inplace=True)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_a_weight_is_rounded_once_in_a_pass():
    layer = nn.Linear(64, 64)
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == layer.weight.shape:
            kept.add(tensor.data_ptr())
        return tensor

    watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with watched, BFloat16Products(), torch.autocast("cpu", dtype=torch.bfloat16):
        layer(layer(rounded(5, 64)))
    assert len(kept) == 1


def test_a_second_derivative_is_refused():
    layer = nn.Linear(24, 8)
    with BFloat16Products(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(rounded(5, 24)).float().square().sum()
    (gradient,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_layer_called_by_keywords_is_torchs():
    inputs, weight = rounded(5, 24), rounded(8, 24)
    with BFloat16Products(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(F.linear(input=inputs, weight=weight), F.linear(inputs, weight))


def test_frozen_weights_get_no_gradient_and_rows_none_where_none_is_needed():
    layer = nn.Linear(24, 48)
    layer.weight.requires_grad_(False)
    with BFloat16Products(), torch.autocast("cpu", dtype=torch.bfloat16):
        output, of_inputs, of_weight, of_bias = layer_results(layer, rounded(5, 24), takes_gradient=False)
        assert output.dtype == torch.bfloat16
        assert of_inputs is None
        assert of_weight is None
        assert of_bias.shape == (48,)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(3, 24, 4, 2), (5, 3, 12, 8)),
        (lambda: nn.Conv2d(3, 24, 4, 4, padding=2), (5, 3, 12, 8)),
        (lambda: nn.Conv2d(3, 24, 4, 4), (5, 3, 13, 8)),
        (lambda: nn.Conv2d(3, 24, 2, 2, dilation=2), (5, 3, 12, 8)),
        (lambda: nn.Conv2d(4, 24, 4, 4, groups=2), (5, 4, 12, 8)),
        (lambda: nn.Linear(24, 8), (0, 24)),
        (lambda: nn.Linear(24, 8), (24,)),
        (lambda: nn.Linear(24, 8).double(), (2, 24)),
    ],
)
def test_other_layers_are_torchs(make: Any, shape, monkeypatch):
    layer = make()
    inputs = rounded(*shape).to(next(layer.parameters()).dtype)
    monkeypatch.setattr(bfloat16._Product, "apply", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = layer(inputs)
        with BFloat16Products():
            assert torch.equal(layer(inputs), wanted)


def test_layers_are_torchs_where_torch_lacks_onednn(monkeypatch):
    layer, inputs = nn.Linear(24, 8), rounded(2, 24)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(bfloat16, "has_bfloat16_products", bfloat16.has_bfloat16_products.__wrapped__)
    monkeypatch.setattr(bfloat16._Product, "apply", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = layer(inputs)
        with BFloat16Products():
            assert torch.equal(layer(inputs), wanted)


def test_layers_in_single_precision_are_torchs(monkeypatch):
    layer, inputs = nn.Linear(24, 8), rounded(2, 24)
    wanted = layer(inputs)
    monkeypatch.setattr(bfloat16._Product, "apply", None)
    with BFloat16Products():
        assert torch.equal(layer(inputs), wanted)


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
    assert isinstance(mode, BFloat16Products) is by_products
