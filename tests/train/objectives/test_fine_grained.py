import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from vlm.train.objectives.fine_grained import (
    GROUPING,
    grouping,
    joint_sub_captions,
    sparc,
    sparse_weights,
    sub_captions,
)
from vlm.train.objectives.loss_term import LossOptions
from vlm.train.run_config import ObjectiveConfig

OPTIONS = LossOptions(config=ObjectiveConfig(), pad_token=0)
BATCH, SENTENCES, WIDTH, PATCHES = 5, 3, 6, 7


def options(**changes):
    return dataclasses.replace(OPTIONS, config=dataclasses.replace(OPTIONS.config, **changes))


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def case():
    """Five images with 3, 1, 2, 0 and 3 sentences, of which the absent ones are not always the last."""
    is_there = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    sub_tokens = torch.where(is_there[..., None], torch.tensor([4, 9, 2, 0]), 0)
    outputs = {
        "image_features": F.normalize(values(BATCH, WIDTH, seed=0), dim=-1),
        "sub_features": F.normalize(values(BATCH, SENTENCES, WIDTH, seed=1), dim=-1) * is_there[..., None],
        "patch_features": values(BATCH, PATCHES, WIDTH, seed=2),
        "logit_scale": torch.tensor(3.0, dtype=torch.float64),
        "grouping_scale": torch.tensor(5.0, dtype=torch.float64),
    }
    return outputs, {"sub_tokens": sub_tokens}, is_there


SUB_CAPTIONS = pytest.mark.parametrize(("term", "is_joint"), [(sub_captions, False), (joint_sub_captions, True)])


def slow_sub_captions(outputs, is_there, is_joint, same=lambda one, other: False):
    images, sentences, scale = (outputs[name] for name in ("image_features", "sub_features", "logit_scale"))

    def exponential(one, other):
        return math.exp(float(scale * (one @ other)))

    total, counted = 0.0, 0
    for own in range(BATCH):
        mine = [place for place in range(SENTENCES) if is_there[own, place]]
        others = [row for row in range(BATCH) if row != own and not same(own, row)]
        counted += bool(mine)
        for place in mine:
            hit = exponential(images[own], sentences[own, place])
            wrong_texts = sum(
                exponential(images[own], sentences[row, other])
                for row in others
                for other in range(SENTENCES)
                if is_there[row, other] and (is_joint or other == place)
            )
            wrong_images = sum(exponential(images[row], sentences[own, place]) for row in others)
            total -= (math.log(hit / (hit + wrong_texts)) + math.log(hit / (hit + wrong_images))) / 2 / len(mine)
    return total / counted


@SUB_CAPTIONS
def test_sub_captions_are_their_definition(case, term, is_joint):
    outputs, inputs, is_there = case
    found = term(outputs, inputs, OPTIONS)
    assert float(found) == pytest.approx(slow_sub_captions(outputs, is_there, is_joint), rel=1e-12)


def test_sub_captions_are_the_mean_of_the_contrastive_losses_of_their_places(case):
    from open_clip.loss import ClipLoss

    outputs, inputs, _ = case
    outputs["sub_features"] = F.normalize(values(BATCH, SENTENCES, WIDTH, seed=5), dim=-1)
    inputs["sub_tokens"] = torch.ones(BATCH, SENTENCES, 4, dtype=torch.int64)
    places = [
        ClipLoss()(outputs["image_features"], outputs["sub_features"][:, place], outputs["logit_scale"])
        for place in range(SENTENCES)
    ]
    assert torch.allclose(sub_captions(outputs, inputs, OPTIONS), torch.stack(places).mean(), atol=1e-12)
    assert joint_sub_captions(outputs, inputs, OPTIONS) > sub_captions(outputs, inputs, OPTIONS) + 0.5


@SUB_CAPTIONS
@pytest.mark.parametrize("same_pairs", ["ignore", "positive"])
def test_images_that_share_an_identity_are_no_negatives(case, same_pairs, term, is_joint):
    outputs, inputs, is_there = case
    inputs["same"] = torch.tensor([[1, 0], [2, 8], [1, 0], [3, 8], [4, 0]])
    found = term(outputs, inputs, options(same_pairs=same_pairs))
    alike = {(0, 2), (2, 0), (1, 3), (3, 1)}
    assert float(found) == pytest.approx(
        slow_sub_captions(outputs, is_there, is_joint, lambda one, other: (one, other) in alike), rel=1e-12
    )


