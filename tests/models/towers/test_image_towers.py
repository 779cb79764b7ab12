import math
from typing import Any

import pytest
import torch
from torch import nn

from vlm.errors import UsageError
from vlm.models.towers.pooling import POOLINGS, MapLayout, TokenMap, as_tokens, num_heads_for, read_layout
from vlm.models.towers.timm import pack_patches
from vlm.models.towers.tower import batch_norm_layers, freeze_batch_norm
from vlm.models.towers.tower_config import read_image_config
from vlm.models.towers.tower_registry import build_image_tower, resolve_tower_configs

SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}


def make(tower, *, embed_dim=8, seed=0, **options) -> Any:
    values = resolve_tower_configs(
        {"embed_dim": embed_dim, "vision_cfg": {"tower": tower, **options}, "text_cfg": {"tower": "bag"}}
    )
    torch.manual_seed(seed)
    return build_image_tower(values["vision_cfg"], embed_dim)


def pool_of(pooling: str, width: int, **settings) -> Any:
    config = read_image_config({"tower": "timm:test_vit", "image_size": 64, "pooling": pooling, **settings})
    return POOLINGS[pooling](width, config)


def images(size, number=2):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tower_is_built_where_autograd_is_off(mode):
    pixels = images(64)
    wanted = make("timm:test_convnext", image_size=64).eval()(pixels).detach()
    with mode():
        built = make("timm:test_convnext", image_size=64).eval()
        assert torch.equal(built(pixels), wanted)


@pytest.mark.parametrize(
    ("tower", "options", "size", "layouts"),
    [
        ("timm:test_vit", {}, 64, ["tokens 1+16×64"]),
        ("timm:test_vit", {"registers": 3}, 64, ["tokens 4+16×64"]),
        ("timm:test_convnext", {}, 64, ["NCHW 2²×64"]),
        ("timm:swin_tiny_patch4_window7_224", {"overrides": SWIN}, 64, ["NHWC 2²×128"]),
        ("vit:32x1/8", {"registers": 2, "positions": "sine"}, 32, ["tokens 2+16×32"]),
    ],
)
def test_layouts_are_read_and_every_trained_weight_has_a_gradient(tower, options, size, layouts):
    for pooling in ("native", "avg", "simpool", "queries", "map"):
        built = make(tower, image_size=size, pooling=pooling, **options).train()
        assert [str(layout) for layout in built.trunk_info.layouts] == layouts
        features = built(images(size))
        assert features.shape == (2, 8)
        features.square().sum().backward()
        assert not [name for name, each in built.named_parameters() if each.requires_grad and each.grad is None]


def test_a_list_of_maps_is_pooled_map_by_map():
    small = {"embed_dim": [16, 32], "num_heads": [1, 1], "depth": [[1, 1, 0]]}
    tower = make("timm:crossvit_tiny_240", pooling="token", overrides=small).eval()
    assert [str(layout) for layout in tower.trunk_info.layouts] == ["tokens 1+400×16", "tokens 1+196×32"]
    pixels = images(240, 1)
    with torch.no_grad():
        maps = tower.trunk.forward_features(pixels)
        expected = torch.cat([maps[0][:, 0], maps[1][:, 0]], dim=1)
        assert torch.allclose(tower(pixels), tower.head(tower.norm(expected)), atol=1e-6)


def test_maps_of_both_layouts_become_the_same_tokens():
    nhwc = torch.randn(2, 3, 4, 5)
    nchw = nhwc.permute(0, 3, 1, 2).contiguous()
    trunk: Any = nn.Module()
    trunk.num_features = 5
    first, second = (read_layout(each[:1], trunk) for each in (nhwc, nchw))
    assert (first.kind, second.kind) == ("NHWC", "NCHW")
    one, other = as_tokens(nhwc, [first])[0], as_tokens(nchw, [second])[0]
    assert torch.equal(one.patches, other.patches)
    assert torch.equal(one.patches[1, 1 * 4 + 2], nhwc[1, 1, 2])


