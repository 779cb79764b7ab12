"""Captions of which a share is predicted all at once: the parallel captioner (CapPa)."""

from torch import nn

from vlm.errors import UsageError
from vlm.models.encoder import VisionLanguageModel
from vlm.models.parallel_captioner import can_caption_in_parallel, mask_width
from vlm.models.row_noise import RowNoise
from vlm.tensors import Bool, Int64, Tensor
from vlm.train.objectives.captioning import count_next_tokens, next_token_loss
from vlm.train.objectives.term import Heads, Inputs, Outputs, Term, TermOptions

MASK_EMBEDDING = "mask_embedding"
"""Head that holds the embedding of a masked token, [1, E]."""

# of the draw that says which captions are predicted at once; any number would do
_DRAW = 0xCA99A


def draw_parallel(rows: Int64[Tensor, " B"], share: float) -> Bool[Tensor, " B"]:
    """Which samples are predicted at once: each with probability `share`, by its number in the run alone."""
    return RowNoise(seed=0, rows=rows).uniform(_DRAW, len(rows), 1, rows.device)[:, 0] < share


def cappa(outputs: Outputs, inputs: Inputs, options: TermOptions) -> Tensor:
    """Cross-entropy of each next token, padding left out, summed (CapPa, Tschannen et al. 2023, §3).

    A share of the captions (`parallel_share`) is predicted at once from the picture alone, the others token by token;
    every token weighs the same. The paper's decoder sees the picture in each of its layers; CoCa's in its upper half.
    """
    return next_token_loss(outputs["parallel_logits"], outputs["parallel_labels"], pad_token=options.pad_token)


def add_mask_embedding(model: VisionLanguageModel, options: TermOptions) -> Heads:
    """The embedding that stands for every token of a caption predicted at once.

    Raises:
        UsageError: the network cannot write captions so.
    """
    if not can_caption_in_parallel(model.network):
        raise UsageError(
            "cappa needs a contrastive captioner with open_clip's text tower, e.g. --architecture tiny-coca."
        )
    embedding = nn.Embedding(1, mask_width(model.network))
    nn.init.normal_(embedding.weight, std=0.02)  # as open_clip draws those of tokens
    return {MASK_EMBEDDING: embedding}


CAPPA = Term(
    summary="tokens of the caption, for a share of the captions all at once",
    paper="Tschannen et al. 2023, Image Captioners Are Scalable Vision Learners Too, §3",
    outputs=("parallel_logits", "parallel_labels"),
    inputs=("rows",),
    within=cappa,
    units=count_next_tokens,
    heads=add_mask_embedding,
)