@pytest.mark.parametrize("term", [sub_captions, joint_sub_captions])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_blocks_change_neither_value_nor_gradients(case, block, term):
    outputs, inputs, _ = case

    def run(block):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in outputs.items()}
        loss = term(leaves, inputs, options(similarity_block=block))
        read = ("image_features", "sub_features", "logit_scale")
        return loss, *torch.autograd.grad(loss, [leaves[name] for name in read])

    for one, other in zip(run(block), run(1024), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("term", [sub_captions, joint_sub_captions])
def test_with_one_sentence_each_it_is_the_softmax_contrastive_loss(case, term):
    from open_clip.loss import ClipLoss

    outputs, inputs, _ = case
    outputs["sub_features"] = F.normalize(values(BATCH, 1, WIDTH, seed=5), dim=-1)
    inputs["sub_tokens"] = torch.ones(BATCH, 1, 4, dtype=torch.int64)
    wanted = ClipLoss()(outputs["image_features"], outputs["sub_features"][:, 0], outputs["logit_scale"])
    assert torch.allclose(term(outputs, inputs, OPTIONS), wanted, atol=1e-12)


@pytest.mark.parametrize("term", [sub_captions, joint_sub_captions, grouping, sparc])
def test_absent_sentences_have_no_part_and_a_batch_without_any_is_nothing(case, term):
    outputs, inputs, is_there = case
    before = term(outputs, inputs, OPTIONS)
    noise = values(BATCH, SENTENCES, WIDTH, seed=9)
    outputs["sub_features"] = torch.where(is_there[..., None], outputs["sub_features"], noise).requires_grad_()
    after = term(outputs, inputs, OPTIONS)
    assert torch.allclose(before, after, atol=1e-12)
    (gradient,) = torch.autograd.grad(after, outputs["sub_features"])
    assert not gradient[~is_there].any()
    assert not term(outputs, {"sub_tokens": torch.zeros_like(inputs["sub_tokens"])}, OPTIONS).any()


def test_a_single_image_has_finite_gradients(case):
    outputs, inputs, _ = case
    leaves = {
        name: (tensor[:1] if tensor.ndim else tensor).clone().requires_grad_() for name, tensor in outputs.items()
    }
    loss = sub_captions(leaves, {"sub_tokens": inputs["sub_tokens"][:1]}, OPTIONS)
    for term in (joint_sub_captions, grouping, sparc):
        loss = loss + term(leaves, {"sub_tokens": inputs["sub_tokens"][:1]}, OPTIONS)
    for gradient in torch.autograd.grad(loss, list(leaves.values())):
        assert torch.isfinite(gradient).all()


def slow_groups(patches, sentences, threshold):
    """The group of each sentence, of unit length."""
    groups = []
    for sentence in sentences:
        products = [float(sentence @ patch) for patch in patches]
        stretched = [(one - min(products)) / (max(products) - min(products)) for one in products]
        kept = [one if one >= threshold else 0.0 for one in stretched]
        group = sum((one * patch for one, patch in zip(kept, patches, strict=True)), torch.zeros(WIDTH).double())
        groups.append(group / sum(kept) / (group / sum(kept)).norm())
    return groups


def slow_grouping(outputs, is_there, *, is_sparc, threshold=0.1):
    total = 0.0
    for patches, sentences, there in zip(outputs["patch_features"], outputs["sub_features"], is_there, strict=True):
        mine = [sentence for sentence, is_present in zip(sentences, there, strict=True) if is_present]
        if is_sparc:
            groups, scale = slow_groups(patches, mine, 1 / PATCHES), float(outputs["logit_scale"])
        else:
            patches = [patch / patch.norm() for patch in patches]
            groups, scale = slow_groups(patches, mine, threshold), float(outputs["grouping_scale"])
        scaled = [[math.exp(scale * float(group @ sentence)) for group in groups] for sentence in mine]
        for place, row in enumerate(scaled):
            by_sentence = math.log(row[place] / sum(row))
            by_group = math.log(row[place] / sum(other[place] for other in scaled))
            total -= ((by_sentence + by_group) / 2 if is_sparc else by_sentence) / len(mine)
    return total


def test_grouping_is_its_definition(case):
    outputs, inputs, is_there = case
    for threshold in (0.0, 0.1, 0.6):
        wanted = slow_grouping(outputs, is_there, is_sparc=False, threshold=threshold)
        found = grouping(outputs, inputs, options(patch_threshold=threshold))
        assert float(found) == pytest.approx(wanted, rel=1e-12)
    assert int(GROUPING.normaliser(inputs, OPTIONS)) == 3


def test_sparcs_form_is_its_definition(case):
    outputs, inputs, is_there = case
    wanted = slow_grouping(outputs, is_there, is_sparc=True)
    assert float(sparc(outputs, inputs, OPTIONS)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("term", "scale"), [(grouping, "grouping_scale"), (sparc, "logit_scale")])
def test_parts_of_a_batch_add_up_to_its_gradients(case, term, scale):
    outputs, inputs, _ = case
    read = ("patch_features", "sub_features", scale)

    def gradients(parts):
        leaves = {name: outputs[name].clone().requires_grad_() for name in read}
        for rows in parts:
            part = {name: leaves[name] if name == scale else leaves[name][rows] for name in read}
            term(part, {"sub_tokens": inputs["sub_tokens"][rows]}, OPTIONS).backward()
        return [leaves[name].grad for name in read]

    for one, other in zip(gradients([slice(0, 5)]), gradients([slice(0, 2), slice(2, 5)]), strict=True):
        assert torch.allclose(one, other, atol=1e-14)


def test_patches_that_are_all_alike_weigh_the_same():
    assert torch.equal(sparse_weights(torch.full((1, 2, 4), 3.0), 0.1), torch.full((1, 2, 4), 0.25))


def test_grouping_finds_planted_groups(case):
    """Each sentence points where two patches do: they alone are kept, and the loss is as good as nothing."""
    sentences = torch.eye(6, dtype=torch.float64)[None, :3]
    patches = torch.cat([sentences, 2 * sentences], dim=1)
    scale = torch.tensor(100.0)
    outputs = {
        "sub_features": sentences,
        "patch_features": patches,
        "logit_scale": scale,
        "grouping_scale": scale,
    }
    weights = sparse_weights(sentences @ patches.mT, 0.1)
    assert torch.equal(weights[0] > 0, torch.eye(3, dtype=torch.bool).repeat(1, 2))
    for term in (grouping, sparc):
        assert float(term(outputs, {"sub_tokens": torch.ones(1, 3, 4, dtype=torch.int64)}, OPTIONS)) < 1e-6
