"""Sentences of long captions, each a positive of its image, and each tied to the patches it speaks of (DreamLIP)."""

import torch
from torch.nn import functional as F

from vlm.tensors import Bool, Float, Tensor
from vlm.train.distributed import gather_detached, gather_with_gradient, local_columns, num_processes
from vlm.train.objectives.contrastive import at_least_float32, same_identity, similarity_matrix, sum_over_blocks
from vlm.train.objectives.loss_term import Inputs, LossOptions, LossTerm, Outputs


def sub_captions(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Softmax contrastive learning with several texts an image, in both directions (DreamLIP, Zheng et al. 2024).

    An image finds each of its sentences among those of all other images, its own further sentences left aside; a
    sentence finds its image among all images. Each is a mean over the image's sentences and then over the
    images that have any. The paper compares the batch with one sentence of each image at a time; all are compared
    at once here, so that there are S times the negatives. Pairs that share an identity are no negatives of each other
    unless `same_pairs` is `negative`.
    """
    images, sentences = at_least_float32(outputs["image_features"]), at_least_float32(outputs["sub_features"])
    scale, block = outputs["logit_scale"], options.config.similarity_block
    is_present = sentence_mask(inputs, options)
    each = sentences.shape[1]
    all_images, all_sentences = gather_with_gradient(images), gather_with_gradient(sentences).flatten(0, 1)
    all_there = gather_detached(is_present)
    weights = _sentence_weights(is_present, images.dtype)
    own = local_columns(len(images), images.device)
    numbers = torch.arange(len(all_images), device=images.device)
    same = inputs["same"] if options.config.same_pairs != "negative" else own[:, None] + 1
    all_same = gather_detached(same)

    def by_image(rows: Tensor, own: Tensor, same: Tensor, weights: Tensor) -> Tensor:
        logits = (scale * similarity_matrix(rows, all_sentences)).unflatten(1, (-1, each))
        is_other = (~same_identity(same, all_same) & (own[:, None] != numbers))[..., None] & all_there
        others = _mask_logits(logits, ~is_other).flatten(1).logsumexp(dim=1)
        positives = logits[torch.arange(len(rows), device=rows.device), own]
        return (weights * (torch.logaddexp(others[:, None], positives) - positives)).sum()

    def by_sentence(rows: Tensor, own: Tensor, same: Tensor, weights: Tensor) -> Tensor:
        logits = (scale * similarity_matrix(rows.flatten(0, 1), all_images)).unflatten(0, rows.shape[:2])
        is_same = same_identity(same, all_same) & (own[:, None] != numbers)
        found = _mask_logits(logits, is_same[:, None]).log_softmax(dim=2)
        chosen = found[torch.arange(len(rows), device=rows.device), :, own]
        return -(weights * chosen).sum()

    size = max(1, block // each)
    total = sum_over_blocks(by_image, [images, own, same, weights], size)
    total = total + sum_over_blocks(by_sentence, [sentences, own, same, weights], size)
    return total / 2 * num_processes() / all_there.any(dim=1).sum().clamp(min=1)


def grouping(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Each sentence finds its own group of patches among those of the image's other sentences, summed over images.

    DreamLIP (Zheng et al. 2024), after SPARC (Bica et al. 2024): the similarities of a sentence to the P
    patches are stretched to 0 … 1, those below 1/P dropped, and the rest are the weights with which patches are
    averaged to the sentence's group. Groups and sentences are then contrasted inside the image, in both directions,
    at the temperature of the contrastive term.
    """
    patches, sentences = at_least_float32(outputs["patch_features"]), at_least_float32(outputs["sub_features"])
    is_present = sentence_mask(inputs, options)
    with torch.autocast(patches.device.type, enabled=False):
        groups = F.normalize(sparse_weights(sentences @ patches.mT) @ patches, dim=-1)
        logits = outputs["logit_scale"] * (groups @ sentences.mT)
    by_group = _mask_logits(logits, ~is_present[:, None]).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    by_sentence = _mask_logits(logits.mT, ~is_present[:, None]).log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    return -(_sentence_weights(is_present, logits.dtype) * (by_group + by_sentence) / 2).sum()


def sparse_weights(similarity: Float[Tensor, "B S P"]) -> Float[Tensor, "B S P"]:
    """How much each patch has to do with a sentence: weights that sum to 1, many of them 0 (SPARC).

    Where all patches are alike, they weigh the same.

    >>> sparse_weights(torch.tensor([[[0.0, 1.0, 2.0, 4.0]]])).tolist()
    [[[0.0, 0.1428571492433548, 0.2857142984867096, 0.5714285969734192]]]
    """
    least, most = similarity.amin(dim=-1, keepdim=True), similarity.amax(dim=-1, keepdim=True)
    are_alike = most == least
    stretched = (similarity - least) / (most - least).masked_fill(are_alike, 1)
    stretched = stretched.masked_fill(are_alike, 1)
    kept = stretched * (stretched >= 1 / similarity.shape[-1])
    return kept / kept.sum(dim=-1, keepdim=True)


def sentence_mask(inputs: Inputs, options: LossOptions) -> Bool[Tensor, "B S"]:
    """Which of the S places of each sample hold a sentence; the others are all padding."""
    return (inputs["sub_tokens"] != options.pad_token).any(dim=-1)


def count_multi_sentence_images(inputs: Inputs, options: LossOptions) -> Tensor:
    """Images with two sentences or more; with one there is nothing to tell it from."""
    return (sentence_mask(inputs, options).sum(dim=1) >= 2).sum()


def _sentence_weights(is_present: Bool[Tensor, "B S"], kind: torch.dtype) -> Float[Tensor, "B S"]:
    """Weights of a mean over the sentences of each image."""
    return is_present.to(kind) / is_present.sum(dim=1, keepdim=True).clamp(min=1)


def _mask_logits(logits: Float[Tensor, "..."], ignored: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Logits that leave no trace in a softmax where they are left out, finite so that gradients stay so."""
    return logits.masked_fill(ignored, torch.finfo(logits.dtype).min / 2)


SUB_CAPTIONS = LossTerm(
    summary="several sentences of each image, each a positive",
    paper="Zheng et al. 2024, DreamLIP",
    outputs=("image_features", "sub_features", "logit_scale"),
    inputs=("sub_tokens", "same"),
    batch_level=sub_captions,
)

GROUPING = LossTerm(
    summary="each sentence finds the patches it speaks of",
    paper="Zheng et al. 2024, DreamLIP; Bica et al. 2024, SPARC",
    outputs=("sub_features", "patch_features", "logit_scale"),
    inputs=("sub_tokens",),
    sample_level=grouping,
    normaliser=count_multi_sentence_images,
)
