"""Losses over the matrix of similarities of a batch, a block of rows at a time.

A process compares its B rows with the N columns of all processes. The matrix is never held: each block of rows is
computed, reduced to one number, dropped, and computed again when gradients are taken (Chen et al. 2016, Training Deep
Nets with Sublinear Memory Cost, §3). Memory grows with B + N, not with B × N.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from vlm.tensors import Bool, Float, Int64, Tensor
from vlm.train.config import ObjectiveConfig
from vlm.train.objectives.gathering import gather_detached, gather_with_gradient, own_columns
from vlm.train.objectives.term import Inputs, Outputs


@dataclass(frozen=True, kw_only=True)
class PairKinds:
    """What the columns are to each row of a block.

    positives: its partner, and what counts as its partner too. left_out: neither positive nor negative, or None.
    """

    positives: Bool[Tensor, "B N"]
    left_out: Bool[Tensor, "B N"] | None = None

    @property
    def negatives(self) -> Bool[Tensor, "B N"]:
        """What the row is to be told from."""
        return ~self.positives if self.left_out is None else ~(self.positives | self.left_out)


RowLoss = Callable[[Tensor, PairKinds], Tensor]
"""From the cosines of some rows with all columns [B, N], and what these are to them, to a loss for each row [B]."""


@dataclass(frozen=True, kw_only=True)
class ComparedPairs:
    """The pairs of this process, to be compared with those of all processes.

    same: identities of the pairs of this process and of all, where pairs that share one are no negatives.
    block: rows of the matrix that are held at once.
    """

    images: Float[Tensor, "B D"]
    texts: Float[Tensor, "B D"]
    same: tuple[Int64[Tensor, "B G"], Int64[Tensor, "N G"]] | None
    are_positives: bool
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
            kinds = PairKinds(positives=is_own)
            if self.same is not None:
                are_same = share_identity(identities[0], self.same[1])
                kinds = (
                    PairKinds(positives=is_own | are_same)
                    if self.are_positives
                    else PairKinds(positives=is_own, left_out=are_same & ~is_own)
                )
            return row_loss(similarities(rows, columns), kinds).sum()

        beside = [own_columns(len(rows), rows.device), *([] if self.same is None else [self.same[0]])]
        return sum_over_blocks(block_loss, [rows, *beside], self.block) / len(rows)


def compare_pairs(outputs: Outputs, inputs: Inputs, config: ObjectiveConfig) -> ComparedPairs:
    """The pairs a term is given, with what `same_pairs` makes of those that share an identity."""
    same = None
    if config.same_pairs != "negative":
        same = (inputs["same"], gather_detached(inputs["same"]))
    return ComparedPairs(
        images=at_least_single(outputs["image_features"]),
        texts=at_least_single(outputs["text_features"]),
        same=same,
        are_positives=config.same_pairs == "positive",
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


def similarities(rows: Float[Tensor, "B D"], columns: Float[Tensor, "N D"]) -> Float[Tensor, "B N"]:
    """All products of rows and columns, in single precision or better, inside autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        return at_least_single(rows) @ at_least_single(columns).T


def at_least_single(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The values in single precision, or in double where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def share_identity(rows: Int64[Tensor, "B G"], columns: Int64[Tensor, "N G"]) -> Bool[Tensor, "B N"]:
    """Whether row and column have the same number in any place; 0 is no identity and equals nothing.

    >>> share_identity(torch.tensor([[1, 0], [2, 5]]), torch.tensor([[1, 5], [0, 0]])).tolist()
    [[True, False], [True, False]]
    """
    found = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for own, others in zip(rows.T, columns.T, strict=True):
        found |= (own[:, None] == others) & (own != 0)[:, None]
    return found
