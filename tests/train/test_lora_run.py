"""Adapters: only they are trained, they are merged on export, and a run goes on exactly where it stopped."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlm.errors import UsageError
from vlm.models.load import load_model
from vlm.models.low_rank import LowRank, add_adapters, merge_adapters
from vlm.models.model import build_network, fit_to_tokenizer, model_config
from vlm.train.checkpoint.checkpoint_files import list_checkpoints
from vlm.train.run import train

pytest.importorskip("peft")

ARCHITECTURES = ("tiny", "timm:test_efficientnet,image_size=32+bag@16", "vit:64x1/8,image_size=32+bag@16")


def network_of(architecture: str, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = fit_to_tokenizer(model_config(architecture), tokenizer)
    return build_network(config).eval(), config


@pytest.fixture
def tokenizer(scene_tokenizer):
    from vlm.data.tokenizers import open_tokenizer

    return open_tokenizer(str(scene_tokenizer), 16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_change_nothing_at_first_then_learn_alone_and_are_merged(architecture, tokenizer):
    network, config = network_of(architecture, tokenizer)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pixels = torch.randn(4, 3, 32, 32)
    tokens = torch.from_numpy(tokenizer.encode(["a red star", "two blue circles", "a", "b"]))
    start = network.encode_image(pixels).detach()
    settings = LowRank(rank=4, alpha=8)
    add_adapters(network, settings)
    assert torch.allclose(network.encode_image(pixels), start, atol=1e-5)
    network.train()
    trained = [parameter for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, trained)) < 0.5 * sum(map(torch.numel, network.parameters()))
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(3):
        (network.encode_image(pixels).sum() + network.encode_text(tokens).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    image, text = network.encode_image(pixels), network.encode_text(tokens)
    assert (image - start).norm() > 0.01 * start.norm()
    # frozen is frozen, bit for bit, statistics of batch norms included
    after = network.state_dict()
    for name, tensor in after.items():
        if "lora_" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name
    plain_config = merge_adapters(network, config | settings.to_config())
    plain = build_network(plain_config).eval()
    plain.load_state_dict(network.state_dict())
    assert (plain.encode_image(pixels) - image).norm() < 1e-4 * image.norm()
    assert (plain.encode_text(tokens) - text).norm() < 1e-4 * text.norm()


def test_the_product_of_an_attention_is_added_once(tokenizer):
    network, config = network_of("tiny", tokenizer)
    add_adapters(network, LowRank(rank=2, alpha=6, towers=("visual",)))
    attention = network.visual.transformer.resblocks[0].attn
    frozen = attention.base_layer.out_proj.weight.clone()
    torch.nn.init.normal_(attention.lora_B["out_proj"].weight)
    product = attention.lora_B["out_proj"].weight @ attention.lora_A["out_proj"].weight
    merge_adapters(network, config)
    assert torch.allclose(network.visual.transformer.resblocks[0].attn.out_proj.weight, frozen + 3 * product, atol=1e-6)
    # the other tower has none
    assert not any("lora" in name for name in network.state_dict())


@pytest.fixture
def start(configure) -> str:
    config = configure("start", steps=4)
    train(config)
    return config.run


def tuning(configure, start: str, name: str, **changes: Any) -> Any:
    model = {"start_from": start, "lora_rank": 4, "tokenizer": "clip", "image_size": 0, "context_length": 0}
    return configure(name, model=model | changes.pop("model", {}), optimizer={"learning_rate": 0.02}, **changes)


def test_a_resumed_run_ends_with_the_same_model_in_the_format_of_its_start(configure, start, history, tmp_path):
    whole = tuning(configure, start, "whole", steps=8)
    train(whole)
    # killed after step 4: only that checkpoint is left
    stopped = tuning(configure, start, "stopped", steps=8)
    train(stopped)
    for checkpoint in list_checkpoints(Path(stopped.run) / "checkpoints"):
        if not checkpoint.name.endswith("4"):
            shutil.rmtree(checkpoint)
    (Path(stopped.run) / "manifest.json").unlink()
    train(stopped, resume=True)
    assert history(stopped.run) == history(whole.run)
    weights = [load_file(Path(run) / "model/open_clip_model.safetensors") for run in (start, whole.run, stopped.run)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
    changed = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert any("attn.in_proj_weight" in name for name in changed)
    assert not any("ln_" in name or "embedding" in name for name in changed)


def test_a_checkpoint_is_read_with_its_adapters_merged(configure, start):
    config = tuning(configure, start, "run", steps=4)
    train(config)
    last = list_checkpoints(Path(config.run) / "checkpoints")[-1]
    final, checkpoint = load_model(config.run, device="cpu"), load_model(str(last), device="cpu")
    assert checkpoint.fingerprint == final.fingerprint
    assert "lora" not in checkpoint.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"start_from": ""}}, "--start-from"),
        ({"model": {"lock": "both"}}, "--lock image or text"),
        ({"sharding": "fsdp"}, "fsdp"),
    ],
)
def test_adapters_that_cannot_work_are_refused(configure, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(tuning(configure, "a model", "run", **changes))
    assert not (tmp_path / "run").exists()
