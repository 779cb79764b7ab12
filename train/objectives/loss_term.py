"""A loss term: its function with its paper, its inputs, and whether it compares the pairs of a batch.

Inputs, by name, of the B samples that go through the network at once:

pixels        float [B, 3, H, W]     normalised images
tokens        int64 [B, L]           the drawn captions
same          int64 [B, G]           identities (key, caption, image): equal numbers in one column mean the same
sub_tokens    int64 [B, S, L]        S sentences drawn from each sample's captions
local_pixels  float [B, V, 3, h, w]  V small crops of each image
teacher_image float [B, D']          a teacher's embedding of the image in the view of the batch
teacher_text  float [B, D']          its embedding of the drawn caption
text_embedding float [B, E]          a stored embedding of the drawn caption
class_label   int64 [B]              the number of each sample's class
rows          int64 [B]              the number of each sample in the run
image_average, text_average, inner_rate  float [B]  see `vlm.train.objectives.global_contrastive`

Outputs, by name: image_features and text_features [B, D] of unit length, logit_scale [] (the inverse temperature
itself), grouping_scale [] (that of `grouping`), prototype_centre [K] (of `dino`), and what else `OUTPUT_HEADS` of
`vlm.train.task` gives.

Terms share the engine over blocks of the similarity matrix (`sum_over_blocks`), so that it is never held whole.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Bool, Float, Int64, Tensor
from vlm.train.run_config import ObjectiveConfig

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Heads = dict[str, nn.Module]

SHARED_OUTPUTS = frozenset({"logit_scale", "logit_bias", "grouping_scale", "prototype_centre"})
"""Outputs that belong to the whole batch, not to its rows."""


class LearnedScale(nn.Module):
    """An inverse temperature of a term's own, a head that takes nothing: learned as its logarithm, first CLIP's."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(-log(0.07)))

    def forward(self) -> Tensor:
        """The inverse temperature itself, []."""
        return self.logit_scale.exp()


MAX_LOG_SCALE = log(100)
"""Keeps the temperature from falling below 0.01 (CLIP §2.5)."""


@torch.no_grad()
def clamp_logit_scales(modules: Iterable[nn.Module]) -> None:
    """Clamp the learned log of the inverse temperature of each module that has one to MAX_LOG_SCALE."""
    for module in modules:
        # its own alone: Swin V2's layers hold temperatures of the same name
        scale = getattr(module, "logit_scale", None)
        if scale is not None:
            scale.clamp_(max=MAX_LOG_SCALE)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What terms read in addition to tensors."""

    config: ObjectiveConfig
    pad_token: int


LossFunction = Callable[[Outputs, Inputs, LossOptions], Tensor]


def one_per_sample(inputs: Inputs, options: LossOptions) -> Tensor:
    """One unit per sample."""
    # any input will do; on its device, since NCCL sums counts over processes there only
    first = next(iter(inputs.values()))
    return torch.tensor(float(len(first)), device=first.device)


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One objective; exactly one of `batch_level` and `sample_level` is given.

    batch_level: compares the pairs of the batch. Given the rows of this process it returns a scalar whose mean over the
        processes is the loss of the global batch, and whose gradients, averaged likewise, are its gradients.
    sample_level: needs no other row: returns the sum over its rows; the step divides it by the normaliser.
    normaliser: counts the units (samples, tokens) of some inputs, which are summed over the global batch.
    outputs, inputs: the names it reads; of inputs those beyond pixels and tokens.
    heads: modules it trains in addition to the network, by name; kept in checkpoints, not in the model folder.
    new_averages: of a term with a state for each sample: the new values of its inputs of the same names, computed from
        this batch; its loss reads these, and the run keeps them unless the step is skipped.
    """

    summary: str
    paper: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    batch_level: LossFunction | None = None
    sample_level: LossFunction | None = None
    normaliser: Callable[[Inputs, LossOptions], Tensor] = one_per_sample
    heads: Callable[[VisionLanguageModel, LossOptions], Heads] | None = None
    new_averages: Callable[[Outputs, Inputs, LossOptions], Inputs] | None = None


def sum_over_blocks(block_loss: Callable[..., Tensor], rows: Sequence[Tensor], block: int) -> Float[Tensor, ""]:
    """The sum of a loss over blocks of rows, each computed again when gradients are taken.

    block_loss: from some rows of each tensor, in the order given, to the sum of their losses, a scalar; it must draw
    no random numbers and exchange nothing between processes. What it reads in addition (columns, a temperature) gets
    its gradient as well. rows: tensors of the same length. A single block is kept instead of computed twice.
    """
    blocks = list(zip(*(tensor.split(block) for tensor in rows), strict=True))
    if len(blocks) == 1:
        return block_loss(*blocks[0])
    sums: list[Tensor] = []
    for tensors in blocks:
        # without a saved random state, since block losses draw nothing
        loss = checkpoint(block_loss, *tensors, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(loss, torch.Tensor)
        sums.append(loss)
    return torch.stack(sums).sum()


def similarity_matrix(rows: Float[Tensor, "B D"], columns: Float[Tensor, "N D"]) -> Float[Tensor, "B N"]:
    """All dot products of rows and columns, in single precision or better, inside autocast too."""
    # bf16 has 8 bits: cosines would be rounded to 1/256, and differences of logits by a temperature of 0.01 to 0.4
    with torch.autocast(rows.device.type, enabled=False):
        return at_least_float32(rows) @ at_least_float32(columns).T


def at_least_float32(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The values in single precision, or in double where they already are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def same_identity(rows: Int64[Tensor, "B G"], columns: Int64[Tensor, "N G"]) -> Bool[Tensor, "B N"]:
    """Whether row and column have the same number in any of the G entries; 0 is no identity and equals nothing.

    >>> same_identity(torch.tensor([[1, 0], [2, 5]]), torch.tensor([[1, 5], [0, 0]])).tolist()
    [[True, False], [True, False]]
    """
    is_same = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    for own, others in zip(rows.T, columns.T, strict=True):
        is_same |= (own[:, None] == others) & (own != 0)[:, None]
    return is_same
