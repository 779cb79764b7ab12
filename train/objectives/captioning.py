"""Objectives that write the caption of each picture."""

import torch
from torch.nn import functional as F

from vlm.tensors import Float, Int64, Tensor
from vlm.train.objectives.term import Inputs, Outputs, Term, TermOptions


def caption(outputs: Outputs, inputs: Inputs, options: TermOptions) -> Tensor:
    """Cross-entropy of each next token, padding left out, summed (CoCa, Yu et al. 2022, equation 2)."""
    return next_token_loss(outputs["logits"], outputs["labels"], pad_token=options.pad_token)


def next_token_loss(
    logits: Float[Tensor, "B L V"], labels: Int64[Tensor, "B L"], *, pad_token: int
) -> Float[Tensor, ""]:
    """Cross-entropy summed over the tokens that are no padding, in single precision at least."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise.flatten(0, 1), labels.flatten(), ignore_index=pad_token, reduction="sum")


def count_next_tokens(inputs: Inputs, options: TermOptions) -> Tensor:
    """Tokens that are predicted: all but the first of each caption."""
    return (inputs["tokens"][:, 1:] != options.pad_token).sum()


CAPTION = Term(
    summary="next token of the caption, given the picture",
    paper="Yu et al. 2022, CoCa, equation 2",
    outputs=("logits", "labels"),
    within=caption,
    units=count_next_tokens,
)
