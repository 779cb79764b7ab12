"""Objectives that compare every picture of the batch with every text.

Losses over the matrix of similarities of a batch, a block of rows at a time.

A process compares its B rows with the N columns of all processes. The matrix is never held: each block of rows is
computed, reduced to one number, dropped, and computed again when gradients are taken (Chen et al. 2016, Training Deep
Nets with Sublinear Memory Cost, §3). Memory grows with B + N, not with B × N.

Contrastive losses of a row of similarities, as pure functions: a row is one picture against texts, or the reverse.

Rows and columns: B of them against N. Each returns a loss for every row; who sums them knows their number.

The objective that ranks: the right partner before every wrong one, by a margin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm.tensors import Bool, Float, Int64, Tensor
from vlm.train.distributed import gather_detached, gather_with_gradient, local_columns
from vlm.train.objectives.loss_term import Inputs, LossOptions, LossTerm, Outputs
from vlm.train.run_config import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class PairMasks:
    """What the columns are to each row of a block.

    positives: its partner, and what counts as its partner too. left_out: neither positive nor negative, or None.
    """

    positives: Bool[Tensor, "B N"]
    ignored: Bool[Tensor, "B N"] | None = None

    @property
    def negatives(self) -> Bool[Tensor, "B N"]:
        """What the row is to be told from."""
        return ~self.positives if self.ignored is None else ~(self.positives | self.ignored)


RowLoss = Callable[[Tensor, PairMasks], Tensor]
"""From the cosines of some rows with all columns [B, N], and what these are to them, to a loss for each row [B]."""


@dataclass(frozen=True, kw_only=True)
class ContrastivePairs:
    """The pairs of this process, to be compared with those of all processes.

    same: identities of the pairs of this process and of all, where pairs that share one are no negatives.
    block: rows of the matrix that are held at once.
    """

    images: Float[Tensor, "B D"]
    texts: Float[Tensor, "B D"]
    same: tuple[Int64[Tensor, "B G"], Int64[Tensor, "N G"]] | None
    same_are_positives: bool
    block: int

    def mean_over_images(self, row_loss: RowLoss) -> Float[Tensor, ""]:
        """Mean over this process's pictures, each a row against the texts of all processes."""
        return self._mean(self.images, self.texts, row_loss)

    def mean_over_texts(self, row_loss: RowLoss) -> Float[Tensor, ""]:
        """Mean over this process's texts, each a row against the pictures of all processes."""
        return self._mean(self.texts, self.images, row_loss)

    def _mean(self, rows: Tensor, others: Tensor, row_loss: RowLoss) -> Tensor:
        columns = gather_with_gradient(others)
        numbers = torch.arange(len(columns), device=columns.device)

        def block_loss(rows: Tensor, own: Tensor, *identities: Tensor) -> Tensor:
            is_own = own[:, None] == numbers
            masks = PairMasks(positives=is_own)
            if self.same is not None:
                are_same = same_identity(identities[0], self.same[1])
                masks = (
                    PairMasks(positives=is_own | are_same)
                    if self.same_are_positives
                    else PairMasks(positives=is_own, ignored=are_same & ~is_own)
                )
            return row_loss(similarity_matrix(rows, columns), masks).sum()

        for_global_crop = [local_columns(len(rows), rows.device), *([] if self.same is None else [self.same[0]])]
        return sum_over_blocks(block_loss, [rows, *for_global_crop], self.block) / len(rows)


def build_contrastive_pairs(outputs: Outputs, inputs: Inputs, config: ObjectiveConfig) -> ContrastivePairs:
    """The pairs a term is given, with what `same_pairs` makes of those that share an identity."""
    same = None
    if config.same_pairs != "negative":
        same = (inputs["same"], gather_detached(inputs["same"]))
    return ContrastivePairs(
        images=at_least_float32(outputs["image_features"]),
        texts=at_least_float32(outputs["text_features"]),
        same=same,
        same_are_positives=config.same_pairs == "positive",
        block=config.similarity_block,
    )


