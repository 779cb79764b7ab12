"""The caption decoder of a contrastive captioner (CoCa): likelihoods of captions, and decoding all places at once."""

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm.models.network import Captioner
from vlm.tensor_types import Bool, Float, Float32, Int64, Tensor


def text_log_likelihoods(
    network: Captioner, pixels: Float[Tensor, "B 3 H W"], tokens: Int64[Tensor, "T L"], *, pad_token: int
) -> Float32[Tensor, "B T"]:
    """Mean log-likelihood of each text's tokens given each image, in nats (CoCa, Yu et al. 2022, equation 2).

    The end token counts, the start token and padding do not. Each image and each text is read once. On the CPU.
    """
    _, image_tokens = network._encode_image(pixels)
    # columns of padding alone cost as much as text and count for nothing
    longest = int((tokens != pad_token).any(dim=0).nonzero().max()) + 1
    tokens = tokens[:, :longest]
    is_target = tokens[:, 1:] != pad_token
    _, states = network._encode_text(tokens)
    columns: list[Tensor] = []
    for number, labels in enumerate(tokens[:, 1:]):
        text_states = states[number, :-1].expand(len(pixels), -1, -1)
        logits = network.text_decoder(image_tokens, text_states).float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels.expand(len(pixels), -1), reduction="none")
        columns.append(-(losses * is_target[number]).sum(dim=1) / is_target[number].sum())
    return torch.stack(columns, dim=1).cpu()


def can_caption_in_parallel(network: nn.Module) -> bool:
    """Whether the network is open_clip's CoCa with open_clip's own text tower."""
    from vlm.data.open_clip_private import TextTransformer

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
    memory: the image's tokens, see `ImageTowerOutput`. K is the context length less one, whatever L: rows cut to their
    batch's longest caption would otherwise tell how long it is, and depend on the batch.
    """
    text: Any = network.get_submodule("text")
    decoder: Any = network.get_submodule("text_decoder")
    whole_rows = F.pad(tokens, (0, int(text.context_length) - tokens.shape[1]), value=pad_token)
    labels = whole_rows[:, 1:]

    embedded: Tensor = text.token_embedding(whole_rows[:, :-1])
    embedded = torch.where(is_parallel[:, None, None], mask_embedding.to(embedded.dtype), embedded)
    states = embedded + text.positional_embedding[: labels.shape[1]].to(embedded.dtype)

    text_masks = _attention_masks(getattr(text, "attn_mask", None), is_parallel, states, text.heads)
    states = text.transformer(states, attn_mask=text_masks)
    if text.cls_emb is None:  # with a class token open_clip norms that token alone
        states = text.ln_final(states)

    decoder_masks = _attention_masks(decoder.attn_mask, is_parallel, states, decoder.resblocks[0].attn.num_heads)
    return _decode(decoder, memory, states, decoder_masks), labels


def _attention_masks(
    causal: Float[Tensor, "C C"] | None, is_parallel: Bool[Tensor, " B"], states: Float[Tensor, "B K E"], heads: int
) -> Float[Tensor, "N K K"] | None:
    """The mask added to attention for each row and head: none for rows that are parallel."""
    if causal is None:
        return None
    length = states.shape[1]
    causal = causal[:length, :length].to(states.dtype)
    # zeros added to attention logits hide nothing
    by_row = torch.where(is_parallel[:, None, None], torch.zeros_like(causal), causal)
    # nn.MultiheadAttention takes one mask per row and head, rows outermost
    return by_row.repeat_interleave(heads, dim=0)


def _decode(
    decoder: Any, memory: Float[Tensor, "B M W"], states: Float[Tensor, "B K E"], masks: Float[Tensor, "N K K"] | None
) -> Float[Tensor, "B K V"]:
    """open_clip's decoder, but with a mask for each row."""
    for self_attention, cross_attention in zip(decoder.resblocks, decoder.cross_attn, strict=True):
        if decoder.grad_checkpointing:
            states = cast(Tensor, checkpoint(self_attention, states, None, None, masks, use_reentrant=False))
            states = cast(Tensor, checkpoint(cross_attention, states, memory, memory, None, use_reentrant=False))
        else:
            states = self_attention(states, attn_mask=masks)
            states = cross_attention(states, k_x=memory, v_x=memory)
    return decoder.ln_final(states) @ decoder.text_projection
