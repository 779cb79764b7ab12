"""What is learnt from the embeddings of another model."""

from typing import Any, cast

import pytest
import torch

from tests.train.objectives.pair_case import batch, options, slow_loss, unit, value_and_gradients
from vlm.errors import UsageError
from vlm.train.objectives.distillation import alignment_head, distill, text_align
from vlm.train.run_config import ObjectiveConfig


@pytest.mark.parametrize("block", [2, 100])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_distillation_is_its_definition(count, block):
    outputs, inputs = batch(count)
    config = {"teacher_scale": 5.0, "similarity_block": block}
    wanted = slow_loss("distill", outputs, inputs, ObjectiveConfig(**config))
    assert float(value_and_gradients("distill", outputs, inputs, **config)[0]) == pytest.approx(wanted, abs=1e-12)


def test_it_is_zero_without_gradient_where_student_and_teacher_agree():
    outputs, inputs = batch(6)
    inputs["teacher_image"] = outputs["image_features"].detach()
    inputs["teacher_text"] = outputs["text_features"].detach()
    loss, *gradients = value_and_gradients("distill", outputs, inputs, teacher_scale=3.0)
    assert float(loss) == pytest.approx(0, abs=1e-14)
    assert all(float(gradient.abs().max()) < 1e-14 for gradient in gradients)


def test_the_length_of_the_teachers_rows_has_no_part_and_they_get_no_gradient():
    outputs, inputs = batch(5)
    wanted = value_and_gradients("distill", outputs, inputs)
    longer = inputs | {"teacher_image": (7 * inputs["teacher_image"]).requires_grad_()}
    found = value_and_gradients("distill", outputs, longer)
    assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(found, wanted, strict=True))
    assert torch.autograd.grad(distill(outputs, longer, options()), longer["teacher_image"], allow_unused=True) == (
        None,
    )


def test_stored_half_precision_teachers_are_compared_in_single():
    outputs, inputs = batch(5)
    singles = {name: value.detach().float() for name, value in outputs.items()}
    halves = {name: inputs[name].half() for name in ("teacher_image", "teacher_text")}
    found = distill(singles, halves, options())
    assert found.dtype == torch.float32
    assert torch.equal(found, distill(singles, {name: rows.float() for name, rows in halves.items()}, options()))


def test_alignment_is_one_minus_the_cosine_summed_over_rows():
    projected, target = 3 * unit(4, 0), 2 * unit(4, 1)
    wanted = sum(1 - float(projected[row] @ target[row]) / 6 for row in range(4))
    found = text_align({"aligned_image": projected}, {"text_embedding": target}, options())
    assert float(found) == pytest.approx(wanted, abs=1e-12, rel=0)
    halves = [
        text_align({"aligned_image": projected[rows]}, {"text_embedding": target[rows]}, options())
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert float(sum(halves)) == pytest.approx(wanted, abs=1e-12, rel=0)


def test_alignment_names_the_size_that_is_stored():
    with pytest.raises(UsageError, match="text-embedding-size 5"):
        text_align({"aligned_image": unit(2, 0)}, {"text_embedding": unit(2, 0, width=5)}, options())


def test_the_head_maps_embeddings_to_the_stored_length(small_embedder):
    heads = alignment_head(small_embedder, options(text_embedding_size=9))
    assert heads["text_align"](torch.zeros(2, 16)).shape == (2, 9)
    with pytest.raises(UsageError, match="text_embedding_size = 0"):
        alignment_head(small_embedder, options())


@pytest.fixture
def small_embedder():
    """A model of 16-number embeddings."""
    from vlm.data.tokenizers import open_tokenizer
    from vlm.data.transforms import EvalTransform
    from vlm.models.model import VisionLanguageModel

    return VisionLanguageModel(
        name="small",
        network=cast(Any, torch.nn.Identity()),
        config={"embed_dim": 16},
        view=EvalTransform(size=32),
        tokenizer=open_tokenizer("clip", 10),
    )
