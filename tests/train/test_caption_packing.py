"""Captions without their padding: each position once, and the gradient of whole rows."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlm.data.tokenizers import Padding
from vlm.models.model import build_network, enable_padding_trim, model_config
from vlm.train import caption_packing
from vlm.train.attention import attend_without_copies, compute_pooled_positions
from vlm.train.caption_packing import (
    PackedTexts,
    computed_rows,
    encode_by_length,
    encode_captions,
    length_groups,
    packing_tower,
)

CONTEXT, END = 40, 299
NO_PADDING = Padding(token=0, is_end=False)
LENGTHS = (4, 30, 9, 40, 16, 17, 8, *[12] * 9, 3)


def network_of(*, name: str = "micro", **text: Any) -> Any:
    torch.manual_seed(0)
    config = model_config(name)
    if not name.startswith("timm:"):
        sizes = {"layers": 2, "context_length": CONTEXT, "vocab_size": END + 1}
        config = config | {"custom_text": True, "text_cfg": config["text_cfg"] | sizes | text}
    network = build_network(config).double().train()
    # biases and norms as after training, so that each weight counts
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 1 else None
    return network


def captions(lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.randint(3, END - 1, (length,), generator=draw)
        tokens[row, length - 1] = END
    return tokens


def results(network: Any, encode: Any) -> dict[str, torch.Tensor]:
    network.zero_grad()
    embeddings = encode()
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2)).double()
    (F.normalize(embeddings, dim=-1) * weights).sum().backward()
    found = {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None}
    return found | {"embeddings": embeddings.detach()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"ls_init_value": 0.3, "proj_bias": True},
        {"pool_type": "eos", "eos_id": END, "layers": 1},
        {"proj_type": "none", "width": 32},
    ],
)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_packed_captions_have_the_gradient_of_whole_rows(text, is_prepared):
    network, tokens = network_of(**text), captions()
    wanted = results(network, lambda: network.encode_text(tokens))
    if is_prepared:
        attend_without_copies(network)
        compute_pooled_positions(network, image=True)
    assert packing_tower(network) is network.text
    with FlopCounterMode(display=False) as counted:
        found = results(network, lambda: encode_captions(network, tokens, NO_PADDING))
    assert_equal(found, wanted)
    with FlopCounterMode(display=False) as whole:
        results(network, lambda: network.encode_text(tokens))
    # a third of the positions are used, and of the last block fewer products
    assert counted.get_total_flops() < 0.5 * whole.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {"no_causal_mask": True},
        {"pool_type": "last"},
        {"embed_cls": True},
        {"output_tokens": True},
        {"block_type": "custom"},
    ],
)
def test_other_towers_get_whole_rows_of_like_length(changes):
    assert packing_tower(network_of(**changes)) is None


def test_changed_layers_and_dropout_are_not_packed():
    network = network_of()
    network.text.transformer.resblocks[0].attn.dropout = 0.1
    assert packing_tower(network) is None
    network = network_of()
    network.text.transformer.grad_checkpointing = True
    assert packing_tower(network) is None
    network = network_of()

    class Changed(torch.nn.MultiheadAttention):
        pass

    network.text.transformer.resblocks[1].attn = Changed(64, 1, batch_first=True)
    assert packing_tower(network) is None
    assert packing_tower(network_of(name="timm:test_vit+bag@16")) is None


def test_hooks_of_a_tower_are_called():
    network, tokens = network_of(), captions()
    calls: list[int] = []
    assert enable_padding_trim(network)
    compute_pooled_positions(network, image=True)
    assert packing_tower(network) is not None
    hook = network.text.register_forward_hook(lambda *_: calls.append(1))
    encode_captions(network, tokens, NO_PADDING)
    assert calls
    hook.remove()
    assert packing_tower(network) is not None
    network.text.transformer.resblocks[0].register_full_backward_hook(lambda *_: None)
    assert packing_tower(network) is None


@pytest.mark.parametrize("name", ["micro", "timm:test_vit+bag@16"])
def test_texts_by_length_have_the_gradient_of_whole_rows(name):
    network, tokens = network_of(name=name), captions()
    wanted = results(network, lambda: network.encode_text(tokens))
    assert enable_padding_trim(network)
    assert_equal(results(network, lambda: encode_by_length(network, tokens, NO_PADDING)), wanted)


def test_texts_by_length_are_looked_up_once(monkeypatch):
    network, tokens = network_of(), captions()
    calls: list[int] = []
    assert enable_padding_trim(network)
    look_up = torch.embedding

    def count(weight: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(len(weight))
        return look_up(weight, *arguments, **options)

    monkeypatch.setattr(torch, "embedding", count)
    encode_by_length(network, tokens, NO_PADDING)
    assert calls == [END + 1]

    class Reshaping(torch.nn.Module):
        """As some towers of Hugging Face look up their tokens."""

        def encode_text(self, text: torch.Tensor) -> torch.Tensor:
            return network.text(text.view(-1, text.shape[-1]))

    reshaping: Any = Reshaping()
    encode_by_length(reshaping, tokens, NO_PADDING)
    assert calls == [END + 1, END + 1]


def test_packed_rows_are_those_before_the_pooled_position_shortest_first():
    tokens = torch.tensor([[7, 8, 9, 0], [5, 6, 0, 0], [1, 2, 3, 4]])
    packed = PackedTexts(tokens, torch.tensor([3, 2, 4]))
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4]
    assert packed.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert packed.ends.tolist() == [1, 4, 8]
    assert packed.order.tolist() == [1, 0, 2]
    (group,) = packed.groups
    assert group.width == 8
    assert group.source.view(3, 8)[1].tolist() == [2, 3, 4, 4, 4, 4, 4, 4]
    assert group.places.tolist() == [0, 1, 8, 9, 10, 16, 17, 18, 19]


def test_work_is_counted_at_the_mean_length_of_packed_captions_and_at_the_width_of_others():
    tokens = captions().numpy()
    ((rows, length),) = computed_rows(network_of(), tokens, NO_PADDING)
    assert rows.tolist() == list(range(len(LENGTHS)))
    assert length == round(sum(LENGTHS) / len(LENGTHS))
    assert [width for _, width in computed_rows(network_of(pool_type="last"), tokens, NO_PADDING)] == [8, 16, 32, 40]


def test_rows_of_like_length_go_together_each_once():
    widths = np.array([8, 32, 16, 8, 16, 24, *[16] * 40])
    groups = length_groups(widths)
    # two of 8 are too few for a pass of their own, as is one of 24
    assert [width for _, width in groups] == [16, 32]
    assert sorted(np.concatenate([rows for rows, _ in groups])) == list(range(len(widths)))
    assert groups[-1][0].tolist() == [5, 1]


def test_rows_keep_the_end_that_is_also_padding():
    tokens = np.array([[1, *[5] * 7, *[2] * 8], [1, *[5] * 6, *[2] * 9]])
    widths = caption_packing.text_widths(tokens, Padding(token=2, is_end=True))
    assert widths.tolist() == [16, 8]