@pytest.mark.parametrize(("number", "prefix"), [(197, 1), (196, 0), (17, 1), (18, 2)])
def test_prefix_tokens_that_a_trunk_does_not_tell_are_what_is_over_a_square(number, prefix):
    layout = read_layout(torch.zeros(1, number, 4), nn.Module())
    assert (layout.prefix, layout.patches) == (prefix, number - prefix)


def test_a_lone_class_token_is_no_patch():
    tower = make("timm:pit_ti_224", image_size=64, pooling="token", overrides={"depth": [1, 1, 1]})
    assert tower.trunk_info.layouts == (MapLayout(kind="tokens", width=256, prefix=1, patches=0),)
    with pytest.raises(UsageError, match="class token alone"):
        make("timm:pit_ti_224", image_size=64, pooling="avg", overrides={"depth": [1, 1, 1]})


def test_native_pooling_is_what_timm_classifies():
    tower = make("timm:test_convnext", image_size=64).eval()
    with torch.no_grad():
        maps = tower.trunk.forward_features(images(64))
        pooled = tower.trunk.head.norm(maps.mean(dim=(2, 3))[..., None, None]).flatten(1)
        assert torch.allclose(tower(images(64)), pooled @ tower.head.proj.weight.T, atol=1e-5)


NAFLEX = "timm:naflexvit_base_patch16_gap"
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def canvases(*grids):
    """Pixels that fill grids of patches of 16, at the top left of black canvases for 12 tokens."""
    pixels = torch.full((len(grids), 3, 64, 64), -1.5)
    for canvas, (rows, columns) in zip(pixels, grids, strict=True):
        canvas[:, : 16 * rows, : 16 * columns] = images(64, 1)[0, :, : 16 * rows, : 16 * columns]
    return pixels


def test_images_of_different_shapes_are_seen_as_if_each_were_alone():
    tower = make(NAFLEX, tokens=12, overrides=SMALL).eval()
    assert tower.image_size == (64, 64)
    pixels = canvases((3, 4), (4, 3), (3, 3), (2, 4))
    with torch.no_grad():
        together = tower(pixels)
        for canvas, vector in zip(pixels, together, strict=True):
            assert torch.allclose(tower(canvas[None])[0], vector, atol=1e-5)
        # timm's own form for a square image, and the packed form for another
        bare = tower.project(tower.trunk(pixels[2:3, :, :48, :48]))
        assert torch.allclose(bare[0], together[2], atol=1e-5)
        patches, places, is_image = pack_patches(pixels, 16)
    assert is_image.sum(dim=1).tolist() == [12, 12, 9, 8]
    assert places[1, :12].tolist() == [[row, column] for row in range(4) for column in range(3)]
    assert torch.equal(patches[1, 4].unflatten(0, (16, 16, 3)), pixels[1, :, 16:32, 16:32].permute(1, 2, 0))


def test_black_inside_an_image_is_a_part_of_it_and_a_black_image_is_one_patch():
    pixels = canvases((3, 4), (3, 4))
    pixels[0, :, 16:32] = -1.5
    pixels[1] = -1.5
    _, _, is_image = pack_patches(pixels, 16)
    assert is_image.sum(dim=1).tolist() == [12, 1]
    assert make(NAFLEX, tokens=12, overrides=SMALL)(pixels).isfinite().all()


def test_every_weight_of_a_tower_of_shapes_learns_and_there_is_no_one_map():
    tower = make(NAFLEX, tokens=12, overrides=SMALL).train()
    tower(canvases((3, 4), (3, 3))).square().sum().backward()
    assert not [name for name, each in tower.named_parameters() if each.requires_grad and each.grad is None]
    with pytest.raises(UsageError, match="tokens=12 gives each image a grid of its own"):
        tower.forward_with_patches(canvases((3, 4)))


