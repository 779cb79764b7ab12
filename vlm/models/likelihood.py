"""How likely a contrastive captioner finds texts, given pictures."""

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from vlm.tensors import Float, Float32, Int64, Tensor


def text_likelihoods(
    network: nn.Module, pixels: Float[Tensor, "B 3 H W"], tokens: Int64[Tensor, "T L"], *, pad_token: int
) -> Float32[Tensor, "B T"]:
    """Mean log-likelihood of each text's tokens given each picture, in nats (CoCa, Yu et al. 2022, equation 2).

    The end token counts, the start token and padding do not. Each picture and each text is read once. On the CPU.
    """
    _, image_tokens = cast(tuple[Tensor, Tensor], network._encode_image(pixels))  # pyright: ignore[reportCallIssue]
    is_token = tokens != pad_token
    end = int(is_token.any(dim=0).nonzero().max()) + 1
    tokens, is_token = tokens[:, :end], is_token[:, 1:end]
    _, states = cast(tuple[Tensor, Tensor], network._encode_text(tokens))  # pyright: ignore[reportCallIssue]
    columns: list[Tensor] = []
    for number, labels in enumerate(tokens[:, 1:]):
        shown = states[number, :-1].expand(len(pixels), -1, -1)
        logits = cast(Tensor, network.text_decoder(image_tokens, shown)).float()  # pyright: ignore[reportCallIssue]
        losses = F.cross_entropy(logits.transpose(1, 2), labels.expand(len(pixels), -1), reduction="none")
        columns.append(-(losses * is_token[number]).sum(dim=1) / is_token[number].sum())
    return torch.stack(columns, dim=1).cpu()
