import json
from typing import Any

import open_clip
import pytest
import torch

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.models.load import load_model_folder, save_model_folder
from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer, model_config
from vlm.models.towers.tower_registry import set_dropout

TEXTS = ["a small red circle", "two large blue stars on a white background"]
CPU = torch.device("cpu")


@pytest.fixture
def open_model(scene_tokenizer):
    """A function that makes a model by the name of its towers."""

    def make(name, size=0, **vision):
        tokenizer = open_tokenizer(str(scene_tokenizer), 24)
        config = fit_to_tokenizer(model_config(name), tokenizer)
        config["vision_cfg"] |= ({"image_size": size} if size else {}) | vision
        torch.manual_seed(0)
        side = config["vision_cfg"]["image_size"]
        view = EvalTransform(size=side)
        network = build_network(config).eval()
        return VisionLanguageModel(name="test", network=network, config=config, view=view, tokenizer=tokenizer)

    return make


def images(size, number=2):
    return torch.randint(0, 255, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def save_language_model(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids: dict[str, Any] = {"vocab_size": 400, "bos_token_id": 398, "eos_token_id": 399}
    GPT2LMHeadModel(GPT2Config(**ids, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(folder)


def test_a_network_of_towers_has_the_interface_of_clip(open_model):
    model = open_model("timm:test_vit+bag@16", 32)
    tokens = torch.from_numpy(model.tokenizer.encode(TEXTS))
    pixels = torch.randn(2, 3, 32, 32)
    outputs = model.network(pixels, tokens)
    assert set(outputs) == {"image_features", "text_features", "logit_scale"}
    assert torch.allclose(outputs["image_features"], model.network.encode_image(pixels, normalize=True))
    assert torch.allclose(outputs["text_features"].norm(dim=1), torch.ones(2))
    assert outputs["text_features"].shape == (2, 16)
    assert float(outputs["logit_scale"].detach()) == pytest.approx(1 / 0.07)
    biased = build_network(model.config | {"init_logit_bias": -10.0})
    assert float(biased(pixels, tokens)["logit_bias"].detach()) == -10


@pytest.mark.parametrize("name", ["micro", "micro-coca", "timm:test_vit+transformer:32x1", "timm:test_vit+bag"])
def test_an_objective_can_give_any_network_a_bias(name):
    network: Any = build_network(model_config(name))
    assert network.logit_bias is None
    network.register_parameter("logit_bias", torch.nn.Parameter(torch.tensor(-3.0)))
    assert "logit_bias" in network.state_dict()


@pytest.mark.parametrize(
    ("name", "size", "vision"),
    [
        ("timm:test_vit,pooling=simpool,registers=2+ngram,hidden=16@16", 32, {}),
        ("timm:test_convnext,pooling=queries+bag@16", 64, {}),
        ("vit:32x1/8,positions=sine,pooling=map+transformer:32x1@16", 32, {}),
        ("hf:vit+hf:bert", 32, {}),
        ("timm:test_vit+lm", 32, {}),
    ],
)
def test_a_loaded_model_of_towers_is_the_saved_one(name, size, vision, open_model, tmp_path):
    if name.endswith("lm"):
        save_language_model(tmp_path / "lm")
        name = f"{name}:{tmp_path / 'lm'}"
    if name.startswith("hf"):
        from transformers import BertConfig, BertModel, ViTConfig, ViTModel

        layers: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
        }
        ViTModel(ViTConfig(**layers, patch_size=8, image_size=32)).save_pretrained(tmp_path / "image")
        BertModel(BertConfig(**layers, vocab_size=400)).save_pretrained(tmp_path / "text")
        name = f"hf:{tmp_path / 'image'}+hf:{tmp_path / 'text'}@16"
    model = open_model(name, size, **vision)
    save_model_folder(tmp_path / "model", model, inputs={})
    for folder in ("image", "text"):
        if (tmp_path / folder).is_dir():
            (tmp_path / folder).rename(tmp_path / f"{folder}-moved")  # the model folder needs it no more
    loaded = load_model_folder(tmp_path / "model", CPU, torch.float32)
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.embed_texts(TEXTS), model.embed_texts(TEXTS))
    assert torch.equal(loaded.embed_images(images(size)), model.embed_images(images(size)))


def test_the_space_follows_the_frozen_language_model(open_model, tmp_path):
    save_language_model(tmp_path / "lm")
    model = open_model(f"timm:test_vit+lm:{tmp_path / 'lm'}@16", 32)
    before = model.fingerprint
    weights = tmp_path / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert open_model(f"timm:test_vit+lm:{tmp_path / 'lm'}@16", 32).fingerprint != before


@pytest.mark.parametrize("name", ["timm:test_convnext+transformer:32x1@16", "timm:test_vit+transformer:32x1@16"])
def test_what_open_clip_can_say_is_said_so_that_it_loads_the_folder(name, open_model, tmp_path):
    model = open_model(name)
    save_model_folder(tmp_path, model, inputs={})
    saved = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert "tower" not in saved["model_cfg"]["vision_cfg"]
    opened: Any = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs = opened[0].eval()
    tokens = torch.from_numpy(model.tokenizer.encode(TEXTS))
    with torch.no_grad():
        pixels = torch.randn(2, 3, model.view.size, model.view.size)
        assert torch.allclose(theirs.encode_image(pixels), model.network.encode_image(pixels), atol=1e-5)
        assert torch.allclose(theirs.encode_text(tokens), model.network.encode_text(tokens), atol=1e-5)
    assert load_model_folder(tmp_path, CPU, torch.float32).fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("timm:test_vit+transformer:32x1@16", 32),  # another size than timm's own
        ("timm:test_convnext,pooling=simpool+transformer:32x1@16", 0),
        ("timm:test_vit+bag@16", 0),
    ],
)
def test_what_open_clip_cannot_say_names_our_towers_and_open_clip_refuses_it(name, size, open_model, tmp_path):
    save_model_folder(tmp_path, open_model(name, size), inputs={})
    saved = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    assert saved["vision_cfg"]["tower"].startswith("timm:")
    with pytest.raises(TypeError, match="tower"):
        open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")