def test_average_leaves_prefix_tokens_out():
    tokens = TokenMap(prefix=torch.full((1, 2, 4), 9.0), patches=torch.arange(12.0).reshape(1, 3, 4))
    assert pool_of("avg", 4)(tokens).tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert pool_of("token", 4)(tokens).tolist() == [[9.0] * 4]


@pytest.mark.parametrize("gamma", [1.0, 1.25, 2.0])
def test_simpool_attends_from_the_mean_patch(gamma):
    pool = pool_of("simpool", 8, gamma=gamma)
    patches = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    attention = pool.get_submodule("attention")
    values = attention.get_submodule("norm")(patches)
    query = patches.mean(dim=1) @ attention.get_parameter("q.weight").T
    keys = values @ attention.get_parameter("k.weight").T
    weights = (torch.einsum("bc,bpc->bp", query, keys) / math.sqrt(8)).softmax(dim=-1)
    pooled = pool(TokenMap(prefix=patches[:, :0], patches=patches))
    for image in range(2):
        least = float(values[image].detach().min()) - 1e-6
        for channel in range(8):
            powers = ((values[image, :, channel] - least) ** gamma * weights[image]).sum().detach()
            assert float(pooled[image, channel].detach()) == pytest.approx(
                float(powers ** (1 / gamma)) + least, abs=1e-5
            )


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_simpool_of_one_patch_is_that_patch(gamma):
    pool = pool_of("simpool", 8, gamma=gamma)
    patch = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0))
    found = pool(TokenMap(prefix=patch[:, :0], patches=patch))
    assert torch.allclose(found, pool.get_submodule("attention").get_submodule("norm")(patch)[:, 0], atol=1e-5)


def test_boq_with_its_convolution_sees_where_patches_are_and_shows_what_queries_attend_to():
    torch.manual_seed(0)
    pool: Any = pool_of("queries", 16, queries=6, rows=32, pool_width=8)
    patches = torch.randn(2, 9, 16)
    tokens = TokenMap(prefix=patches[:, :0], patches=patches)
    found = pool(tokens)
    assert found.shape == (2, 32 * 8)
    assert not torch.allclose(found, pool(TokenMap(prefix=patches[:, :0], patches=patches.flip(1))), atol=1e-3)
    maps = pool.query_maps(tokens)
    assert maps.shape == (2, 2 * 6, 9)
    assert torch.allclose(maps.sum(dim=-1), torch.ones(2, 12), atol=1e-5)
    # the map of the first block's last query, from its equations
    reduced = pool.norm_input(pool.reduce(patches.transpose(1, 2).reshape(2, 16, 3, 3)).flatten(2).transpose(1, 2))
    block = pool.blocks[0]
    encoded = block.encoder(reduced)
    queries = block.queries.expand(2, -1, -1)
    queries = block.norm_queries(queries + block.among(queries, queries, queries)[0])
    q_weight, k_weight, _ = block.across.in_proj_weight.chunk(3)
    q_bias, k_bias, _ = block.across.in_proj_bias.chunk(3)
    logits = (queries @ q_weight.T + q_bias) @ (encoded @ k_weight.T + k_bias).transpose(1, 2) / math.sqrt(8)
    assert torch.allclose(maps[:, 5], logits.softmax(dim=-1)[:, 5], atol=1e-5)


def test_learned_queries_do_not_care_for_the_order_of_patches_but_for_their_content():
    torch.manual_seed(0)
    pool: Any = pool_of("queries", 16, queries=6)
    patches = torch.randn(2, 7, 16)
    empty = patches[:, :0]
    found = pool(TokenMap(prefix=empty, patches=patches))
    assert found.shape == (2, 64)
    assert torch.allclose(found, pool(TokenMap(prefix=empty, patches=patches.flip(1))), atol=1e-5)
    assert not torch.allclose(found, pool(TokenMap(prefix=empty, patches=patches + torch.eye(7, 16))), atol=1e-2)


