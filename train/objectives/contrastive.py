"""Losses that compare every image of the batch with every text: CLIP, SigLIP, DCL, DCLW and max-margin ranking.

A process compares its B rows with the N columns of all processes. The matrix of similarities is never held whole: each
block of rows is computed, reduced to one number, dropped, and computed again when gradients are taken (Chen et al.
2016, Training Deep Nets with Sublinear Memory Cost, §3). Memory grows with B + N, not with B × N.

A row is one image against all texts, or one text against all images. The losses of rows are pure functions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F

from vlm.tensor_types import Bool, Float, Int64, Tensor
from vlm.train.distributed import gather_detached, gather_with_gradient, local_columns
from vlm.train.objectives.loss_term import (
    Inputs,
    LossOptions,
    LossTerm,
    Outputs,
    at_least_float32,
    same_identity,
    similarity_matrix,
    sum_over_blocks,
)
from vlm.train.run_config import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class PairMasks:
    """What the columns are to each row of a block.

    positives: its partner, and what counts as its partner too. ignored: neither positive nor negative, or None.
    """

    positives: Bool[Tensor, "B N"]
    ignored: Bool[Tensor, "B N"] | None = None

    @property
    def negatives(self) -> Bool[Tensor, "B N"]:
        """The negatives of each row."""
        return ~self.positives if self.ignored is None else ~(self.positives | self.ignored)


RowLoss = Callable[[Tensor, PairMasks], Tensor]
"""From the cosines of some rows with all columns [B, N], and what these are to them, to a loss for each row [B]."""


def clip(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Softmax contrastive learning, the mean of both directions (CLIP, Radford et al. 2021, figure 3)."""
    pairs = build_contrastive_pairs(outputs, inputs, options.config)
    scale = outputs["logit_scale"]

    def row_loss(cosines: Tensor, masks: PairMasks) -> Tensor:
        return softmax_loss(scale * cosines, masks)

    return (pairs.mean_over_images(row_loss) + pairs.mean_over_texts(row_loss)) / 2


