"""Heat maps against slow versions, on networks whose reasons are known, and over all kinds of towers."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.models.huggingface_fixture import FOLDERS
from tests.models.test_patch_features import images, network_of, swin_network, timm_network
from vlm.data.synthetic.shapes import COLOUR_RGB, Scene, draw_scenes
from vlm.errors import UsageError
from vlm.evaluation.heat_map_scores import pointing_hit
from vlm.models import heat_maps as module
from vlm.models.heat_maps import default_method
from vlm.models.load import load_model
from vlm.models.patch_features import run_image_tower

PALETTE = list(COLOUR_RGB)


def heat_maps(*given, **options) -> Any:
    return module.heat_maps(*given, **options)


class Palette(nn.Module):
    """Features of a place: how near its colour is to each of the palette."""

    def forward(self, pixels):
        places = F.avg_pool2d(pixels, 4)
        colours = torch.tensor([COLOUR_RGB[name] for name in PALETTE]) / 255
        return (-40 * ((places[:, None] - colours[:, :, None, None]) ** 2).sum(dim=2)).exp()


class PaletteNetwork(nn.Module):
    """Embeds an image as how much there is of each colour, and a text as the colours that it names."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(Palette(), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def encode_image(self, pixels):
        return self.visual(pixels)


def two_shapes(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.choice(PALETTE, size=2, replace=False)
    scenes = [
        Scene(shape="star", colour=first, size="large", count=1, position="left", background="white"),
        Scene(shape="circle", colour=second, size="small", count=1, position="right", background="white"),
    ]
    drawn = draw_scenes(scenes, pixels=48, rng=rng)
    pixels = torch.from_numpy(np.asarray(drawn.image).copy()).permute(2, 0, 1)[None].float() / 255
    texts = torch.eye(len(PALETTE))[[PALETTE.index(first), PALETTE.index(second)]]
    return pixels, texts, [coverage > 0.5 for coverage in drawn.coverages]


@pytest.mark.parametrize("method", ["grad-cam", "hires-cam", "occlusion", "auto"])
def test_maps_point_at_the_shape_whose_colour_is_named(method):
    hits = []
    for seed in range(20):
        pixels, texts, masks = two_shapes(seed)
        for heat, mask in zip(heat_maps(PaletteNetwork(), pixels, texts, method).numpy(), masks, strict=True):
            hits.append(pointing_hit(heat, mask))
    assert np.mean(hits) >= 0.95


def test_what_is_said_against_turns_a_map_away():
    pixels, texts, masks = two_shapes(0)
    heat = heat_maps(PaletteNetwork(), pixels, texts[:1] - texts[1:], "occlusion")[0].numpy()
    assert heat[masks[0]].mean() > 0 > heat[masks[1]].mean()


def chefer_by_hand(network, pixels, text):
    """Equations 5 and 6, with the tower written out and its attention as leaves of the graph."""
    visual = network.visual
    tokens = visual._embeds(pixels)
    tokens = tokens.detach()
    maps = []
    for block in visual.transformer.resblocks:
        attention = block.attn
        normed = block.ln_1(tokens)
        query, key, value = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)

        def split(part, heads=attention.num_heads):
            return part.unflatten(-1, (heads, -1)).transpose(1, 2)

        logits = split(query) @ split(key).transpose(-2, -1) / attention.head_dim**0.5
        maps.append(logits.softmax(dim=-1))
        attended = (maps[-1] @ split(value)).transpose(1, 2).flatten(2)
        tokens = tokens + attention.out_proj(attended)
        tokens = tokens + block.mlp(block.ln_2(tokens))
    pooled, _ = visual._pool(tokens)
    score = F.normalize(pooled @ visual.proj, dim=-1)[0] @ text
    relevance = torch.eye(tokens.shape[1])
    for weights, gradient in zip(maps, torch.autograd.grad(score, maps), strict=True):
        relevance = relevance + (weights * gradient)[0].relu().mean(dim=0) @ relevance
    return relevance[0, 1:].detach().reshape(4, 4)


def test_attention_is_that_of_the_equations():
    network = network_of("micro")
    texts = F.normalize(torch.randn(3, run_image_tower(network, images(1)).image.shape[1]), dim=-1)
    maps = heat_maps(network, images(1), texts, "attention", shifts=1)
    for heat, text in zip(maps, texts, strict=True):
        by_hand = chefer_by_hand(network, images(1), text)[None, None]
        expected = F.interpolate(by_hand, size=(32, 32), mode="bilinear", align_corners=False)[0, 0]
        assert torch.allclose(heat, expected, atol=1e-6)


