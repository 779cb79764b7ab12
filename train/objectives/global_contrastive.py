"""Global contrastive losses: each sample against all samples of the data, from small batches (SogCLR, FastCLIP).

The mean over the negatives of all the data, which a batch only samples, is estimated for each image and each text by a
moving average u over the batches that the sample was in. A loss with these averages in its denominators has the
gradient of the whole data's loss up to an error that falls with training, whatever the batch size (Yuan et al. 2022,
Provable Stochastic Optimization for Global Contrastive Learning, theorem 1).

With s the cosines, τ the temperature, N the samples of the global batch and γ the inner learning rate:

    g(i) = 1/(N-1) Σ_{j≠i} exp((s_ij - s_ii)/τ)      of an image against the texts; of a text against the images
    u(i) ← (1 - γ) u(i) + γ g(i)                     g(i) itself the first time that a sample is seen
    gradient = mean over i of τ/(ε + u(i)) ∇g(i)     the mean of both directions

Averages are kept and combined as logarithms: at a temperature of 0.01 exp((s_ij - s_ii)/τ) has no single precision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlm.tensor_types import Bool, Float, Int64, Tensor
from vlm.train.distributed import gather_detached, gather_with_gradient, local_columns
from vlm.train.objectives.loss_term import (
    Inputs,
    LossOptions,
    LossTerm,
    Outputs,
    at_least_float32,
    same_identity,
    similarity_matrix,
    sum_over_blocks,
)

IMAGE_AVERAGE = "image_average"
"""Input and new value: the logarithm of u of each image [B]; NaN for a sample that was not seen yet."""

TEXT_AVERAGE = "text_average"
"""The same of each text."""

INNER_RATE = "inner_rate"
"""Input: γ of this step, for each sample [B]."""

SAMPLES = "samples"
"""Input: the number of each sample in the data [B]."""

EPSILON = 1e-14
"""ε of FastCLIP's code."""