def test_queries_of_boq_follow_its_equations():
    torch.manual_seed(0)
    pool: Any = pool_of("queries", 8, queries=3).double()
    patches = torch.randn(1, 4, 8, dtype=torch.float64)

    def attend(layer, queries, keys):
        q, k, v = (
            states @ weight.T + bias
            for states, weight, bias in zip(
                (queries, keys, keys), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True
            )
        )
        return layer.out_proj((q @ k.transpose(1, 2) / math.sqrt(8)).softmax(dim=-1) @ v)

    states, outputs = patches, []
    for block in pool.blocks:
        states = block.encoder(states)
        queries = block.norm_queries(block.queries + attend(block.among, block.queries, block.queries))
        outputs.append(block.norm_out(attend(block.across, queries, states)))
    stacked = torch.cat(outputs, dim=1)
    expected = [
        sum(w * stacked[0, i] for i, w in enumerate(row)) + b
        for row, b in zip(pool.rows.weight, pool.rows.bias, strict=True)
    ]
    found = pool(TokenMap(prefix=patches[:, :0], patches=patches))
    assert torch.allclose(found[0], torch.cat(expected), atol=1e-10)


def test_patches_of_the_joint_space_have_the_image_as_their_mean_where_nothing_normalises():
    tower = make("timm:test_vit", image_size=64, pooling="avg").eval()
    tower.norm = nn.Identity()
    image, patches = tower.forward_with_patches(images(64))
    assert patches.shape == (2, 16, 8)
    assert torch.allclose(patches.mean(dim=1), image, atol=1e-5)


@pytest.mark.parametrize(
    ("tower", "options"),
    [
        ("timm:test_convnext", {}),
        ("timm:test_vit", {}),
        ("timm:test_vit", {"pooling": "simpool", "registers": 2}),
        ("timm:swin_tiny_patch4_window7_224", {"overrides": SWIN, "pooling": "queries"}),
    ],
)
def test_a_image_of_one_patch_everywhere_is_that_patch(tower, options):
    built = make(tower, image_size=64, **options).eval()
    with torch.no_grad():
        image, patches = built.forward_with_patches(images(64))
        assert torch.allclose(image, built(images(64)), atol=1e-5)
        layout = built.trunk_info.layouts[0]
        features = built.features(images(64))
        one = as_tokens(features, [layout])[0].patches[1, 2]
        everywhere = one[None, :, None, None] if layout.kind == "NCHW" else one
        constant = torch.zeros_like(features[:1]) + everywhere
        assert torch.allclose(built.head(built.pool_features(constant))[0], patches[1, 2], atol=1e-4)


def test_trunks_without_one_set_of_patches_say_so():
    tower = make("timm:pit_ti_224", image_size=64, overrides={"depth": [1, 1, 1]})
    with pytest.raises(UsageError, match="no one set of patches"):
        tower.forward_with_patches(images(64))


def test_sine_positions_are_fixed_and_tell_places_apart():
    tower = make("vit:32x1/8", image_size=32, positions="sine", pooling="token")
    positions = tower.trunk.get_parameter("pos_embed")
    assert not positions.requires_grad
    assert positions.shape == (1, 16, 32)
    assert torch.cdist(positions[0], positions[0]).fill_diagonal_(9).min() > 0.1


def test_locking_keeps_the_trunk_but_its_last_groups_and_the_projection():
    tower = make("timm:test_vit", image_size=64, pooling="simpool")
    tower.lock(unlocked_groups=2)
    free = {name for name, each in tower.named_parameters() if each.requires_grad}
    assert {"head.proj.weight", "pools.0.attention.q.weight", "norm.weight"} <= free
    assert "trunk.patch_embed.proj.weight" not in free
    assert any(name.startswith("trunk.") for name in free)
    tower = make("timm:test_vit", image_size=64)
    tower.lock()
    assert [name for name, each in tower.named_parameters() if each.requires_grad] == ["head.proj.weight"]


