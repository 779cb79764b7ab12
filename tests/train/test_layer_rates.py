"""Early layers take smaller steps, whatever the tower; what has no depth takes whole ones."""

import pytest
import torch

from vlm.models.load import load_model
from vlm.models.model import build_network, model_config
from vlm.train.optim import layer_rates
from vlm.train.run import train


def rates_of(architecture: str) -> dict[str, float]:
    config = model_config(architecture)
    config["text_cfg"] |= {"vocab_size": 50, "context_length": 8, "pad_id": 0, "eos_id": 49}
    # a network without data is enough, and a ViT-B of transformers takes seconds to draw
    with torch.device("meta"):
        return layer_rates(build_network(config), 0.5)


VIT = ("visual.trunk.patch_embed.proj.weight", "visual.trunk.blocks.0.attn.qkv.weight")
VIT_LAST = "visual.trunk.blocks.1.attn.qkv.weight"
HF = ("visual.trunk.embeddings.patch_embeddings.projection.weight", "visual.trunk.layers.10.layernorm_after.weight")
HF_LAST = "visual.trunk.layers.11.layernorm_after.weight"
OPEN_CLIP = ("visual.conv1.weight", "visual.transformer.resblocks.0.mlp.c_fc.weight")
OPEN_CLIP_LAST = "visual.transformer.resblocks.1.ln_1.weight"


@pytest.mark.parametrize(
    ("architecture", "first", "middle", "last"),
    [
        ("tiny", *OPEN_CLIP, OPEN_CLIP_LAST),
        ("vit:32x2/8,image_size=32+bag@8", *VIT, VIT_LAST),
        ("hf:vit,image_size=32+bag@8", *HF, HF_LAST),
    ],
)
def test_the_rate_halves_from_layer_to_layer(architecture, first, middle, last):
    rates = rates_of(architecture)
    assert rates[first] < rates[middle] < rates[last] < 1
    assert rates[middle] == pytest.approx(rates[last] / 2)
    assert rates["logit_scale"] == 1


def test_texts_have_depths_of_their_own():
    rates = rates_of("tiny")
    assert rates["text.token_embedding.weight"] == 0.25
    assert rates["text.transformer.resblocks.0.attn.in_proj_weight"] == 0.5
    assert rates["text.text_projection"] == 1


def test_a_caption_decoder_is_no_early_part_of_the_text_tower():
    rates = rates_of("micro-coca")
    decoder = {name: rate for name, rate in rates.items() if name.startswith("text_decoder.")}
    assert decoder
    assert set(decoder.values()) == {1}
    assert rates["text.token_embedding.weight"] < 1


def test_groups_of_a_convolutional_trunk_are_timms():
    rates = rates_of("timm:test_efficientnet,image_size=32+bag@8")
    assert rates["visual.trunk.conv_stem.weight"] < rates["visual.trunk.blocks.1.0.conv_exp.weight"] < 1
    assert rates["visual.head.proj.weight"] == 1


def test_a_run_steps_less_in_early_layers(configure):
    moves: list[float] = []
    for decay in (1.0, 0.1):
        start = load_model(train(configure(f"none-{decay}", steps=0)).run, device="cpu").network.state_dict()
        config = configure(f"run-{decay}", steps=2, optimizer={"learning_rate": 0.01, "layer_decay": decay})
        end = load_model(train(config).run, device="cpu").network.state_dict()
        name = "visual.conv1.weight"
        moves.append(float((end[name] - start[name]).abs().max()))
    assert moves[1] < 0.2 * moves[0]
