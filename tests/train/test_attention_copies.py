"""Self-attention that copies no queries, keys and values: the bits of torch's own, in bfloat16 within its rounding."""

import pytest
import torch
from torch import nn

from vlm.train import attention as attention_layers
from vlm.train.attention import attend_without_copies
from vlm.train.run_setup import open_session
from vlm.train.step import compute_gradients

SIZE, LENGTH, WIDTH = 5, 7, 24


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, 3, batch_first=True, **options)
    for bias in (module.in_proj_bias, module.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return module


def results(module, precision, mask, tokens, **call):
    tokens = tokens.clone().requires_grad_()
    module.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        output, weights = module(tokens, tokens, tokens, attn_mask=mask, **call)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    return [None if each is None else each.detach().float() for each in (output, weights, tokens.grad, *gradients)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {"need_weights": False}),
        ({"bias": False}, {"need_weights": False}),
        # left to torch
        ({}, {"need_weights": True}),
        ({"dropout": 0.5}, {"need_weights": False}),
        ({"add_bias_kv": True}, {"need_weights": False}),
        ({}, {"need_weights": False, "key_padding_mask": torch.arange(LENGTH).expand(SIZE, -1) > 4}),
    ],
)
@pytest.mark.parametrize("mask", [None, "causal", "bool"])
def test_the_results_are_torchs(options, call, mask, precision):
    masks = {
        None: None,
        "causal": torch.full((LENGTH, LENGTH), float("-inf")).triu(1),
        "bool": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
    }
    if (options.get("add_bias_kv") and mask) or ("key_padding_mask" in call and mask == "causal"):
        pytest.skip("torch takes no such pair")
    module = attention(**options)
    tokens = torch.randn(SIZE, LENGTH, WIDTH)
    wanted = results(module, precision, masks[mask], tokens, **call)
    attend_without_copies(module)
    found = results(module, precision, masks[mask], tokens, **call)
    for one, other in zip(found, wanted, strict=True):
        if one is None or other is None:
            assert one is other
        elif precision == "fp32":
            assert torch.equal(one, other)
        else:
            # text by text, so that sums have another order, and each product is rounded
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


def test_other_calls_are_torchs_own():
    module = attention()
    tokens, others = torch.randn(SIZE, LENGTH, WIDTH), torch.randn(SIZE, 2 * LENGTH, WIDTH)
    wanted, wanted_weights = module(tokens, others, others)
    module.eval()
    evaluated = module(tokens, tokens, tokens, need_weights=False)[0]
    attend_without_copies(module)
    assert torch.equal(module(tokens, tokens, tokens, need_weights=False)[0], evaluated)
    module.train()
    output, weights = module(tokens, others, others)
    assert torch.equal(output, wanted)
    assert torch.equal(weights, wanted_weights)


def test_a_run_on_a_cpu_has_the_gradients_of_torchs_own(configure, monkeypatch):
    def gradients(name):
        session = open_session(configure(name, micro_batch=10), resume=False)
        task = session.state.task
        replaced = [module for module in task.modules() if "_attend" in str(vars(module).get("forward"))]
        result = compute_gradients(session, next(session.open_batches()))
        weights = task.named_parameters()
        return replaced, result, {name: weight.grad for name, weight in weights if weight.grad is not None}

    replaced, result, found = gradients("ours")
    assert replaced
    monkeypatch.setattr(attention_layers, "attend_without_copies", lambda network: None)
    replaced, wanted_result, wanted = gradients("torch")
    assert not replaced
    assert result == wanted_result
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
