"""Losses that learn from another network: teacher embeddings, precomputed or online, and the network's own EMA."""

from collections.abc import Iterable
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Float, Tensor
from vlm.train.distributed import gather_detached, gather_with_gradient, num_processes
from vlm.train.objectives.loss_term import (
    Heads,
    Inputs,
    LossOptions,
    LossTerm,
    Outputs,
    at_least_float32,
    similarity_matrix,
    sum_over_blocks,
)


def distill(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """KL(teacher ‖ student) of the similarities of each image with all texts, and the reverse; the mean of both.

    MobileCLIP (Vasu et al. 2023), equations 2 and 3, with one teacher; dataset reinforcement (Faghri et al. 2023), §2,
    where its embeddings are stored. The teacher's rows may be of any length; they are normalised, and get no gradient.
    Its inverse temperature is `config.teacher_scale`, the student's is learned. The loss is 0 where both agree;
    open_clip's cross-entropy is larger by the teacher's entropy, a constant.
    """
    images = at_least_float32(outputs["image_features"])
    texts = at_least_float32(outputs["text_features"])
    scale = outputs["logit_scale"]
    teacher_images = normalise_rows(inputs["teacher_image"])
    teacher_texts = normalise_rows(inputs["teacher_text"])
    teacher_scale = options.config.teacher_scale

    def direction(rows: Tensor, others: Tensor, teacher_rows: Tensor, teacher_others: Tensor) -> Tensor:
        # outside the blocks, which the backward pass computes again: a collective runs once, on all processes alike
        columns = gather_with_gradient(others)
        teacher_columns = gather_detached(teacher_others)

        def block_loss(rows: Tensor, teacher_rows: Tensor) -> Tensor:
            student = scale * similarity_matrix(rows, columns)
            teacher = teacher_scale * similarity_matrix(teacher_rows, teacher_columns)
            return kl_divergence(student, teacher).sum()

        block = options.config.rows_at_once(len(columns))
        return sum_over_blocks(block_loss, [rows, teacher_rows], block) / len(rows)

    by_image = direction(images, texts, teacher_images, teacher_texts)
    by_text = direction(texts, images, teacher_texts, teacher_images)
    return (by_image + by_text) / 2


def kl_divergence(student: Float[Tensor, "B N"], teacher: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """KL(teacher ‖ student) of the softmaxes of each row of logits."""
    # log_target: the logarithm of a softmax that underflowed would be -inf
    divergences = F.kl_div(student.log_softmax(dim=1), teacher.log_softmax(dim=1), reduction="none", log_target=True)
    return divergences.sum(dim=1)


def normalise_rows(rows: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """The rows normalised, as constants, in single precision or better."""
    return F.normalize(at_least_float32(rows.detach()), dim=1)


def text_align(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """1 - cosine of the projected image and the stored embedding of its text, summed (GPT4Image, Ding et al. 2023).

    The paper compares a classifier's features with the embedding of a description; here the projection is of the
    image's joint embedding, so that the loss reaches all of the image tower.

    Raises:
        UsageError: the stored embeddings have another length than the head.
    """
    projected = outputs["aligned_image"]
    target = inputs["text_embedding"]
    if projected.shape[1] != target.shape[1]:
        raise UsageError(
            f"text_embedding_size = {projected.shape[1]}, but the stored text embeddings have {target.shape[1]} "
            f"numbers; give --text-embedding-size {target.shape[1]}."
        )
    cosines = (F.normalize(at_least_float32(projected), dim=1) * normalise_rows(target)).sum(dim=1)
    return (1 - cosines).sum()


def alignment_head(model: VisionLanguageModel, options: LossOptions) -> Heads:
    """The linear map from the image's embedding to the space of the stored text embeddings.

    Raises:
        UsageError: their length is not configured.
    """
    size = options.config.text_embedding_size
    if size < 1:
        raise UsageError(
            f"text_embedding_size = {size}: text_align needs the length of the stored text embeddings; "
            "give it, e.g. --text-embedding-size 768."
        )
    # no bias: cosines compare directions
    return {"text_align": nn.Linear(model.embedding_size, size, bias=False)}


DISTILL = LossTerm(
    summary="distillation of a teacher's image-text similarities within the batch",
    paper="Vasu et al. 2023, MobileCLIP, equations 2 and 3; Faghri et al. 2023, dataset reinforcement",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=("teacher_image", "teacher_text"),
    batch_level=distill,
)

TEXT_ALIGN = LossTerm(
    summary="cosine loss between a projected image embedding and the stored embedding of its text",
    paper="Ding et al. 2023, GPT4Image",
    outputs=("aligned_image",),
    inputs=("text_embedding",),
    sample_level=text_align,
    heads=alignment_head,
)


def local_to_global(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """1 − cosine of each crop's embedding and the EMA network's of the whole view, mean over crops, summed.

    As in RS-M-CLIP (Silva et al. 2024) and DINO (Caron et al. 2021, equation 2) the student sees crops, the teacher is
    an EMA of the student and gets no gradient. They compare softmaxes over learned prototypes, which needs a
    projection head and a running centre of the teacher's outputs against collapse. Here the embeddings themselves are
    compared, as in BYOL (Grill et al. 2020, equation 2, halved), so nothing is kept from batch to batch; what prevents
    collapse is the contrastive term next to it, without which this one must not be trained.
    """
    crops = at_least_float32(outputs["local_features"])
    target = normalise_rows(inputs["global_target"].to(crops.dtype))
    cosines = (crops * target[:, None]).sum(dim=-1)
    return (1 - cosines).mean(dim=1).sum()


LOCAL_TO_GLOBAL = LossTerm(
    summary="cosine loss between small crops and the EMA network's embedding of the whole view",
    paper="Silva et al. 2024, RS-M-CLIP; Caron et al. 2021, DINO, equation 2",
    outputs=("local_features",),
    inputs=("local_pixels", "global_target"),
    sample_level=local_to_global,
)


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
            # in single precision: a sum in half precision would lose the last rows of a large batch
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
