"""Captions from a contrastive captioner, a token at a time.

How likely a contrastive captioner finds texts, given images.

Captions predicted at once instead of a token after the other, by the decoder of a contrastive captioner.
"""

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm.data.tokenizers import Tokenizer
from vlm.tensors import Bool, Float, Float32, Int64, Tensor


def generate_captions(
    network: nn.Module, pixels: Float[Tensor, "B 3 H W"], tokenizer: Tokenizer, prompt: str = ""
) -> Int64[Tensor, "B L"]:
    """Greedy decoding (CoCa §3.2 with beam 1): each next token is the likeliest one, until all rows have ended.

    prompt: words every caption begins with ("an image of", as BLIP does), to ask for one kind of sentence.
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


def text_log_likelihoods(
    network: nn.Module, pixels: Float[Tensor, "B 3 H W"], tokens: Int64[Tensor, "T L"], *, pad_token: int
) -> Float32[Tensor, "B T"]:
    """Mean log-likelihood of each text's tokens given each image, in nats (CoCa, Yu et al. 2022, equation 2).

    The end token counts, the start token and padding do not. Each image and each text is read once. On the CPU.
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


def can_caption_in_parallel(network: nn.Module) -> bool:
    """Whether the network is open_clip's CoCa with open_clip's own text tower."""
    from open_clip.transformer import TextTransformer

    return hasattr(network, "text_decoder") and isinstance(getattr(network, "text", None), TextTransformer)


def mask_width(network: nn.Module) -> int:
    """Length of the embedding that stands for a masked token."""
    return int(network.get_parameter("text.positional_embedding").shape[1])


def parallel_logits(
    network: nn.Module,
    memory: Float[Tensor, "B M W"],
    tokens: Int64[Tensor, "B L"],
    mask_embedding: Float[Tensor, " E"],
    is_parallel: Bool[Tensor, " B"],
    *,
    pad_token: int,
) -> tuple[Float[Tensor, "B K V"], Int64[Tensor, "B K"]]:
    """Logits of the next token at each place, with their labels (CapPa, Tschannen et al. 2023, §3).

    Where a row is parallel, every token is the mask embedding and no causal mask hides a place from another, in the
    text tower as in the decoder, so that the image is all that is known. The other rows go as in open_clip's CoCa.
    memory: the image's tokens, see `ImageReading`. K is the context length less one, whatever L: rows cut to their
    batch's longest caption would otherwise tell how long it is, and depend on the batch.
    """
    text, decoder = network.get_submodule("text"), network.get_submodule("text_decoder")
    whole = F.pad(tokens, (0, int(text.context_length) - tokens.shape[1]), value=pad_token)  # pyright: ignore[reportArgumentType]
    shown, labels = whole[:, :-1], whole[:, 1:]
    embedded = text.get_submodule("token_embedding")(shown)
    embedded = torch.where(is_parallel[:, None, None], mask_embedding.to(embedded.dtype), embedded)
    states = embedded + text.get_parameter("positional_embedding")[: shown.shape[1]].to(embedded.dtype)
    causal = None if getattr(text, "attn_mask", None) is None else cast(Tensor, text.attn_mask)
    states = text.get_submodule("transformer")(states, attn_mask=_masks(causal, is_parallel, states, text.heads))  # pyright: ignore[reportArgumentType]
    if text.cls_emb is None:
        states = text.get_submodule("ln_final")(states)
    masks = _masks(cast(Tensor, decoder.attn_mask), is_parallel, states, decoder.resblocks[0].attn.num_heads)  # pyright: ignore
    return _decode(decoder, memory, states, masks), labels


def _masks(
    causal: Float[Tensor, "C C"] | None, is_parallel: Bool[Tensor, " B"], states: Float[Tensor, "B K E"], heads: int
) -> Float[Tensor, "N K K"] | None:
    """The mask added to attention for each row and head: none for rows that are parallel."""
    if causal is None:
        return None
    length = states.shape[1]
    row = causal[:length, :length].to(states.dtype)
    each = torch.where(is_parallel[:, None, None], torch.zeros_like(row), row)
    return each.repeat_interleave(heads, dim=0)


def _decode(
    decoder: nn.Module,
    memory: Float[Tensor, "B M W"],
    states: Float[Tensor, "B K E"],
    masks: Float[Tensor, "N K K"] | None,
) -> Float[Tensor, "B K V"]:
    """open_clip's decoder with a mask for each row."""
    blocks = zip(decoder.resblocks, decoder.cross_attn, strict=True)  # pyright: ignore[reportArgumentType]
    for own, crossed in blocks:
        if decoder.grad_checkpointing:
            states = cast(Tensor, checkpoint(own, states, None, None, masks, use_reentrant=False))
            states = cast(Tensor, checkpoint(crossed, states, memory, memory, None, use_reentrant=False))
        else:
            states = own(states, attn_mask=masks)
            states = crossed(states, k_x=memory, v_x=memory)
    return decoder.get_submodule("ln_final")(states) @ decoder.get_parameter("text_projection")
