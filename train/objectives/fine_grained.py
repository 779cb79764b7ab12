"""Sentences of long captions: each a positive of its image, and each matched with its patches (DreamLIP, SPARC)."""

import torch
from torch.nn import functional as F

from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Bool, Float, Tensor
from vlm.train.distributed import gather_detached, gather_with_gradient, local_columns, num_processes
from vlm.train.objectives.loss_term import (
    Heads,
    Inputs,
    LearnedScale,
    LossOptions,
    LossTerm,
    Outputs,
    at_least_float32,
    same_identity,
    similarity_matrix,
    sum_over_blocks,
)


def sub_captions(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Softmax contrastive learning with several texts an image, one of each image at a time (DreamLIP).

    The mean over k = 1 … S of the loss of `clip` between the images and their k-th sentences, which is what the code of
    Zheng et al. 2024 computes. Their images all have S sentences. Where some have fewer, a mean is over the image's
    sentences and then over the images that have any; an image without a k-th sentence is still a wrong one for those
    of others. Pairs that share an identity are not negatives of each other unless `same_pairs` is `negative`.
    """
    return _contrast_sentences(outputs, inputs, options, is_joint=False)


def joint_sub_captions(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """The same with the sentences of all other images at once as an image's negatives, S times as many.

    An image's own further sentences are ignored, neither right nor wrong. This form is ours.
    """
    return _contrast_sentences(outputs, inputs, options, is_joint=True)


def _contrast_sentences(outputs: Outputs, inputs: Inputs, options: LossOptions, *, is_joint: bool) -> Tensor:
    images = at_least_float32(outputs["image_features"])
    sentences = at_least_float32(outputs["sub_features"])
    scale = outputs["logit_scale"]
    num_sentences = sentences.shape[1]
    is_present = sentence_mask(inputs, options)
    weights = _sentence_weights(is_present, images.dtype)

    all_images = gather_with_gradient(images)
    all_sentences = gather_with_gradient(sentences).flatten(0, 1)
    all_present = gather_detached(is_present)
    partners = local_columns(len(images), images.device)
    column_numbers = torch.arange(len(all_images), device=images.device)
    # without same_pairs each pair has an identity of its own; 0 would be none
    same = inputs["same"] if options.config.same_pairs != "negative" else partners[:, None] + 1
    all_same = gather_detached(same)

    def image_loss(rows: Tensor, partners: Tensor, same: Tensor, weights: Tensor) -> Tensor:
        logits = (scale * similarity_matrix(rows, all_sentences)).unflatten(1, (-1, num_sentences))
        is_other_image = ~same_identity(same, all_same) & (partners[:, None] != column_numbers)
        is_negative = is_other_image[..., None] & all_present
        masked = _mask_logits(logits, ~is_negative)
        negatives = masked.flatten(1).logsumexp(dim=1, keepdim=True) if is_joint else masked.logsumexp(dim=1)
        positives = logits[torch.arange(len(rows), device=rows.device), partners]
        # -log p of each sentence under the softmax over it and its negatives
        return (weights * (torch.logaddexp(negatives, positives) - positives)).sum()

    def sentence_loss(rows: Tensor, partners: Tensor, same: Tensor, weights: Tensor) -> Tensor:
        logits = (scale * similarity_matrix(rows.flatten(0, 1), all_images)).unflatten(0, rows.shape[:2])
        is_ignored = same_identity(same, all_same) & (partners[:, None] != column_numbers)
        log_probabilities = _mask_logits(logits, is_ignored[:, None]).log_softmax(dim=2)
        of_partners = log_probabilities[torch.arange(len(rows), device=rows.device), :, partners]
        return -(weights * of_partners).sum()

    # a row of images has num_sentences times the columns of a contrastive term
    block = max(1, options.config.rows_at_once(len(all_images)) // num_sentences)
    total = sum_over_blocks(image_loss, [images, partners, same, weights], block)
    total = total + sum_over_blocks(sentence_loss, [sentences, partners, same, weights], block)
    # the mean over images of all processes, which all have the same number; gradients are averaged afterwards
    return total / 2 * num_processes() / all_present.any(dim=1).sum().clamp(min=1)


GROUPING_SCALE = "grouping_scale"
"""Head that holds the inverse temperature of `grouping`, and the name of the output that gives it."""


def grouping(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Each sentence finds its own group of patches among those of the image's other sentences, summed over images.

    DreamLIP's form (Zheng et al. 2024, with the choices of its code): with patches v_p of unit length and
    sentences t_k, similarities v_p · t_k are stretched to 0 … 1 for each sentence, those below `patch_threshold` (0.1)
    dropped, and the rest are the weights with which patches are averaged to the group g_k, of unit length. The loss is
    -log softmax_j(τ g_j · t_k) at j = k, the mean over sentences: one direction, with a temperature τ of its own.
    Their repository leaves it open which contrast is meant: beside this one, inside the image, it calls one over the
    whole batch in both directions, with a temperature that its models leave undefined.
    """
    patches = F.normalize(at_least_float32(outputs["patch_features"]), dim=-1)
    sentences = at_least_float32(outputs["sub_features"])
    is_present = sentence_mask(inputs, options)
    # as in `similarity_matrix`: half precision is too coarse for logits
    with torch.autocast(patches.device.type, enabled=False):
        weights = sparse_weights(sentences @ patches.mT, options.config.patch_threshold)
        groups = F.normalize(weights @ patches, dim=-1)
        logits = outputs[GROUPING_SCALE] * (sentences @ groups.mT)
    log_probabilities = _mask_logits(logits, ~is_present[:, None]).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    return -(_sentence_weights(is_present, logits.dtype) * log_probabilities).sum()


def add_grouping_scale(model: VisionLanguageModel, options: LossOptions) -> Heads:
    """The temperature of `grouping`, at first CLIP's 0.07."""
    return {GROUPING_SCALE: LearnedScale()}


def sparc(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """SPARC's form of the same (Bica et al. 2024), with sentences in the place of its tokens.

    Patches keep their length in the average, the threshold is 1/P for P patches, and groups and sentences are
    contrasted inside the image in both directions, at the temperature of the contrastive term; the mean of both, of
    which the paper takes the sum.
    """
    patches = at_least_float32(outputs["patch_features"])
    sentences = at_least_float32(outputs["sub_features"])
    is_present = sentence_mask(inputs, options)
    with torch.autocast(patches.device.type, enabled=False):
        # 1/P is the weight of each patch if all were alike
        weights = sparse_weights(sentences @ patches.mT, 1 / patches.shape[1])
        groups = F.normalize(weights @ patches, dim=-1)
        logits = outputs["logit_scale"] * (groups @ sentences.mT)
    by_group = _mask_logits(logits, ~is_present[:, None]).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    by_sentence = _mask_logits(logits.mT, ~is_present[:, None]).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    return -(_sentence_weights(is_present, logits.dtype) * (by_group + by_sentence) / 2).sum()


def sparse_weights(similarity: Float[Tensor, "B S P"], threshold: float) -> Float[Tensor, "B S P"]:
    """The weight of each patch for a sentence: weights that sum to 1, many of them 0.

    If all patches are equally similar, they have equal weights.

    >>> sparse_weights(torch.tensor([[[0.0, 1.0, 2.0, 4.0]]]), 0.3).tolist()
    [[[0.0, 0.0, 0.3333333432674408, 0.6666666865348816]]]
    """
    lowest = similarity.amin(dim=-1, keepdim=True)
    highest = similarity.amax(dim=-1, keepdim=True)
    are_equal = highest == lowest
    stretched = (similarity - lowest) / (highest - lowest).masked_fill(are_equal, 1)
    stretched = stretched.masked_fill(are_equal, 1)
    sparse = stretched * (stretched >= threshold)
    return sparse / sparse.sum(dim=-1, keepdim=True)


def sentence_mask(inputs: Inputs, options: LossOptions) -> Bool[Tensor, "B S"]:
    """Which of the S rows of each sample hold a sentence; the others are all padding."""
    return (inputs["sub_tokens"] != options.pad_token).any(dim=-1)


def count_multi_sentence_images(inputs: Inputs, options: LossOptions) -> Tensor:
    """Number of images with at least two sentences; a single sentence has no negatives."""
    return (sentence_mask(inputs, options).sum(dim=1) >= 2).sum()


def _sentence_weights(is_present: Bool[Tensor, "B S"], kind: torch.dtype) -> Float[Tensor, "B S"]:
    """Weights of a mean over the sentences of each image."""
    return is_present.to(kind) / is_present.sum(dim=1, keepdim=True).clamp(min=1)


def _mask_logits(logits: Float[Tensor, "..."], ignored: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Logits without effect in a softmax where they are ignored, finite so that gradients stay so."""
    return logits.masked_fill(ignored, torch.finfo(logits.dtype).min / 2)


SUB_CAPTIONS = LossTerm(
    summary="softmax contrastive with several sentences per image, one of each at a time",
    paper="Zheng et al. 2024, DreamLIP",
    outputs=("image_features", "sub_features", "logit_scale"),
    inputs=("sub_tokens", "same"),
    batch_level=sub_captions,
)

JOINT_SUB_CAPTIONS = LossTerm(
    summary="the same with all sentences of the other images as negatives at once",
    paper="after Zheng et al. 2024, DreamLIP",
    outputs=("image_features", "sub_features", "logit_scale"),
    inputs=("sub_tokens", "same"),
    batch_level=joint_sub_captions,
)

GROUPING = LossTerm(
    summary="contrastive matching of each sentence with its group of patches, within an image",
    paper="Zheng et al. 2024, DreamLIP",
    outputs=("sub_features", "patch_features", GROUPING_SCALE),
    inputs=("sub_tokens",),
    sample_level=grouping,
    normaliser=count_multi_sentence_images,
    heads=add_grouping_scale,
)

SPARC = LossTerm(
    summary="the same with patches of their own length, in both directions",
    paper="Bica et al. 2024, SPARC",
    outputs=("sub_features", "patch_features", "logit_scale"),
    inputs=("sub_tokens",),
    sample_level=sparc,
    normaliser=count_multi_sentence_images,
)
