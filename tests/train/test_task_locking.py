from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm.errors import UsageError
from vlm.models.model import build_network, model_config
from vlm.train.task import freeze_unused_parameters, lock_tower

TOKENS = torch.tensor([[1, 9, 2, *[0] * 21], [1, 8, 2, *[0] * 21]])


def network_of(name="micro", vision=None, text=None) -> Any:
    torch.manual_seed(0)
    config = model_config(name)
    config["vision_cfg"] |= vision or {}
    config["text_cfg"] |= text or {}
    return build_network(config).train()


def timm_network(name="test_byobnet") -> Any:
    return network_of("small", vision={"timm_model_name": name}, text={"context_length": 24})


def step(network, size=32):
    """One step of plain gradient descent on the cosine of two pairs, in batch statistics where there are any."""
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    images, texts = network.encode_image(pixels), network.encode_text(TOKENS)
    (F.normalize(images, dim=-1) * F.normalize(texts, dim=-1)).sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return images, texts


def moved(network, run):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    run()
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("name", ["micro", "micro-coca"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_stays_and_the_other_moves(name, tower):
    network = network_of(name)
    assert lock_tower(network, tower) > 0
    changed = moved(network, lambda: step(network))
    of_images = {each for each in changed if each.startswith("visual.")}
    assert bool(of_images) == (tower == "text")
    assert bool(changed - of_images) == (tower == "image")


@pytest.mark.parametrize("name", ["micro", "micro-coca"])
def test_no_graph_is_built_through_a_locked_tower(name):
    network = network_of(name)
    lock_tower(network, "image")
    images, texts = network.encode_image(torch.zeros(2, 3, 32, 32)), network.encode_text(TOKENS)
    assert not images.requires_grad
    assert texts.requires_grad


@pytest.mark.parametrize(
    ("groups", "kept"),
    [(1, ("visual.proj",)), (2, ("visual.proj", "visual.ln_post", "visual.transformer.resblocks.1"))],
)
def test_the_last_groups_of_the_image_tower_are_trained(groups, kept):
    network = network_of(vision={"layers": 2})
    lock_tower(network, "image", groups)
    changed = {each for each in moved(network, lambda: step(network)) if each.startswith("visual.")}
    assert changed
    assert all(each.startswith(kept) for each in changed)


@pytest.mark.parametrize("name", ["micro", "micro-coca"])
def test_the_last_groups_of_the_text_tower_are_trained(name):
    network = network_of(name)
    lock_tower(network, "text", 1)
    changed = {each for each in moved(network, lambda: step(network)) if not each.startswith("visual.")}
    assert {each.split(".")[-1] for each in changed} == {"text_projection"}


def test_positions_that_were_fixed_stay_so_when_their_group_is_unlocked():
    network = network_of(vision={"pos_embed_type": "sin_cos_2d"})
    lock_tower(network, "image", 9)
    assert not network.visual.positional_embedding.requires_grad
    assert network.visual.conv1.weight.requires_grad


def test_a_locked_timm_tower_keeps_weights_and_statistics_but_not_its_projection():
    network = timm_network()
    wanted = network.eval().encode_image(torch.ones(2, 3, 64, 64))
    network.train()
    lock_tower(network, "image")
    changed = moved(network, lambda: step(network, 64))
    assert {each for each in changed if each.startswith("visual.")} == {"visual.head.proj.weight"}
    network.visual.head.proj.weight.data.copy_(timm_network().visual.head.proj.weight)
    assert torch.allclose(network.train().encode_image(torch.ones(2, 3, 64, 64)), wanted, atol=1e-6)


def test_the_last_groups_of_a_timm_tower_move_with_their_statistics():
    network = timm_network()
    lock_tower(network, "image", 2)
    changed = {each for each in moved(network, lambda: step(network, 64)) if each.startswith("visual.trunk")}
    assert changed
    assert any("running_mean" in each for each in changed)
    assert not any(each.startswith(("visual.trunk.stem", "visual.trunk.stages.0")) for each in changed)


def test_a_tower_that_is_only_locked_whole_says_so():
    network = network_of(vision={"layers": [1, 1, 1, 1], "width": 16, "head_width": 16})
    with pytest.raises(UsageError, match="unlocked_groups = 1: partial locking not currently supported"):
        lock_tower(network, "image", 1)
    changed_by = network_of(vision={"layers": [1, 1, 1, 1], "width": 16, "head_width": 16})
    lock_tower(changed_by, "image")
    assert not {each for each in moved(changed_by, lambda: step(changed_by)) if each.startswith("visual.")}


def test_what_no_output_depends_on_is_frozen_and_nothing_else():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.shared = (torch.nn.Linear(2, 2) for _ in range(3))
            self.spare = torch.nn.Parameter(torch.zeros(()))
            self.fixed = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, inputs):
            shared = checkpoint(self.shared, inputs["x"], use_reentrant=False)
            return {"a": self.one(shared), "b": self.other(shared), "spare": self.spare}

    network = Two().train()
    network.other.eval()
    assert set(freeze_unused_parameters(network, {"x": torch.ones(1, 2)}, ["a"])) == {
        "other.weight",
        "other.bias",
        "spare",
    }
    assert network.shared.weight.requires_grad
    assert network.training
    assert not network.other.training
    assert freeze_unused_parameters(Two(), {"x": torch.ones(1, 2)}, ["a", "b", "spare"]) == []