def sum_over_blocks(block_loss: Callable[..., Tensor], rows: Sequence[Tensor], block: int) -> Float[Tensor, ""]:
    """The sum of a loss over blocks of rows, each computed again when gradients are taken.

    block_loss: from some rows of each tensor, in the order given, to the sum of their losses, a scalar; it must draw
    nothing at random and exchange nothing between processes. What it reads besides (columns, a temperature) gets its
    gradient as well. rows: tensors of the same length. A single block is kept instead of computed twice.
    """
    blocks = list(zip(*(tensor.split(block) for tensor in rows), strict=True))
    if len(blocks) == 1:
        return block_loss(*blocks[0])
    sums = [checkpoint(block_loss, *parts, use_reentrant=False, preserve_rng_state=False) for parts in blocks]
    return torch.stack(sums).sum()  # pyright: ignore[reportArgumentType]


def similarity_matrix(rows: Float[Tensor, "B D"], columns: Float[Tensor, "N D"]) -> Float[Tensor, "B N"]:
    """All products of rows and columns, in single precision or better, inside autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return at_least_float32(rows) @ at_least_float32(columns).T


def at_least_float32(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The values in single precision, or in double where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def same_identity(rows: Int64[Tensor, "B G"], columns: Int64[Tensor, "N G"]) -> Bool[Tensor, "B N"]:
    """Whether row and column have the same number in any place; 0 is no identity and equals nothing.

    >>> same_identity(torch.tensor([[1, 0], [2, 5]]), torch.tensor([[1, 5], [0, 0]])).tolist()
    [[True, False], [True, False]]
    """
    found = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for own, others in zip(rows.T, columns.T, strict=True):
        found |= (own[:, None] == others) & (own != 0)[:, None]
    return found


def softmax_loss(logits: Float[Tensor, "B N"], masks: PairMasks) -> Float[Tensor, " B"]:
    """-log p(partner) under the softmax over all columns (CLIP, Radford et al. 2021, figure 3).

    With several positives, the mean of their -log p, each under the softmax over all of them and the negatives
    (SupCon, Khosla et al. 2020, equation 2). What is left out is in no denominator.
    """
    kept = logits if masks.ignored is None else logits.masked_fill(masks.ignored, -torch.inf)
    return kept.logsumexp(dim=1) - masked_mean(logits, masks.positives)


def decoupled_loss(logits: Float[Tensor, "B N"], masks: PairMasks) -> Float[Tensor, " B"]:
    """The same with the negatives alone in the denominator (DCL, Yeh et al. 2021, equation 6).

    Where the paper has two views of a picture, with negatives among both, here are a picture and a text, with the
    columns of the other kind alone. With several positives all of them leave the denominator, and the mean of their
    logits is raised; the paper has one. A row without negatives has nothing to be told from: its loss is 0.
    """
    negatives = masks.negatives
    has_any = negatives.any(dim=1)
    kept = logits.masked_fill(~negatives & has_any[:, None], -torch.inf)
    return torch.where(has_any, kept.logsumexp(dim=1) - masked_mean(logits, masks.positives), 0)


def sigmoid_loss(logits: Float[Tensor, "B N"], masks: PairMasks) -> Float[Tensor, " B"]:
    """Every pair by itself: -log σ(±logit), summed over the row (SigLIP, Zhai et al. 2023, §3.2 and algorithm 1).

    The sign is + for positives, however many, and - for negatives; what is left out has no part.
    """
    losses = F.softplus(torch.where(masks.positives, -logits, logits))
    return (losses if masks.ignored is None else losses.masked_fill(masks.ignored, 0)).sum(dim=1)


def masked_mean(values: Float[Tensor, "B N"], chosen: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """The mean of each row's chosen values, of which it has at least one.

    >>> masked_mean(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[False, True, True]])).tolist()
    [3.0]
    """
    return values.masked_fill(~chosen, 0).sum(dim=1) / chosen.sum(dim=1)


def clip(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Softmax contrastive learning, the mean of both directions (CLIP, Radford et al. 2021, figure 3)."""
    pairs, scale = build_contrastive_pairs(outputs, inputs, options.config), outputs["logit_scale"]

    def rows(cosines: Tensor, masks: PairMasks) -> Tensor:
        return softmax_loss(scale * cosines, masks)

    return (pairs.mean_over_images(rows) + pairs.mean_over_texts(rows)) / 2


