"""A trained model at another image size."""

import dataclasses

import pytest
import torch

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.models.model import VisionLanguageModel, build_network, fit_to_tokenizer, model_config
from vlm.models.variants import with_image_size

LEARNED = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}


def make_model(**vision):
    tokenizer = open_tokenizer("clip", 16)
    config = fit_to_tokenizer(model_config("tiny"), tokenizer)
    config["vision_cfg"] = vision or LEARNED
    torch.manual_seed(0)
    size = config["vision_cfg"]["image_size"]
    return VisionLanguageModel(
        name="start", network=build_network(config).eval(), config=config, view=EvalTransform(size=size),
        tokenizer=tokenizer, device=torch.device("cpu"),
    )  # fmt: skip


def enlarge(images, times):
    return images.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)


def positions_of(model):
    return model.network.state_dict()["visual.positional_embedding"]


def test_learned_positions_are_interpolated_and_all_else_is_kept():
    model = make_model()
    larger = with_image_size(model, 64)
    assert larger.view.size == larger.config["vision_cfg"]["image_size"] == 64
    assert positions_of(larger).shape == (65, 32)
    assert torch.equal(positions_of(larger)[0], positions_of(model)[0])
    # the middle of the new grid lies between the four middle positions of the old one
    old, new = (positions_of(each)[1:].reshape(side, side, 32) for each, side in ((model, 4), (larger, 8)))
    assert torch.allclose(new[3:5, 3:5].mean((0, 1)), old[1:3, 1:3].mean((0, 1)), atol=0.05)
    kept = [name for name in model.network.state_dict() if name != "visual.positional_embedding"]
    assert all(torch.equal(larger.network.state_dict()[name], model.network.state_dict()[name]) for name in kept)
    assert larger.embed_images(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 128)
    assert model.view.size == 32


def test_sine_positions_are_those_of_the_new_grid():
    model = make_model(**LEARNED, pos_embed_type="sin_cos_2d")
    fresh = make_model(**(LEARNED | {"image_size": 64}), pos_embed_type="sin_cos_2d")
    assert torch.equal(positions_of(with_image_size(model, 64)), positions_of(fresh))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_towers_of_timm_follow(name):
    vision = {"timm_model_name": name, "timm_pool": "token" if name == "test_vit" else "avg", "timm_proj": "linear"}
    model = make_model(**vision, image_size=64)
    larger = with_image_size(model, 96)
    assert larger.embed_images(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)).shape == (2, 128)
    assert torch.equal(
        with_image_size(larger, 96).network.state_dict()["logit_scale"], model.network.state_dict()["logit_scale"]
    )


def test_a_network_that_keeps_its_size_elsewhere_is_refused():
    model = make_model()
    other = dataclasses.replace(model, config={"vision_cfg": {"model": "x"}})
    with pytest.raises(UsageError, match="start takes images of 32 px only; leave out --image-size"):
        with_image_size(other, 64)
