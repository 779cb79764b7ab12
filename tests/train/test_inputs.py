import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vlm.data.tokenizers import open_tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError
from vlm.models.model import VisionLanguageModel, build_network, model_config, normalise
from vlm.train.step_inputs import EMATeacher, OnlineTeacher, resize_images


def model_of(seed=0, size=32, **view) -> Any:
    torch.manual_seed(seed)
    config = model_config("micro")
    config["vision_cfg"]["image_size"] = size
    config["text_cfg"]["vocab_size"] = 49408
    return VisionLanguageModel(
        name="micro",
        network=build_network(config),
        config=config,
        view=EvalTransform(size=size, **view),
        tokenizer=open_tokenizer("clip", 24),
    )


def images(count=3, size=32):
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), generator=draw, dtype=torch.uint8)


CAPTIONS = ("a red star", "two boats", "a blue star over a lake")


def test_a_live_teacher_embeds_as_the_model_does():
    model = model_of()
    made = OnlineTeacher(model)(images(), CAPTIONS)
    assert torch.allclose(made["teacher_image"], model.embed_images(images()), atol=1e-6)
    assert torch.allclose(made["teacher_text"], model.embed_texts(CAPTIONS), atol=1e-6)


def test_its_embeddings_can_be_learned_from():
    """They are constants that autograd may keep, unlike tensors of inference mode."""
    made = OnlineTeacher(model_of())(images(), CAPTIONS)
    student = torch.ones(3, 16, requires_grad=True)
    (student * made["teacher_image"]).sum().backward()
    assert student.grad is not None
    assert torch.equal(student.grad, made["teacher_image"])
    assert not made["teacher_text"].requires_grad


def test_images_come_to_its_size_and_statistics():
    model = model_of(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bilinear")
    made = OnlineTeacher(model)(images(), CAPTIONS)
    small = F.interpolate(images().float(), size=(16, 16), mode="bilinear", antialias=True).round() / 255
    wanted = model.network.encode_image((small - 0.5) / 0.25)
    assert torch.allclose(made["teacher_image"], F.normalize(wanted, dim=-1), atol=1e-6)


def test_resizing_keeps_bytes_and_does_not_overflow():
    stripes = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert torch.equal(resize_images(stripes, 8, "bicubic"), stripes)
    grown = resize_images(stripes, 24, "bicubic")  # overshoots at the edges without clamping
    assert grown.dtype == torch.uint8
    assert int((grown.int()[..., :1, :] - grown.int()[..., 1:2, :]).abs().max()) == 0
    assert (int(grown.min()), int(grown.max())) == (0, 255)


def test_the_average_teacher_is_the_network_with_the_averaged_weights():
    model = model_of()
    other = model_of(seed=5).network
    weights = {name: tensor.detach() for name, tensor in other.state_dict().items()}
    before = copy.deepcopy(model.network.state_dict())
    made = EMATeacher(weights, model)(images(), CAPTIONS)["global_target"]
    wanted = other.eval().encode_image(normalise(images(), model.view))
    assert torch.allclose(made, F.normalize(wanted, dim=-1), atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items())
    assert not made.requires_grad


def test_it_follows_its_weights_and_runs_in_evaluation_mode():
    model = model_of()
    model.network.train()
    model.network.transformer.eval()
    weights = {name: tensor.detach().clone() for name, tensor in model.network.named_parameters()}
    teacher = EMATeacher(weights, model)
    first = teacher(images(), CAPTIONS)["global_target"]
    assert torch.equal(first, teacher(images(), CAPTIONS)["global_target"])  # no patches are dropped
    weights["visual.proj"].neg_()
    assert torch.allclose(teacher(images(), CAPTIONS)["global_target"], -first, atol=1e-6)
    assert model.network.visual.training
    assert not model.network.transformer.training


def test_weights_of_another_network_are_refused():
    with pytest.raises(UsageError, match=r"no heads\.mask"):
        EMATeacher({"heads.mask": torch.zeros(1)}, model_of())