def siglip(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Sigmoid contrastive learning, the mean over pictures of the sum over texts (SigLIP, Zhai et al. 2023, §3.2).

    Each pair of the global batch counts once, so there is one direction.
    """
    pairs, scale, bias = (
        build_contrastive_pairs(outputs, inputs, options.config),
        outputs["logit_scale"],
        outputs["logit_bias"],
    )

    def rows(cosines: Tensor, masks: PairMasks) -> Tensor:
        return sigmoid_loss(scale * cosines + bias, masks)

    return pairs.mean_over_images(rows)


def decoupled(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Decoupled contrastive learning, the mean of both directions (DCL, Yeh et al. 2021, equation 6)."""
    pairs, scale = build_contrastive_pairs(outputs, inputs, options.config), outputs["logit_scale"]

    def rows(cosines: Tensor, masks: PairMasks) -> Tensor:
        return decoupled_loss(scale * cosines, masks)

    return (pairs.mean_over_images(rows) + pairs.mean_over_texts(rows)) / 2


CLIP = LossTerm(
    summary="softmax contrastive",
    paper="Radford et al. 2021, CLIP, §2.3",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=("same",),
    batch_level=clip,
)

SIGLIP = LossTerm(
    summary="sigmoid contrastive: every pair judged by itself",
    paper="Zhai et al. 2023, SigLIP, §3.2 and algorithm 1",
    outputs=("image_features", "text_features", "logit_scale", "logit_bias"),
    inputs=("same",),
    batch_level=siglip,
)

DCL = LossTerm(
    summary="softmax contrastive with the positive out of the denominator, for small batches",
    paper="Yeh et al. 2021, Decoupled Contrastive Learning, equation 6",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=("same",),
    batch_level=decoupled,
)


def ranking(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Max-margin ranking of cosines, the mean over pairs (VSE++, Faghri et al. 2018, ℓ_SH; `hardest`: ℓ_MH).

    `config.negatives` chooses the wrong partners, as "Deep Learning Applied to Image and Text Matching" does: `texts`
    for each picture, `images` for each text, `both`, or the `hardest` of both. All but `hardest` are summed, so the
    loss grows with the batch. There is no temperature. A further positive has no part: same_pairs = positive does what
    ignore does, since a hinge needs one cosine to stay below.
    """
    config = options.config
    pairs = replace(build_contrastive_pairs(outputs, inputs, config), same_are_positives=False)
    rows = partial(hinge_loss, margin=config.margin, hardest=config.negatives == "hardest")
    wrong_texts = [] if config.negatives == "images" else [pairs.mean_over_images(rows)]
    wrong_images = [] if config.negatives == "texts" else [pairs.mean_over_texts(rows)]
    return torch.stack([*wrong_texts, *wrong_images]).sum()


def hinge_loss(cosines: Float[Tensor, "B N"], masks: PairMasks, *, margin: float, hardest: bool) -> Float[Tensor, " B"]:
    """[margin + s(wrong) - s(right)]₊ summed over each row's negatives, or of its hardest; 0 where it has none."""
    right = cosines.masked_fill(~masks.positives, 0).sum(dim=1, keepdim=True)
    hinges = (margin + cosines - right).relu().masked_fill(~masks.negatives, 0)
    return hinges.amax(dim=1) if hardest else hinges.sum(dim=1)


RANKING = LossTerm(
    summary="max-margin ranking of cosines, against all wrong partners or the hardest",
    paper="Deep Learning Applied to Image and Text Matching; Faghri et al. 2018, VSE++, §3",
    outputs=("image_features", "text_features"),
    inputs=("same",),
    batch_level=ranking,
)
