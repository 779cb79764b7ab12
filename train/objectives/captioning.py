"""Captioning losses: next-token prediction (CoCa), and parallel prediction for a share of the captions (CapPa)."""

import torch
from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.models.coca import can_caption_in_parallel, mask_width
from vlm.models.dropout import PerSampleNoise
from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Bool, Float, Int64, Tensor
from vlm.train.objectives.loss_term import Heads, Inputs, LossOptions, LossTerm, Outputs


def caption(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Cross-entropy of each next token, padding left out, summed (CoCa, Yu et al. 2022, equation 2).

    With label smoothing while it trains (`label_smoothing`, Szegedy et al. 2016, §7).
    """
    return next_token_loss(
        outputs["logits"],
        outputs["labels"],
        pad_token=options.pad_token,
        label_smoothing=options.config.label_smoothing,
    )


def next_token_loss(
    logits: Float[Tensor, "B L V"], labels: Int64[Tensor, "B L"], *, pad_token: int, label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy summed over the tokens that are not padding, in single precision at least."""
    # a softmax over tens of thousands of tokens loses small probabilities in half precision
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        precise.flatten(0, 1),
        labels.flatten(),
        ignore_index=pad_token,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def count_target_tokens(inputs: Inputs, options: LossOptions) -> Tensor:
    """Number of predicted tokens: all but the first of each caption."""
    return (inputs["tokens"][:, 1:] != options.pad_token).sum()


CAPTION = LossTerm(
    summary="next-token prediction of the caption, given the image",
    paper="Yu et al. 2022, CoCa, equation 2",
    outputs=("logits", "labels"),
    sample_level=caption,
    normaliser=count_target_tokens,
)


MASK_EMBEDDING = "mask_embedding"
"""Head that holds the embedding of a masked token, [1, E]."""

# the layer number of the draw that selects the captions predicted in parallel; any number will do
_DRAW = 0xCA99A


def choose_parallel_captions(rows: Int64[Tensor, " B"], share: float) -> Bool[Tensor, " B"]:
    """Which samples are predicted in parallel: each with probability `share`, decided by its number in the run."""
    # by the sample's number alone, so that micro-batches and resumed runs choose alike
    return PerSampleNoise(seed=0, rows=rows).uniform(_DRAW, len(rows), 1, rows.device)[:, 0] < share


def cappa(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Cross-entropy of each next token, padding left out, summed (CapPa, Tschannen et al. 2023, §3).

    A share of the captions (`parallel_share`) is predicted in parallel from the image alone, the others token by token;
    every token weighs the same. The paper's decoder sees the image in each of its layers; CoCa's in its upper half.
    """
    return next_token_loss(outputs["parallel_logits"], outputs["parallel_labels"], pad_token=options.pad_token)


def add_mask_embedding(model: VisionLanguageModel, options: LossOptions) -> Heads:
    """The embedding that stands for every token of a caption predicted in parallel.

    Raises:
        UsageError: the network cannot predict captions at once.
    """
    if not can_caption_in_parallel(model.network):
        raise UsageError(
            "cappa needs a contrastive captioner with open_clip's text tower, e.g. --architecture tiny-coca."
        )
    embedding = nn.Embedding(1, mask_width(model.network))
    nn.init.normal_(embedding.weight, std=0.02)  # as open_clip draws those of tokens
    return {MASK_EMBEDDING: embedding}


CAPPA = LossTerm(
    summary="next-token prediction; for a share of the captions all tokens in parallel",
    paper="Tschannen et al. 2023, Image Captioners Are Scalable Vision Learners Too, §3",
    outputs=("parallel_logits", "parallel_labels"),
    inputs=("rows",),
    sample_level=cappa,
    normaliser=count_target_tokens,
    heads=add_mask_embedding,
)