def test_grad_cam_of_a_class_token_takes_the_last_map_that_counts():
    """Of the last layer the patches' outputs have no part in the embedding."""
    network = network_of("micro")
    text = torch.randn(1, run_image_tower(network, images(1)).image.shape[1])
    assert (
        heat_maps(network, images(1), text, "grad-cam").abs().sum()
        + (heat_maps(network, images(1), -text, "grad-cam").abs().sum())
        > 0
    )


def test_similarity_without_the_last_attention_is_the_patches_own():
    network = network_of("micro")
    text = F.normalize(torch.randn(1, run_image_tower(network, images(1)).image.shape[1]), dim=-1)
    last = network.visual.transformer.resblocks[-1].attn
    plain = heat_maps(network, images(1), text, "similarity", shifts=1)
    with torch.no_grad():
        last.out_proj.weight.zero_()
        last.out_proj.bias.zero_()
    patches = run_image_tower(network, images(1), with_patches=True).patches
    expected = (F.normalize(patches[0], dim=-1) @ text[0]).reshape(1, 1, 4, 4)
    enlarged = F.interpolate(expected, size=(32, 32), mode="bilinear", align_corners=False)[0]
    blind = heat_maps(network, images(1), text, "similarity", shifts=1)
    assert torch.allclose(blind, enlarged, atol=1e-5)
    assert not torch.allclose(plain, blind, atol=1e-3)


def huggingface_network(tmp_path) -> Any:
    return load_model(str(FOLDERS["siglip"](tmp_path / "siglip")), device="cpu").network


TOWERS = {
    "open_clip ViT": (lambda _: network_of("micro"), 32, "attention"),
    "mean of patches": (lambda _: network_of("micro", pool_type="avg"), 32, "attention"),
    "attention pooling": (lambda _: network_of("micro-coca"), 32, "attention"),
    "timm ViT": (lambda _: timm_network("test_vit", size=160), 160, "attention"),
    "Hugging Face SigLIP": (huggingface_network, 32, "attention"),
    "ResNet": (lambda _: timm_network("test_resnet", "avg"), 64, "grad-cam"),
    "ConvNeXt": (lambda _: timm_network("test_convnext", "avg"), 64, "grad-cam"),
    "Swin, channels last": (lambda _: swin_network(), 64, "grad-cam"),
}


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_is_explained_and_left_as_it_was(name, tmp_path):
    build, size, expected = TOWERS[name]
    network = build(tmp_path).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    pixels = images(1, size)
    with torch.inference_mode():
        before = network.encode_image(pixels)
        texts = torch.randn(2, before.shape[1])
        assert default_method(network, pixels) == expected
        for method in ("auto", "grad-cam", "hires-cam", "eigen-cam", "occlusion", expected):
            maps = heat_maps(network, pixels, texts, method)
            assert maps.shape == (2, size, size)
            assert torch.isfinite(maps).all()
        assert torch.equal(network.encode_image(pixels), before)
    assert not any(module._forward_hooks for module in network.modules())


def test_eigen_cam_knows_no_text_and_finds_the_thing():
    pixels, texts, masks = two_shapes(3)
    maps = heat_maps(PaletteNetwork(), pixels, texts, "eigen-cam")
    assert torch.equal(maps[0], maps[1])
    assert pointing_hit(maps[0].numpy(), masks[0] | masks[1]) == 1


def test_shifts_refine_a_coarse_map():
    """A red spot that lies between the centres of places of 8 pixels."""

    class Coarse(PaletteNetwork):
        def __init__(self):
            super().__init__()
            self.visual[1] = nn.AvgPool2d(2)

    pixels = torch.ones(1, 3, 64, 64)
    pixels[0, :, 30:34, 18:22] = torch.tensor(COLOUR_RGB["red"])[:, None, None] / 255
    text = torch.eye(len(PALETTE))[:1]
    distances = []
    for shifts in (1, 4):
        heat = heat_maps(Coarse(), pixels, text, "hires-cam", shifts=shifts)[0]
        row, column = divmod(int(heat.argmax()), 64)
        distances.append(max(abs(row - 31.5), abs(column - 19.5)))
    assert distances[1] < distances[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "no method 'magic' of explaining; give one of auto, attention"),
        ({"shifts": -1}, "shifts = -1 is out of range"),
        ({"method": "attention"}, "no attention over all its patches; explain it by grad-cam or occlusion"),
        ({"method": "similarity"}, "no embeddings of patches; explain by grad-cam"),
    ],
)
def test_what_a_tower_cannot_do_is_said(options, message):
    pixels, texts, _ = two_shapes(0)
    with pytest.raises(UsageError, match=message):
        heat_maps(PaletteNetwork(), pixels, texts, **options)
