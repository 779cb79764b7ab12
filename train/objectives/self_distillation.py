"""Small crops of a picture learn what an average of the network makes of the whole."""

import torch
from torch.nn import functional as F

from vlm.tensors import Tensor
from vlm.train.objectives.term import Inputs, Outputs, Term, TermOptions


def local_to_global(outputs: Outputs, inputs: Inputs, options: TermOptions) -> Tensor:
    """1 − cosine of each crop's embedding and the averaged network's of the whole view, mean over crops, summed.

    As in RS-M-CLIP (Silva et al. 2024) and DINO (Caron et al. 2021, equation 2) the student sees crops, the teacher is
    a running mean of the student and gets no gradient. They compare softmaxes over learned prototypes, which needs a
    projection head and a running centre of the teacher's outputs against collapse. Here the embeddings themselves are
    compared, as in BYOL (Grill et al. 2020, equation 2, halved), so nothing is kept from batch to batch; what prevents
    collapse is the contrastive term beside it, without which this one must not be trained.
    """
    crops, target = outputs["local_features"], inputs["global_target"].detach()
    precise = torch.promote_types(crops.dtype, torch.float32)
    cosines = (crops.to(precise) * F.normalize(target.to(precise), dim=-1)[:, None]).sum(dim=-1)
    return (1 - cosines).mean(dim=1).sum()


LOCAL_TO_GLOBAL = Term(
    summary="small crops agree with the averaged network's whole view",
    paper="Silva et al. 2024, RS-M-CLIP; Caron et al. 2021, DINO, equation 2",
    outputs=("local_features",),
    inputs=("local_pixels", "global_target"),
    within=local_to_global,
)