def test_a_learned_bias_is_saved_so_that_it_loads(open_model, tmp_path):
    model = open_model("micro")
    model.network.register_parameter("logit_bias", torch.nn.Parameter(torch.tensor(-3.0)))
    save_model_folder(tmp_path, model, inputs={})
    loaded = load_model_folder(tmp_path, CPU, torch.float32)
    assert float(loaded.network.get_parameter("logit_bias").detach()) == -3
    theirs: Any = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[0]
    assert float(theirs.logit_bias.detach()) == -3


@pytest.mark.parametrize(
    ("name", "key", "where"),
    [
        ("timm:test_vit+bag", {"dropout": 0.5}, ("vision_cfg", "dropout")),
        ("timm:test_vit+bag", {"dropout": 0.5}, ("text_cfg", "dropout")),
        ("timm:test_convnext+transformer:32x1", {"drop_path": 0.5}, ("vision_cfg", "drop_path")),
        ("timm:test_vit+bag", {"patch_dropout": 0.5}, ("vision_cfg", "patch_dropout")),
        ("tiny", {"patch_dropout": 0.5}, ("vision_cfg", "patch_dropout")),
        ("small", {"drop_path": 0.5}, ("vision_cfg", "timm_drop_path")),
        ("small", {"dropout": 0.5}, ("vision_cfg", "timm_drop")),
    ],
)
def test_dropout_is_told_to_the_towers_that_have_it(name, key, where, open_model):
    config = set_dropout(model_config(name), **key)
    assert config[where[0]][where[1]] == 0.5
    assert set_dropout(config) == config
    network: Any = build_network(config).train()
    size = config["vision_cfg"]["image_size"]
    if where[0] == "vision_cfg":
        pixels = torch.randn(2, 3, size, size)
        assert not torch.equal(network.encode_image(pixels), network.encode_image(pixels))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny", "dropout"), ("tiny", "drop_path"), ("RN50", "patch_dropout"), ("hf:pvt+bag", "patch_dropout")],
)
def test_dropout_that_no_tower_has_is_refused(name, kind):
    with pytest.raises(UsageError, match=f"{kind} = 0.3: neither tower"):
        set_dropout(model_config(name), **{kind: 0.3})


def test_patch_dropout_of_a_convolutional_tower_is_refused_when_it_is_built():
    with pytest.raises(UsageError, match="patch_drop_rate"):
        build_network(set_dropout(model_config("timm:test_convnext+bag"), patch_dropout=0.5))


def test_names_of_towers_are_read():
    config = model_config("timm:test_vit,pooling=simpool,registers=4+ngram,hidden=64,orders=(1,2)@128")
    assert config == {
        "embed_dim": 128,
        "vision_cfg": {
            "tower": "timm:test_vit",
            "image_size": 160,
            "pooling": "simpool",
            "registers": 4,
            "gamma": 1.25,
        },
        "text_cfg": {"tower": "ngram", "hidden": 64, "orders": [1, 2]},
    }
    assert model_config("timm:test_convnext,pooling=simpool+bag")["vision_cfg"]["gamma"] == 2
    assert model_config("timm:test_convnext,pooling=simpool,gamma=1.5+bag")["vision_cfg"]["gamma"] == 1.5
    assert model_config("open_clip:ViT-B-32+bag")["vision_cfg"]["patch_size"] == 32
    assert model_config("vit:96x2/8+transformer:96x2")["text_cfg"] == {"width": 96, "heads": 3, "layers": 2}
    assert model_config("vit:96x2/8+bag")["embed_dim"] == 256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tim:test_vit+bag", "did you mean 'timm'"),
        ("timm:test_vit+bagg", "did you mean 'bag'"),
        ("timm:test_vti+bag", "test_vit"),
        ("timm:test_vit,pooling+bag", "write KEY=VALUE"),
        ("open_clip:ViT-B-31+bag", "ViT-B-32"),
    ],
)
def test_a_wrong_name_is_told_the_nearest(name, message):
    with pytest.raises(UsageError, match=message):
        model_config(name)


def test_locked_towers_do_not_move_and_the_others_do(open_model):
    network: Any = open_model("timm:test_vit+bag@16", 32).network
    network.visual.lock(unlocked_groups=0, freeze_bn_stats=True)
    network.text.lock(0)
    free = {name for name, each in network.named_parameters() if each.requires_grad}
    assert free == {"visual.head.proj.weight", "logit_scale"}


def test_gradient_checkpointing_that_a_tower_lacks_is_refused(open_model):
    open_model("vit:32x1/8+transformer:32x1", 32).network.set_grad_checkpointing(True)
    small = {"embed_dim": [16, 32], "num_heads": [1, 1], "depth": [[1, 1, 0]]}
    crossvit = open_model("timm:crossvit_tiny_240+bag", overrides=small).network
    with pytest.raises(UsageError, match="no gradient checkpointing"):
        crossvit.set_grad_checkpointing()