def test_frozen_batch_norm_uses_its_running_statistics_in_training_too():
    tower = make("timm:test_resnet", image_size=32)
    names = batch_norm_layers(tower)
    assert names
    pixels = images(32, 3)
    tower.train()
    assert not torch.allclose(tower(pixels)[:2], tower(pixels[:2]), atol=1e-4)
    assert freeze_batch_norm(tower) == names
    assert batch_norm_layers(tower) == []
    before = tower.get_submodule(names[0]).get_buffer("running_mean").clone()
    tower.train()
    assert torch.allclose(tower(pixels)[:2], tower(pixels[:2]), atol=1e-5)
    assert torch.equal(before, tower.get_submodule(names[0]).get_buffer("running_mean"))


def test_locking_freezes_the_statistics_of_locked_layers_alone():
    tower = make("timm:test_resnet", image_size=32)
    every = batch_norm_layers(tower)
    tower.lock(unlocked_groups=1, freeze_bn_stats=True)
    left = batch_norm_layers(tower)
    assert 0 <= len(left) < len(every)
    assert all(tower.get_parameter(f"{name}.weight").requires_grad for name in left)


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for checkpointing in (False, True):
        tower = make("vit:32x2/8", image_size=32).train()
        tower.set_grad_checkpointing(checkpointing)
        tower(images(32)).square().sum().backward()
        found.append(tower.trunk.get_parameter("patch_embed.proj.weight").grad)
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_heads_divide_the_width():
    assert [num_heads_for(width) for width in (64, 192, 100, 96, 7)] == [1, 3, 1, 1, 1]
    assert all(width % num_heads_for(width) == 0 for width in range(1, 700))


@pytest.mark.parametrize(
    ("tower", "options", "message"),
    [
        ("timm:vit_tiny_patch16_225", {}, "did you mean vit_tiny_patch16_224"),
        ("timm:test_convnext", {"registers": 4}, "does not take all of reg_tokens"),
        ("timm:test_convnext", {"pooling": "token"}, "has no class token"),
        ("timm:halonet26t", {"image_size": 64}, "--image-size 256"),
        ("timm:test_vit", {"poling": "avg"}, "did you mean 'pooling'"),
        ("timm:test_vit", {"pooling": "simpool", "gamma": 0.0}, "gamma above 0"),
        ("timm:test_vit", {"pooling": "queries", "rows": 0}, "at least one row"),
        ("vit:32x1", {}, "vit:WIDTHxDEPTH/PATCH"),
        ("vit:32x1/8", {"image_size": 33}, "multiple of the patch"),
        ("timm:test_vit", {"tokens": 64}, "name one of timm's naflexvit"),
        (NAFLEX, {"tokens": 12, "image_size": 224}, "makes the canvas 64 pixels, not 224"),
        (NAFLEX, {"tokens": 12, "pooling": "avg"}, "for the trunk's own pooling and no decoder"),
        ("hf:nowhere", {}, "neither a folder nor a model type"),
        ("hf:pvt", {"registers": 2}, "choose a timm tower"),
    ],
)
def test_what_cannot_be_built_is_said(tower, options, message):
    with pytest.raises(UsageError, match=message):
        make(tower, **options)


def test_dinat_asks_for_natten_where_it_is_missing():
    pytest.importorskip("transformers")
    try:
        import natten  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(UsageError, match="natten"):
            make("hf:dinat")


def test_a_hugging_face_tower_puts_the_class_token_first():
    small = {"embed_dim": [8, 16, 24], "depth": [1, 2, 3], "num_heads": [1, 1, 1]}
    tower = make("hf:cvt", image_size=32, hf_config={"model_type": "cvt", **small}).eval()
    assert [str(layout) for layout in tower.trunk_info.layouts] == ["tokens 1+4×24"]
    with torch.no_grad():
        states = tower.trunk(images(32))
        assert torch.allclose(tower(images(32)), tower.head(states.cls_token_value[:, 0]), atol=1e-6)


def test_the_configuration_of_a_tower_is_read_strictly():
    with pytest.raises(UsageError, match="pooling = 'mean' does not fit"):
        read_image_config({"tower": "timm:test_vit", "image_size": 64, "pooling": "mean"})
