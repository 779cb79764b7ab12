"""Captions from a contrastive captioner, a token at a time."""

from typing import cast

import torch
from torch import nn

from vlm.data.tokenizers import Tokenizer
from vlm.tensors import Float, Int64, Tensor


def write_captions(
    network: nn.Module, pixels: Float[Tensor, "B 3 H W"], tokenizer: Tokenizer, prompt: str = ""
) -> Int64[Tensor, "B L"]:
    """Greedy decoding (CoCa §3.2 with beam 1): each next token is the likeliest one, until all rows have ended.

    prompt: words every caption begins with ("a picture of", as BLIP does), to ask for one kind of sentence.
    Returns rows that begin with the start token; what follows an end token is padding.
    """
    _, image_tokens = cast(tuple[Tensor, Tensor], network._encode_image(pixels))  # pyright: ignore[reportCallIssue]
    begin = [token for token in tokenizer.encode([prompt])[0].tolist() if token != tokenizer.pad_token][:-1]
    rows = torch.tensor([begin], dtype=torch.int64, device=pixels.device).repeat(len(pixels), 1)
    has_ended = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    while rows.shape[1] < tokenizer.context_length and not bool(has_ended.all()):
        _, text_tokens = cast(tuple[Tensor, Tensor], network._encode_text(rows))  # pyright: ignore[reportCallIssue]
        logits = network.text_decoder(image_tokens, text_tokens)[:, -1].float()  # pyright: ignore[reportCallIssue]
        logits[:, [tokenizer.start_token, tokenizer.pad_token]] = -torch.inf
        following = logits.argmax(dim=-1).masked_fill(has_ended, tokenizer.pad_token)
        has_ended |= following == tokenizer.end_token
        rows = torch.cat([rows, following[:, None]], dim=1)
    return rows
