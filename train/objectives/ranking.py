"""The objective that ranks: the right partner before every wrong one, by a margin."""

from dataclasses import replace
from functools import partial

import torch

from vlm.tensors import Float, Tensor
from vlm.train.objectives.pairwise import PairKinds, compare_pairs
from vlm.train.objectives.term import Inputs, Outputs, Term, TermOptions


def ranking(outputs: Outputs, inputs: Inputs, options: TermOptions) -> Tensor:
    """Max-margin ranking of cosines, the mean over pairs (VSE++, Faghri et al. 2018, ℓ_SH; `hardest`: ℓ_MH).

    `config.negatives` chooses the wrong partners, as "Deep Learning Applied to Image and Text Matching" does: `texts`
    for each picture, `images` for each text, `both`, or the `hardest` of both. All but `hardest` are summed, so the
    loss grows with the batch. There is no temperature. A further positive has no part: same_pairs = positive does what
    ignore does, since a hinge needs one cosine to stay below.
    """
    config = options.config
    pairs = replace(compare_pairs(outputs, inputs, config), are_positives=False)
    rows = partial(hinge_rows, margin=config.margin, hardest=config.negatives == "hardest")
    wrong_texts = [] if config.negatives == "images" else [pairs.mean_over_images(rows)]
    wrong_images = [] if config.negatives == "texts" else [pairs.mean_over_texts(rows)]
    return torch.stack([*wrong_texts, *wrong_images]).sum()


def hinge_rows(cosines: Float[Tensor, "B N"], kinds: PairKinds, *, margin: float, hardest: bool) -> Float[Tensor, " B"]:
    """[margin + s(wrong) - s(right)]₊ summed over each row's negatives, or of its hardest; 0 where it has none."""
    right = cosines.masked_fill(~kinds.positives, 0).sum(dim=1, keepdim=True)
    hinges = (margin + cosines - right).relu().masked_fill(~kinds.negatives, 0)
    return hinges.amax(dim=1) if hardest else hinges.sum(dim=1)


RANKING = Term(
    summary="max-margin ranking of cosines, against all wrong partners or the hardest",
    paper="Deep Learning Applied to Image and Text Matching; Faghri et al. 2018, VSE++, §3",
    outputs=("image_features", "text_features"),
    inputs=("same",),
    across=ranking,
)
