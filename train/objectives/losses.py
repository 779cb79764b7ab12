"""Contrastive losses of a row of similarities, as pure functions: a row is one picture against texts, or the reverse.

Rows and columns: B of them against N. Each returns a loss for every row; who sums them knows their number.
"""

import torch
from torch.nn import functional as F

from vlm.tensors import Bool, Float, Tensor
from vlm.train.objectives.pairwise import PairKinds


def softmax_rows(logits: Float[Tensor, "B N"], kinds: PairKinds) -> Float[Tensor, " B"]:
    """-log p(partner) under the softmax over all columns (CLIP, Radford et al. 2021, figure 3).

    With several positives, the mean of their -log p, each under the softmax over all of them and the negatives
    (SupCon, Khosla et al. 2020, equation 2). What is left out is in no denominator.
    """
    kept = logits if kinds.left_out is None else logits.masked_fill(kinds.left_out, -torch.inf)
    return kept.logsumexp(dim=1) - mean_where(logits, kinds.positives)


def decoupled_rows(logits: Float[Tensor, "B N"], kinds: PairKinds) -> Float[Tensor, " B"]:
    """The same with the negatives alone in the denominator (DCL, Yeh et al. 2021, equation 6).

    Where the paper has two views of a picture, with negatives among both, here are a picture and a text, with the
    columns of the other kind alone. With several positives all of them leave the denominator, and the mean of their
    logits is raised; the paper has one. A row without negatives has nothing to be told from: its loss is 0.
    """
    negatives = kinds.negatives
    has_any = negatives.any(dim=1)
    kept = logits.masked_fill(~negatives & has_any[:, None], -torch.inf)
    return torch.where(has_any, kept.logsumexp(dim=1) - mean_where(logits, kinds.positives), 0)


def sigmoid_rows(logits: Float[Tensor, "B N"], kinds: PairKinds) -> Float[Tensor, " B"]:
    """Every pair by itself: -log σ(±logit), summed over the row (SigLIP, Zhai et al. 2023, §3.2 and algorithm 1).

    The sign is + for positives, however many, and - for negatives; what is left out has no part.
    """
    losses = F.softplus(torch.where(kinds.positives, -logits, logits))
    return (losses if kinds.left_out is None else losses.masked_fill(kinds.left_out, 0)).sum(dim=1)


def mean_where(values: Float[Tensor, "B N"], chosen: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """The mean of each row's chosen values, of which it has at least one.

    >>> mean_where(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[False, True, True]])).tolist()
    [3.0]
    """
    return values.masked_fill(~chosen, 0).sum(dim=1) / chosen.sum(dim=1)
