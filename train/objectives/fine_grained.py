"""Sentences of long captions: each a positive of its image, and each matched with its patches (DreamLIP, SPARC)."""

import torch
from torch.nn import functional as F

from vlm.tensor_types import Bool, Float, Tensor
from vlm.train.distributed import gather_detached, gather_with_gradient, local_columns, num_processes
from vlm.train.objectives.contrastive import at_least_float32, same_identity, similarity_matrix, sum_over_blocks
from vlm.train.objectives.loss_term import Inputs, LossOptions, LossTerm, Outputs


def sub_captions(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Softmax contrastive learning with several texts an image, in both directions (DreamLIP, Zheng et al. 2024).

    An image is compared with each of its sentences and those of all other images, its own further sentences ignored; a
    sentence with all images. Each is a mean over the image's sentences and then over the images that have any. The
    paper compares the batch with one sentence of each image at a time; all are compared at once here, so that there are
    S times the negatives. Pairs that share an identity are not negatives of each other unless `same_pairs` is
    `negative`.
    """
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
        negatives = _mask_logits(logits, ~is_negative).flatten(1).logsumexp(dim=1)
        positives = logits[torch.arange(len(rows), device=rows.device), partners]
        # -log p of each sentence under the softmax over it and all negatives
        return (weights * (torch.logaddexp(negatives[:, None], positives) - positives)).sum()

    def sentence_loss(rows: Tensor, partners: Tensor, same: Tensor, weights: Tensor) -> Tensor:
        logits = (scale * similarity_matrix(rows.flatten(0, 1), all_images)).unflatten(0, rows.shape[:2])
        is_ignored = same_identity(same, all_same) & (partners[:, None] != column_numbers)
        log_probabilities = _mask_logits(logits, is_ignored[:, None]).log_softmax(dim=2)
        of_partners = log_probabilities[torch.arange(len(rows), device=rows.device), :, partners]
        return -(weights * of_partners).sum()

    # a row of images has num_sentences times the columns of a contrastive term
    block = max(1, options.config.similarity_block // num_sentences)
    total = sum_over_blocks(image_loss, [images, partners, same, weights], block)
    total = total + sum_over_blocks(sentence_loss, [sentences, partners, same, weights], block)
    # the mean over images of all processes, which all have the same number; gradients are averaged afterwards
    return total / 2 * num_processes() / all_present.any(dim=1).sum().clamp(min=1)


def grouping(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Each sentence finds its own group of patches among those of the image's other sentences, summed over images.

    DreamLIP (Zheng et al. 2024), after SPARC (Bica et al. 2024): the similarities of a sentence to the P
    patches are stretched to 0 … 1, those below 1/P dropped, and the rest are the weights with which patches are
    averaged to the sentence's group. Groups and sentences are then contrasted inside the image, in both directions,
    at the temperature of the contrastive term.
    """
    patches = at_least_float32(outputs["patch_features"])
    sentences = at_least_float32(outputs["sub_features"])
    is_present = sentence_mask(inputs, options)
    # as in `similarity_matrix`: half precision is too coarse for logits
    with torch.autocast(patches.device.type, enabled=False):
        groups = F.normalize(sparse_weights(sentences @ patches.mT) @ patches, dim=-1)
        logits = outputs["logit_scale"] * (groups @ sentences.mT)
    by_group = _mask_logits(logits, ~is_present[:, None]).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    by_sentence = _mask_logits(logits.mT, ~is_present[:, None]).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    weights = _sentence_weights(is_present, logits.dtype)
    return -(weights * (by_group + by_sentence) / 2).sum()


def sparse_weights(similarity: Float[Tensor, "B S P"]) -> Float[Tensor, "B S P"]:
    """The weight of each patch for a sentence: weights that sum to 1, many of them 0 (SPARC).

    If all patches are equally similar, they have equal weights.

    >>> sparse_weights(torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])).tolist()
    [[[0.0, 0.1428571492433548, 0.2857142984867096, 0.5714285969734192]]]
    """
    lowest = similarity.amin(dim=-1, keepdim=True)
    highest = similarity.amax(dim=-1, keepdim=True)
    are_equal = highest == lowest
    stretched = (similarity - lowest) / (highest - lowest).masked_fill(are_equal, 1)
    stretched = stretched.masked_fill(are_equal, 1)
    # SPARC's threshold: 1/P is the weight of each patch if all were alike
    sparse = stretched * (stretched >= 1 / similarity.shape[-1])
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
    summary="softmax contrastive with several sentences per image, each a positive",
    paper="Zheng et al. 2024, DreamLIP",
    outputs=("image_features", "sub_features", "logit_scale"),
    inputs=("sub_tokens", "same"),
    batch_level=sub_captions,
)

GROUPING = LossTerm(
    summary="contrastive matching of each sentence with its patches, within an image",
    paper="Zheng et al. 2024, DreamLIP; Bica et al. 2024, SPARC",
    outputs=("sub_features", "patch_features", "logit_scale"),
    inputs=("sub_tokens",),
    sample_level=grouping,
    normaliser=count_multi_sentence_images,
)
