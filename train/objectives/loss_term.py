"""What one objective is: a loss with its paper, what it reads, and whether it compares the pairs of a batch.

Inputs, by name, of the B samples that go through the network at once:

pixels        float [B, 3, H, W]     normalised pictures
tokens        int64 [B, L]           the drawn captions
same          int64 [B, G]           identities (key, caption, picture): equal numbers in one column mean the same
sub_tokens    int64 [B, S, L]        S sentences drawn from each sample's captions
local_pixels  float [B, V, 3, h, w]  V small crops of each picture
teacher_image float [B, D']          what a teacher makes of the picture as it is shown
teacher_text  float [B, D']          what it makes of the drawn caption
text_embedding float [B, E]          a stored embedding of the drawn caption
rows          int64 [B]              the number of each sample in the run

Outputs, by name: image_features and text_features [B, D] of unit length, logit_scale [] (the inverse temperature
itself), and what else the table of makers in `vlm.train.task` gives.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vlm.models.model import VisionLanguageModel
from vlm.tensors import Tensor
from vlm.train.run_config import ObjectiveConfig

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Heads = dict[str, nn.Module]

SHARED_OUTPUTS = frozenset({"logit_scale", "logit_bias"})
"""Outputs that belong to the whole batch, not to its rows."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What terms are told besides tensors."""

    config: ObjectiveConfig
    pad_token: int


LossFunction = Callable[[Outputs, Inputs, LossOptions], Tensor]


def one_per_sample(inputs: Inputs, options: LossOptions) -> Tensor:
    """One unit a sample."""
    first = next(iter(inputs.values()))
    return torch.tensor(float(len(first)), device=first.device)


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One objective; exactly one of `across` and `within` is given.

    across: compares the pairs of the batch. Given the rows of this process it returns a scalar whose mean over the
    processes is the loss of the global batch, and whose gradients, averaged alike, are its gradients.
    within: needs no other row: returns the sum over the rows it is given; the step divides it by the number of `units`
    in the global batch.
    outputs, inputs: the names it reads; of inputs those beyond pixels and tokens.
    heads: modules it trains beside the network, by name; they are kept in checkpoints, not in the model folder.
    """

    summary: str
    paper: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    batch_level: LossFunction | None = None
    sample_level: LossFunction | None = None
    normaliser: Callable[[Inputs, LossOptions], Tensor] = one_per_sample
    heads: Callable[[VisionLanguageModel, LossOptions], Heads] | None = None
