from typing import Any

import pytest
import torch
from torch import nn

from vlm.errors import UsageError
from vlm.models import patch_features
from vlm.models.model import build_network, model_config
from vlm.models.patch_features import encode_crops, pool_images, resize_positions, supports_patch_features


def network_of(name: str = "micro", **vision) -> Any:
    torch.manual_seed(0)
    config = model_config(name)
    config["vision_cfg"] |= vision
    return build_network(config).eval()


def timm_network(name: str, pool: str = "", size: int = 64) -> Any:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": size}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return build_network({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "custom_text": True}).eval()


def swin_network() -> Any:
    """A tower whose maps have channels last; timm registers none so small."""
    from timm.models.swin_transformer import SwinTransformer

    network = timm_network("test_convnext", "avg", 64)
    network.visual.trunk = SwinTransformer(
        64, embed_dim=32, depths=(1, 1), num_heads=(1, 2), window_size=4, num_classes=0
    )
    return network.eval()


def images(count: int = 2, size: int = 32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def run_image_tower(*given, **options) -> Any:
    return patch_features.run_image_tower(*given, **options)


def tokens_of(visual: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    kept = []
    handle = visual.get_submodule("transformer").register_forward_hook(lambda module, given, made: kept.append(made))
    visual(pixels)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("name", ["micro", "micro-coca"])
def test_the_image_is_embedded_as_without_patches(name):
    network = network_of(name)
    reading = run_image_tower(network, images(), with_patches=True)
    plain = run_image_tower(network, images())
    assert torch.allclose(reading.image, plain.image, atol=1e-6)
    if name == "micro-coca":
        assert torch.allclose(reading.memory, plain.memory, atol=1e-6)
        assert torch.allclose(nn.functional.normalize(plain.image, dim=-1), network.encode_image(images()), atol=1e-6)
    else:
        assert torch.allclose(plain.image, network.encode_image(images()), atol=1e-6)
    assert reading.patches.shape == (2, 16, reading.image.shape[1])


@pytest.mark.parametrize(
    ("name", "vision"),
    [("micro", {}), ("micro", {"pool_type": "avg"}), ("micro-coca", {}), ("micro-coca", {"width": 48})],
)
def test_a_patch_is_what_the_tower_makes_of_it_alone(name, vision):
    """Every patch through the tower's own pooling in a sequence that holds nothing else."""
    visual = (network := network_of(name, **vision)).visual
    tokens = tokens_of(visual, images())[:, 1:]
    found = run_image_tower(network, images(), with_patches=True).patches
    for row in range(len(tokens)):
        for place in range(tokens.shape[1]):
            alone = tokens[row, place].expand(1, 2, -1)  # a class token and one patch, both of them this patch
            pooled, _ = visual._pool(alone)
            assert torch.allclose(found[row, place], (pooled @ visual.proj)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pool", "size", "prefix"),
    [
        ("test_vit", "token", 160, 1),
        ("test_vit", "avg", 160, 1),
        ("test_vit3", "map", 160, 1),
        ("test_convnext", "avg", 64, 0),
        ("swin", "avg", 64, 0),
        ("test_resnet", "avg", 64, 0),
    ],
)
def test_timm_towers_project_each_place_of_their_map(name, pool, size, prefix):
    network = swin_network() if name == "swin" else timm_network(name, pool, size)
    pixels = images(2, size)
    reading = run_image_tower(network, pixels, with_patches=True)
    assert torch.allclose(reading.image, network.encode_image(pixels), atol=1e-5)
    features = network.visual.trunk.forward_features(pixels)
    if name == "swin":
        features = features.permute(0, 3, 1, 2)
    for row, place in ((0, 0), (0, 3), (1, 1), (1, -1)):
        if features.ndim == 3:
            only = features[row, prefix:][place].expand(1, features.shape[1], -1)
        else:
            flat = features[row].flatten(1)[:, place]
            only = flat[None, :, None, None].expand(1, -1, *features.shape[2:]).contiguous()
            only = only.permute(0, 2, 3, 1) if name == "swin" else only
        everywhere = network.visual.head(network.visual.trunk.forward_head(only))[0]
        assert torch.allclose(reading.patches[row, place], everywhere, atol=1e-5)


def test_registers_are_no_patches():
    import timm

    network = timm_network("test_vit", "token", 160)
    network.visual.trunk = timm.create_model("test_vit", num_classes=0, reg_tokens=4).eval()
    reading = run_image_tower(network, images(1, 160), with_patches=True)
    assert reading.patches.shape == (1, 100, 16)
    assert torch.allclose(reading.image, network.encode_image(images(1, 160)), atol=1e-5)


def test_a_tower_without_patches_is_refused():
    network = network_of("micro", layers=[1, 1, 1, 1], width=16, head_width=16)
    assert not supports_patch_features(network)
    with pytest.raises(UsageError, match="no features of patches"):
        run_image_tower(network, images(), with_patches=True)


def test_a_crop_of_the_networks_size_is_a_image():
    network = network_of()
    assert torch.equal(encode_crops(network, images(), 32), network.encode_image(images()))


@pytest.mark.parametrize("name", ["micro", "micro-coca"])
def test_positions_are_left_as_they_are_where_the_size_is(name):
    """The way of small crops, taken by a crop that is not small, is the way of images."""
    network = network_of(name)
    assert torch.allclose(encode_crops(network, images(), 64), run_image_tower(network, images()).image, atol=1e-5)


def test_the_positions_of_a_small_crop_lie_between_those_of_the_image():
    network = network_of()
    with torch.no_grad():
        grid = torch.arange(4.0)
        network.visual.positional_embedding[1:] = (4 * grid[:, None] + grid).flatten()[:, None]
    small = resize_positions(network.visual.positional_embedding, (4, 4), (2, 2))[1:, 0]
    assert torch.allclose(small.sort().values, small)
    assert float(small.detach().mean()) == pytest.approx(7.5, abs=1e-4)
    assert encode_crops(network, images(3, 16), 32).shape == (3, 16)


def test_a_crop_of_parts_of_patches_is_refused():
    with pytest.raises(UsageError, match="20 pixels are not a whole number of patches of 8"):
        encode_crops(network_of(), images(2, 20), 32)


def test_other_towers_see_small_crops_enlarged():
    network = timm_network("test_convnext", "avg", 64)
    enlarged = nn.functional.interpolate(images(2, 32), size=(64, 64), mode="bilinear")
    assert torch.allclose(encode_crops(network, images(2, 32), 64), network.encode_image(enlarged), atol=1e-6)


@pytest.mark.parametrize("name", ["micro", "micro-coca"])
def test_pooled_features_are_projected_to_the_embedding(name):
    network = network_of(name)
    pooled = pool_images(network, images())
    projection = network.visual.proj
    assert pooled.shape == (2, len(projection))
    embeddings = run_image_tower(network, images()).image
    assert torch.allclose(pooled @ projection, embeddings, atol=1e-6)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_pooled_features_of_timm_towers_are_what_their_head_reads(projection):
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": projection, "image_size": 160}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    config: Any = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    network: Any = build_network(config).eval()
    pixels = images(size=160)
    pooled = pool_images(network, pixels)
    assert pooled.shape == (2, network.visual.trunk.num_features)
    assert torch.allclose(network.visual.head(pooled), network.encode_image(pixels), atol=1e-6)


def test_towers_that_pool_and_project_in_one_layer_give_no_pooled_features():
    network: Any = build_network(
        {
            "embed_dim": 16,
            "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 16},
            "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        }
    ).eval()
    with pytest.raises(UsageError, match=r"ModifiedResNet pools and projects in one layer.*layer = 'projected'"):
        pool_images(network, images(size=64))