def sogclr(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Global contrastive loss at a constant temperature (SogCLR, Yuan et al. 2022, algorithm 1; FastCLIP-v1).

    Its value is the mean over samples of τ (log(ε + u_image) + log(ε + u_text)) / 2, its gradient the one above. The
    temperature is the model's, which gets no gradient; `--temperature` sets it. Pairs that share an identity are
    neither positives nor negatives, unless `same_pairs` is `negative`.
    """
    scale = outputs["logit_scale"]
    # its gradient is zero rather than none: several processes wait for the gradient of every weight that is trained
    constant = scale.detach() + 0 * scale
    return _global_loss(outputs, inputs, options, constant)


def fastclip(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Tensor:
    """Robust global contrastive loss with one learned temperature (FastCLIP-v3, Wei et al. 2024, RGCL-g).

    The mean over samples of τ (log(ε + u_image) + log(ε + u_text)) / 2 + ρτ, half of the paper's, with the gradient
    above; that of τ is the mean of (log(ε + u) + τ/(ε + u) ∂g/∂τ) over both directions, plus ρ. The paper steps along
    τ with a learning rate of its own; here log(1/τ) is what is trained (`--logit-scale-lr-mult`), never below 0.01.
    """
    scale = outputs["logit_scale"]
    return _global_loss(outputs, inputs, options, scale) + options.config.rho / scale


def _global_loss(outputs: Outputs, inputs: Inputs, options: LossOptions, scale: Tensor) -> Tensor:
    """The mean over samples of τ log(ε + u), with the gradient of a global loss."""
    by_image = _direction(outputs, inputs, options, scale, "image")
    by_text = _direction(outputs, inputs, options, scale, "text")
    return (by_image + by_text) / 2


def _direction(outputs: Outputs, inputs: Inputs, options: LossOptions, scale: Tensor, side: str) -> Tensor:
    averages = inputs[IMAGE_AVERAGE if side == "image" else TEXT_AVERAGE]

    def block_loss(log_means: Tensor, averages: Tensor) -> Tensor:
        # a sample without any negative has -inf, and no part in the loss
        has_negatives = torch.isfinite(log_means) & torch.isfinite(averages)
        log_u = torch.where(has_negatives, averages, 0)
        log_g = torch.where(has_negatives, log_means, 0)
        # log(ε + u); in double precision, where ε does not vanish beside a small u
        denominators = torch.logaddexp(log_u, torch.full_like(log_u, math.log(EPSILON)))
        weights = (log_g.detach() - denominators).exp() / scale.detach()
        # g/(ε + u) · ∇log g = ∇g/(ε + u); the value of what only brings the gradient is taken off again
        surrogate = weights * log_g
        losses = denominators / scale + surrogate - surrogate.detach()
        return (losses * has_negatives).sum()

    total = _over_blocks(outputs, inputs, options, scale, side, block_loss, averages)
    return total / len(averages)


@torch.no_grad()
def new_averages(outputs: Outputs, inputs: Inputs, options: LossOptions) -> Inputs:
    """The logarithms of the moving averages with this batch in them, of each image and each text.

    A sample without negatives keeps what it had; the average of one that was never seen is its first value.
    """
    rate = inputs[INNER_RATE]
    averages: Inputs = {}
    for name, side in ((IMAGE_AVERAGE, "image"), (TEXT_AVERAGE, "text")):
        log_means: list[Tensor] = []

        def keep(own: Tensor, kept: list[Tensor] = log_means) -> Tensor:
            kept.append(own)
            return own.new_zeros(())

        _over_blocks(outputs, inputs, options, outputs["logit_scale"], side, keep)
        new = torch.cat(log_means)
        old = inputs[name].to(new.dtype)
        share = rate.to(new.dtype)
        combined = torch.logaddexp(torch.log1p(-share) + old, share.log() + new)
        combined = torch.where(torch.isnan(old), new, combined)
        averages[name] = torch.where(torch.isfinite(new), combined, old)
    return averages


def _over_blocks(
    outputs: Outputs,
    inputs: Inputs,
    options: LossOptions,
    scale: Tensor,
    side: str,
    block_loss: Callable[..., Tensor],
    *row_tensors: Tensor,
) -> Float[Tensor, ""]:
    """The sum of a loss over blocks of rows, from log g of each row and the given tensors.

    side: `image` compares each image of this process with the texts of all, `text` the other way round.
    """
    other_side = "text" if side == "image" else "image"
    rows = at_least_float32(outputs[f"{side}_features"])
    partners = at_least_float32(outputs[f"{other_side}_features"])
    columns = gather_with_gradient(partners)
    column_numbers = torch.arange(len(columns), device=columns.device)
    own_columns = local_columns(len(rows), rows.device)
    # without same_pairs each pair has an identity of its own; 0 would be none
    same = inputs["same"] if options.config.same_pairs != "negative" else own_columns[:, None] + 1
    all_same = gather_detached(same)

    def loss(rows: Tensor, partners: Tensor, own: Tensor, same: Tensor, *others: Tensor) -> Tensor:
        cosines = similarity_matrix(rows, columns)
        is_negative = (own[:, None] != column_numbers) & ~same_identity(same, all_same)
        differences = scale * (cosines - (rows * partners).sum(dim=1, keepdim=True))
        return block_loss(log_mean_exp(differences, is_negative), *others)

    tensors = [rows, partners, own_columns, same, *row_tensors]
    return sum_over_blocks(loss, tensors, options.config.rows_at_once(len(columns)))


def log_mean_exp(values: Float[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """log of the mean of exp over each row's values where the mask is set; -inf where it is set nowhere.

    >>> log_mean_exp(torch.zeros(1, 3), torch.tensor([[True, True, False]])).tolist()
    [0.0]
    """
    number = mask.sum(dim=1)
    # a logsumexp over nothing but -inf has a NaN gradient
    compared = values.masked_fill(~mask & (number > 0)[:, None], -torch.inf)
    return torch.where(number > 0, compared.logsumexp(dim=1) - number.clamp(min=1).to(values.dtype).log(), -torch.inf)


@dataclass(frozen=True, kw_only=True)
class GlobalAverages:
    """The moving averages of all samples, by their number in the data: part of a run's state, equal on all processes.

    images, texts: logarithms of u [N], in single precision on the CPU, NaN for samples not seen yet.
    """

    images: Float[Tensor, " N"]
    texts: Float[Tensor, " N"]

    @classmethod
    def unseen(cls, num_samples: int) -> "GlobalAverages":
        """Of no sample yet."""
        return cls(images=torch.full((num_samples,), torch.nan), texts=torch.full((num_samples,), torch.nan))

    def inputs(self, samples: Int64[Tensor, " B"]) -> Inputs:
        """The averages of some samples, as terms read them."""
        return {IMAGE_AVERAGE: self.images[samples], TEXT_AVERAGE: self.texts[samples]}

    def update(self, samples: Int64[Tensor, " B"], averages: Inputs) -> None:
        """Keep new averages of this process's samples, and of those of all others; all processes call it."""
        numbers = gather_detached(samples).cpu().numpy()
        for name, held in ((IMAGE_AVERAGE, self.images), (TEXT_AVERAGE, self.texts)):
            # numpy's assignment keeps the last of a sample that is twice in a batch, torch's any of them
            held.numpy()[numbers] = gather_detached(averages[name].float()).cpu().numpy()

    def tensors(self) -> dict[str, Tensor]:
        """By name, as a checkpoint holds them."""
        return {"images": self.images, "texts": self.texts}


def inner_rate_at(epoch: int, *, lowest: float, decay_epochs: float) -> float:
    """γ in an epoch: from 1 in the first along a cosine to `lowest` after `decay_epochs` (FastCLIP, equation 7).

    Constant from the second epoch on where decay_epochs is 0, as SogCLR has it.

    >>> [round(inner_rate_at(epoch, lowest=0.2, decay_epochs=4), 3) for epoch in range(6)]
    [1.0, 0.883, 0.6, 0.317, 0.2, 0.2]
    """
    if epoch == 0:
        return 1.0
    if epoch >= decay_epochs:
        return lowest
    return lowest + 0.5 * (1 + math.cos(math.pi * epoch / decay_epochs)) * (1 - lowest)


_INPUTS = ("same", IMAGE_AVERAGE, TEXT_AVERAGE, INNER_RATE)

SOGCLR = LossTerm(
    summary="softmax contrastive against all the data, by a moving average for each sample; constant temperature",
    paper="Yuan et al. 2022, SogCLR, algorithm 1; Wei et al. 2024, FastCLIP-v1",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=_INPUTS,
    batch_level=sogclr,
    new_averages=new_averages,
)

FASTCLIP = LossTerm(
    summary="the same with a learned temperature and a schedule of the averages' rate",
    paper="Wei et al. 2024, FastCLIP-v3",
    outputs=("image_features", "text_features", "logit_scale"),
    inputs=_INPUTS,
    batch_level=fastclip,
    new_averages=new_averages,
)
