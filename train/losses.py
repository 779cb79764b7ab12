"""Losses as pure functions of embeddings and logits; correct as well when the batch is spread over processes."""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from vlm.tensors import Float, Int64, Tensor


def softmax_contrastive_loss(
    images: Float[Tensor, "B D"], texts: Float[Tensor, "B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy over the cosines of all pairs of the global batch (CLIP, figure 3).

    images, texts: unit vectors of this process's pairs. scale: inverse temperature.
    The value is the mean over this process's rows against the columns of all processes; averaged over processes, it
    and its gradients are those of the undivided batch.
    """
    all_images, all_texts = gather_with_gradient(images), gather_with_gradient(texts)
    first = _process_number() * len(images)
    targets = torch.arange(first, first + len(images), device=images.device)
    by_image = F.cross_entropy(scale * images @ all_texts.T, targets)
    by_text = F.cross_entropy(scale * texts @ all_images.T, targets)
    return (by_image + by_text) / 2


def caption_loss(logits: Float[Tensor, "B L V"], labels: Int64[Tensor, "B L"], *, pad_token: int) -> Float[Tensor, ""]:
    """Cross-entropy of each next token, padding left out (CoCa, equation 2, as a mean over tokens).

    The divisor is the number of tokens of the global batch, so that processes with longer captions weigh more.
    """
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=pad_token, reduction="sum")
    count = (labels != pad_token).sum()
    if _num_processes() > 1:
        dist.all_reduce(count)
    return total * _num_processes() / count.clamp(min=1)


def gather_with_gradient(rows: Float[Tensor, "B D"]) -> Float[Tensor, "N D"]:
    """The rows of all processes in process order; gradients flow back to the process a row came from."""
    if _num_processes() == 1:
        return rows
    return _Gather.apply(rows)  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(_num_processes())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous()
        dist.all_reduce(summed)
        share = len(summed) // _num_processes()
        return summed[_process_number() * share :][:share]


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _process_number() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
