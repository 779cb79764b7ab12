"""DINO's self-distillation: crops and the EMA network's view of the whole are compared over learned prototypes."""

from collections.abc import Iterable
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Float, Tensor
from vlm.train.distributed import num_processes
from vlm.train.objectives.contrastive import at_least_float32
from vlm.train.objectives.loss_term import Heads, Inputs, LossOptions, LossTerm, Outputs

PROTOTYPE_HEAD = "prototypes"
"""Head from embeddings to prototypes, the student's and the teacher's, with the teacher's centre."""

# of DINO's recipes: width of the hidden layers, of the bottleneck, and the momentum of the centre
_HIDDEN = 2048
_BOTTLENECK = 256
_CENTRE_MOMENTUM = 0.9


class PrototypeHead(nn.Module):
    """DINO's projection head (Caron et al. 2021, §3.1 and appendix C) and that of its teacher, which is its EMA.

    Three layers with GELU, then cosines with K prototypes, both of unit length. centre: the running mean of the
    teacher's outputs, which is subtracted from them, so that no prototype wins everywhere. What a step has seen of them
    is gathered until `update` or `discard`.
    """

    centre: Tensor

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        hidden, bottleneck = min(_HIDDEN, 8 * width), min(_BOTTLENECK, 4 * width)
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, bottleneck), dim=1))
        self.teacher_layers = deepcopy(self.layers).requires_grad_(False)
        self.teacher_prototypes = nn.Parameter(self.prototypes.detach().clone(), requires_grad=False)
        self.register_buffer("centre", torch.zeros(prototypes))
        # no buffers: DDP would overwrite those of all processes by the first one's
        self._sums: list[Tensor] = []
        self._count = 0

    def forward(self, embeddings: Float[Tensor, "... D"]) -> Float[Tensor, "... K"]:
        """Cosines of the student's embeddings with its prototypes."""
        return F.linear(F.normalize(self.layers(embeddings), dim=-1), F.normalize(self.prototypes, dim=1))

    @torch.no_grad()
    def teach(self, embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Cosines of the teacher's embeddings with its prototypes; while training they count for the next centre."""
        projected = F.normalize(self.teacher_layers(embeddings), dim=-1)
        cosines = F.linear(projected, F.normalize(self.teacher_prototypes, dim=1))
        if self.training:
            self._sums.append(at_least_float32(cosines).sum(dim=0))
            self._count += len(cosines)
        return cosines

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """After a step: the centre moves to the mean of the global batch, the teacher to the student."""
        if self._count:
            total = torch.stack(self._sums).sum(dim=0)
            if num_processes() > 1:
                dist.all_reduce(total)
            # all processes have the same number of rows
            mean = total / (self._count * num_processes())
            self.centre.lerp_(mean.to(self.centre.dtype), 1 - _CENTRE_MOMENTUM)
        self.discard()
        student = [*self.layers.parameters(), self.prototypes]
        teacher = [*self.teacher_layers.parameters(), self.teacher_prototypes]
        for mean, value in zip(teacher, student, strict=True):
            mean.lerp_(value, 1 - decay)

    def discard(self) -> None:
        """A step was skipped: nothing of it counts."""
        self._sums.clear()
        self._count = 0


def update_prototype_heads(heads: Iterable[nn.Module], decay: float) -> None:
    """Update those of the heads that have a teacher."""
    for head in heads:
        if isinstance(head, PrototypeHead):
            head.update(decay)


def discard_prototype_statistics(heads: Iterable[nn.Module]) -> None:
    """Forget what a skipped step has gathered."""
    for head in heads:
        if isinstance(head, PrototypeHead):
            head.discard()


def dino(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Cross-entropy of crops with the EMA network's view of the whole over K prototypes, mean over crops, summed.

    RS-M-CLIP (Silva et al. 2024) adds DINO's loss (Caron et al. 2021, equations 1 to 3) to the contrastive one:
    -Σ_k P_t(k) log P_s(k), with P_s = softmax(s / τ_s) of a crop, P_t = softmax((t - c) / τ_t) of the whole view, c the
    running mean of t, τ_s `prototype_temperature` and τ_t `target_temperature`. The paper shows the teacher two large
    crops; here it sees the view that the contrastive term does. `local_to_global` compares the embeddings themselves.
    """
    config = options.config
    student = at_least_float32(outputs["crop_prototypes"]) / config.prototype_temperature
    teacher = at_least_float32(outputs["target_prototypes"]).detach()
    targets = ((teacher - outputs["prototype_centre"].detach()) / config.target_temperature).softmax(dim=-1)
    return -(targets[:, None] * student.log_softmax(dim=-1)).sum(dim=-1).mean(dim=1).sum()


def prototype_head(model: VisionLanguageModel, options: LossOptions) -> Heads:
    """The projection head."""
    return {PROTOTYPE_HEAD: PrototypeHead(model.embedding_size, options.config.prototypes)}


DINO = LossTerm(
    summary="cross-entropy of small crops with the EMA network's whole view over learned prototypes",
    paper="Silva et al. 2024, RS-M-CLIP; Caron et al. 2021, DINO, equations 1 to 3",
    outputs=("crop_prototypes", "target_prototypes", "prototype_centre"),
    inputs=("local_pixels", "global_target"),
    sample_level=dino,
    heads=prototype_head,
)