def siglip(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Sigmoid contrastive learning, the mean over images of the sum over texts (SigLIP, Zhai et al. 2023, §3.2).

    Each pair of the global batch counts once, so there is one direction.
    """
    pairs = build_contrastive_pairs(outputs, inputs, options.config)
    scale = outputs["logit_scale"]
    bias = outputs["logit_bias"]

    def row_loss(cosines: Tensor, masks: PairMasks) -> Tensor:
        return sigmoid_loss(scale * cosines + bias, masks)

    return pairs.mean_over_images(row_loss)


def decoupled(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Decoupled contrastive learning, the mean of both directions (DCL, Yeh et al. 2021, equation 6)."""
    pairs = build_contrastive_pairs(outputs, inputs, options.config)
    scale = outputs["logit_scale"]

    def row_loss(cosines: Tensor, masks: PairMasks) -> Tensor:
        return decoupled_loss(scale * cosines, masks)

    return (pairs.mean_over_images(row_loss) + pairs.mean_over_texts(row_loss)) / 2


def weighted_decoupled(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """The same with hard positives weighing more (DCLW, Yeh et al. 2021).

    The term of pair i's positive is multiplied by the negative von Mises-Fisher weight
    w_i = 2 - exp(s_i/σ) / mean_j exp(s_j/σ), s_i the cosine of the pair, j over the global batch; the mean of all
    weights is 1. σ is `config.positive_sigma`. Gradients flow through the weights; the library lightly holds them
    constant.
    """
    pairs = build_contrastive_pairs(outputs, inputs, options.config)
    scale = outputs["logit_scale"]
    # the mean is over the pairs of all processes, so the weights are those of the columns
    cosines_of_pairs = gather_with_gradient((pairs.images * pairs.texts).sum(dim=1))
    weights = 2 - len(cosines_of_pairs) * (cosines_of_pairs / options.config.positive_sigma).softmax(dim=0)

    def row_loss(cosines: Tensor, masks: PairMasks) -> Tensor:
        return decoupled_loss(scale * cosines, masks, weights)

    return (pairs.mean_over_images(row_loss) + pairs.mean_over_texts(row_loss)) / 2


def ranking(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Max-margin ranking of cosines, the mean over pairs (VSE++, Faghri et al. 2018, ℓ_SH; `hardest`: ℓ_MH).

    `config.negatives` selects the negatives, as "Deep Learning Applied to Image and Text Matching" does: `texts` for
    each image, `images` for each text, `both`, or the `hardest` of both. All but `hardest` are summed, so the loss
    grows with the batch. There is no temperature.
    """
    config = options.config
    pairs = build_contrastive_pairs(outputs, inputs, config)
    # a hinge needs one cosine to stay below, so same_pairs = positive does here what ignore does
    pairs = replace(pairs, same_are_positives=False)
    row_loss = partial(hinge_loss, margin=config.margin, hardest=config.negatives == "hardest")

    losses: list[Tensor] = []
    if config.negatives != "images":
        losses.append(pairs.mean_over_images(row_loss))
    if config.negatives != "texts":
        losses.append(pairs.mean_over_texts(row_loss))
    return torch.stack(losses).sum()


def softmax_loss(logits: Float[Tensor, "B N"], masks: PairMasks) -> Float[Tensor, " B"]:
    """-log p(partner) under the softmax over all columns (CLIP, Radford et al. 2021, figure 3).

    With several positives, the mean of their -log p, each under the softmax over all of them and the negatives
    (SupCon, Khosla et al. 2020, equation 2). What is ignored is in no denominator.
    """
    compared = logits if masks.ignored is None else logits.masked_fill(masks.ignored, -torch.inf)
    return compared.logsumexp(dim=1) - masked_mean(logits, masks.positives)


def decoupled_loss(
    logits: Float[Tensor, "B N"], masks: PairMasks, weights: Float[Tensor, " N"] | None = None
) -> Float[Tensor, " B"]:
    """The same with the negatives alone in the denominator (DCL, Yeh et al. 2021, equation 6).

    The paper has two views of an image, with negatives among both; here are an image and a text, with the columns of
    the other modality alone. With several positives all of them leave the denominator, and the mean of their logits is
    raised; the paper has one. The loss of a row without negatives is 0. weights: of positives, by their column.
    """
    negatives = masks.negatives
    has_negatives = negatives.any(dim=1)
    # rows without negatives keep their logits: a logsumexp over nothing but -inf has a NaN gradient
    compared = logits.masked_fill(~negatives & has_negatives[:, None], -torch.inf)
    raised = logits if weights is None else weights * logits
    return torch.where(has_negatives, compared.logsumexp(dim=1) - masked_mean(raised, masks.positives), 0)


def sigmoid_loss(logits: Float[Tensor, "B N"], masks: PairMasks) -> Float[Tensor, " B"]:
    """Every pair by itself: -log σ(±logit), summed over the row (SigLIP, Zhai et al. 2023, §3.2 and algorithm 1).

    The sign is + for positives, however many, and - for negatives; what is ignored has no part.
    """
    # softplus(-x) = -log σ(x)
    losses = F.softplus(torch.where(masks.positives, -logits, logits))
    if masks.ignored is not None:
        losses = losses.masked_fill(masks.ignored, 0)
    return losses.sum(dim=1)


def hinge_loss(cosines: Float[Tensor, "B N"], masks: PairMasks, *, margin: float, hardest: bool) -> Float[Tensor, " B"]:
    """[margin + s(negative) - s(positive)]₊ summed over each row's negatives, or of its hardest; 0 if it has none."""
    # `ranking` leaves one positive a row, so that the sum is its cosine
    positive = cosines.masked_fill(~masks.positives, 0).sum(dim=1, keepdim=True)
    hinges = (margin + cosines - positive).relu().masked_fill(~masks.negatives, 0)
    return hinges.amax(dim=1) if hardest else hinges.sum(dim=1)


def masked_mean(values: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """The mean of each row's values where the mask is set, of which there is at least one.

    >>> masked_mean(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[False, True, True]])).tolist()
    [3.0]
    """
    return values.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class ContrastivePairs:
    """The pairs of this process, to be compared with those of all processes.

    same: identities of the pairs of this process and of all processes, where pairs that share one are not negatives.
    config: says how many rows of the matrix are held at once.
    """

    images: Float[Tensor, "B D"]
    texts: Float[Tensor, "B D"]
    same: tuple[Int64[Tensor, "B G"], Int64[Tensor, "N G"]] | None
    same_are_positives: bool
    config: ObjectiveConfig

    def mean_over_images(self, row_loss: RowLoss) -> Float[Tensor, ""]:
        """Mean over this process's images, each a row against the texts of all processes."""
        return self._mean(self.images, self.texts, row_loss)

    def mean_over_texts(self, row_loss: RowLoss) -> Float[Tensor, ""]:
        """Mean over this process's texts, each a row against the images of all processes."""
        return self._mean(self.texts, self.images, row_loss)

    def _mean(self, rows: Tensor, others: Tensor, row_loss: RowLoss) -> Tensor:
        # gathered once for all blocks; each process then has the gradient of all columns by its own rows
        columns = gather_with_gradient(others)
        column_numbers = torch.arange(len(columns), device=columns.device)

        def block_loss(rows: Tensor, partners: Tensor, *identities: Tensor) -> Tensor:
            masks = self._masks(partners[:, None] == column_numbers, identities)
            return row_loss(similarity_matrix(rows, columns), masks).sum()

        # row i of this process and its partner among the columns, which are in the order of the processes
        partners = local_columns(len(rows), rows.device)
        tensors = [rows, partners] if self.same is None else [rows, partners, self.same[0]]
        return sum_over_blocks(block_loss, tensors, self.config.rows_at_once(len(columns))) / len(rows)

    def _masks(self, is_partner: Bool[Tensor, "B N"], identities: tuple[Tensor, ...]) -> PairMasks:
        """What the columns are to a block of rows, of whose pairs these are the identities."""
        if self.same is None:
            return PairMasks(positives=is_partner)
        shares_identity = same_identity(identities[0], self.same[1])
        if self.same_are_positives:
            return PairMasks(positives=is_partner | shares_identity)
        # a pair shares its own identity, and stays positive
        return PairMasks(positives=is_partner, ignored=shares_identity & ~is_partner)


def build_contrastive_pairs(outputs: Outputs, inputs: Inputs, config: ObjectiveConfig) -> ContrastivePairs:
    """The pairs of a batch, with what `same_pairs` makes of those that share an identity."""
    same = None
    if config.same_pairs != "negative":
        # identities need no gradient
        same = (inputs["same"], gather_detached(inputs["same"]))
    return ContrastivePairs(
        images=at_least_float32(outputs["image_features"]),
        texts=at_least_float32(outputs["text_features"]),
        same=same,
        same_are_positives=config.same_pairs == "positive",
        config=config,
    )


CLIP = LossTerm(
    summary="softmax contrastive (InfoNCE)",
    paper="Radford et al. 2021, CLIP, §2.3",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=("same",),
    batch_level=clip,
)

SIGLIP = LossTerm(
    summary="sigmoid contrastive: binary classification of every pair",
    paper="Zhai et al. 2023, SigLIP, §3.2 and algorithm 1",
    outputs=("image_features", "text_features", "logit_scale", "logit_bias"),
    inputs=("same",),
    batch_level=siglip,
)

DCL = LossTerm(
    summary="softmax contrastive with the positive removed from the denominator, for small batches",
    paper="Yeh et al. 2021, Decoupled Contrastive Learning, equation 6",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=("same",),
    batch_level=decoupled,
)

WEIGHTED_DCL = LossTerm(
    summary="the same with von Mises-Fisher weights, which are larger where a positive is hard",
    paper="Yeh et al. 2021, Decoupled Contrastive Learning",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=("same",),
    batch_level=weighted_decoupled,
)

RANKING = LossTerm(
    summary="max-margin ranking of cosines, with all negatives or the hardest",
    paper="Deep Learning Applied to Image and Text Matching; Faghri et al. 2018, VSE++, §3",
    outputs=("image_features", "text_features"),
    inputs=("same",),
    batch_level=ranking,
)
"""The right partner before every wrong one, by a margin."""
