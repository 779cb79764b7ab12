"""Losses that learn from another network: teacher embeddings, precomputed or online, and the network's own EMA."""

from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.models.model import VisionLanguageModel
from vlm.tensor_types import Float, Tensor
from vlm.train.distributed import gather_detached, gather_with_gradient
from vlm.train.objectives.contrastive import at_least_float32, similarity_matrix, sum_over_blocks
from vlm.train.objectives.loss_term import Heads, Inputs, LossOptions, LossTerm, Outputs


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

        return sum_over_blocks(block_loss, [rows, teacher_rows], options.config.similarity_block) / len(rows)

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
