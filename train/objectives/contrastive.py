"""Objectives that compare every picture of the batch with every text."""

from vlm.tensors import Tensor
from vlm.train.objectives.losses import decoupled_rows, sigmoid_rows, softmax_rows
from vlm.train.objectives.pairwise import PairKinds, compare_pairs
from vlm.train.objectives.term import Inputs, Outputs, Term, TermOptions


def clip(outputs: Outputs, inputs: Inputs, options: TermOptions) -> Tensor:
    """Softmax contrastive learning, the mean of both directions (CLIP, Radford et al. 2021, figure 3)."""
    pairs, scale = compare_pairs(outputs, inputs, options.config), outputs["logit_scale"]

    def rows(cosines: Tensor, kinds: PairKinds) -> Tensor:
        return softmax_rows(scale * cosines, kinds)

    return (pairs.mean_over_images(rows) + pairs.mean_over_texts(rows)) / 2


def siglip(outputs: Outputs, inputs: Inputs, options: TermOptions) -> Tensor:
    """Sigmoid contrastive learning, the mean over pictures of the sum over texts (SigLIP, Zhai et al. 2023, §3.2).

    Each pair of the global batch counts once, so there is one direction.
    """
    pairs, scale, bias = compare_pairs(outputs, inputs, options.config), outputs["logit_scale"], outputs["logit_bias"]

    def rows(cosines: Tensor, kinds: PairKinds) -> Tensor:
        return sigmoid_rows(scale * cosines + bias, kinds)

    return pairs.mean_over_images(rows)


def decoupled(outputs: Outputs, inputs: Inputs, options: TermOptions) -> Tensor:
    """Decoupled contrastive learning, the mean of both directions (DCL, Yeh et al. 2021, equation 6)."""
    pairs, scale = compare_pairs(outputs, inputs, options.config), outputs["logit_scale"]

    def rows(cosines: Tensor, kinds: PairKinds) -> Tensor:
        return decoupled_rows(scale * cosines, kinds)

    return (pairs.mean_over_images(rows) + pairs.mean_over_texts(rows)) / 2


CLIP = Term(
    summary="softmax contrastive",
    paper="Radford et al. 2021, CLIP, §2.3",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=("same",),
    across=clip,
)

SIGLIP = Term(
    summary="sigmoid contrastive: every pair judged by itself",
    paper="Zhai et al. 2023, SigLIP, §3.2 and algorithm 1",
    outputs=("image_features", "text_features", "logit_scale", "logit_bias"),
    inputs=("same",),
    across=siglip,
)

DCL = Term(
    summary="softmax contrastive with the positive out of the denominator, for small batches",
    paper="Yeh et al. 2021, Decoupled Contrastive Learning, equation 6",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=("same",),
    across=decoupled,
)
