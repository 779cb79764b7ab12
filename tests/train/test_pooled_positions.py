"""A last block that computes, in training, only what is pooled: the same loss and gradient, and less work."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vlm.models.model import build_network, model_config
from vlm.train.attention import compute_pooled_positions, reduce_attention_work
from vlm.train.run_config import ModelConfig
from vlm.train.run_setup import open_session

LENGTHS = (3, 9, 20, 12)


def network_of(*, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    config = model_config("micro")
    changes = {
        "vision_cfg": config["vision_cfg"] | {"layers": 2, "patch_dropout": 0.0} | (vision or {}),
        "text_cfg": config["text_cfg"] | {"layers": 2} | (text or {}),
    }
    network = build_network(config | {"custom_text": True} | changes).double().train()
    # biases and norms as after training, so that each weight counts
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 1 else None
    return network


def inputs_of(network: Any) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.zeros(len(LENGTHS), network.text.context_length, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.randint(3, network.text.vocab_size - 1, (length,), generator=draw)
        tokens[row, length - 1] = network.text.vocab_size - 1
    size = network.visual.image_size
    return torch.randn(len(LENGTHS), 3, *size, generator=draw).double(), tokens


def gradients(network: Any) -> dict[str, torch.Tensor]:
    pixels, tokens = inputs_of(network)
    network.zero_grad()
    image = F.normalize(network.encode_image(pixels), dim=-1)
    text = F.normalize(network.encode_text(tokens), dim=-1)
    logits = 20 * image @ text.T
    loss = F.cross_entropy(logits, torch.arange(len(LENGTHS)))
    loss.backward()
    return {"loss": loss.detach()} | {
        name: weight.grad.clone() for name, weight in network.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({}, {}),
        ({"ls_init_value": 0.3, "final_ln_after_pool": True}, {"ls_init_value": 0.3}),
        ({}, {"pool_type": "eos", "eos_id": 299, "no_causal_mask": True}),
    ],
)
@pytest.mark.parametrize("masks_padding", [False, True])
def test_the_gradient_is_that_of_the_whole_block(vision, text, masks_padding):
    network = network_of(vision=vision, text=text)
    network.text.use_pad_mask = masks_padding
    wanted = gradients(network)
    assert compute_pooled_positions(network, image=True) == ["visual", "text"]
    with FlopCounterMode(display=False) as counted:
        found = gradients(network)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
    with FlopCounterMode(display=False) as whole:
        gradients(network_of(vision=vision, text=text))
    # of two blocks, one has a sixth of its products left
    assert 0.5 < counted.get_total_flops() / whole.get_total_flops() < 0.75


def test_evaluation_has_the_bits_it_had():
    network = network_of()
    pixels, tokens = inputs_of(network)
    network.eval()
    wanted = network.encode_image(pixels), network.encode_text(tokens)
    compute_pooled_positions(network, image=True)
    assert torch.equal(network.encode_image(pixels), wanted[0])
    assert torch.equal(network.encode_text(tokens), wanted[1])


def test_nothing_of_an_exported_graph_stays_behind():
    network = network_of().eval()
    compute_pooled_positions(network, image=True)
    tokens = inputs_of(network)[1]
    torch.export.export(network.text, (tokens,))
    assert torch.equal(copy.deepcopy(network).encode_text(tokens), network.encode_text(tokens))


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({"pool_type": "avg"}, {"pool_type": "last"}),
        ({"attentional_pool": True}, {"embed_cls": True}),
        ({"output_tokens": True}, {"output_tokens": True}),
    ],
)
def test_towers_that_read_other_positions_are_left_alone(vision, text):
    assert compute_pooled_positions(network_of(vision=vision, text=text), image=True) == []


def test_an_image_tower_whose_patches_are_read_stays_whole():
    assert compute_pooled_positions(network_of(), image=False) == ["text"]


@pytest.mark.parametrize("settings", [{"compile": True}, {"gradient_checkpointing": True}])
def test_blocks_that_run_outside_of_their_tower_stay_whole(settings):
    network = network_of()
    reduce_attention_work(network, ModelConfig(**settings), torch.device("cuda"), reads_patches=False)
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_run_counts_the_operations_that_are_left(configure):
    def flops(name, **model):
        session = open_session(configure(name, model={"architecture": "micro"} | model), resume=False)
        batch = next(session.open_batches())[0]
        tokens = torch.zeros(2, batch.tokens.shape[1], dtype=torch.int64)
        sample = session.flops.sample_flops({"pixels": torch.zeros(2, 3, *batch.images.shape[2:]), "tokens": tokens})
        assert sample is not None
        return sample.total

    assert flops("pooled") < 0.95 * flops("whole", gradient_checkpointing=True)
