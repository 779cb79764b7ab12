"""Captions being written, and the logits of their next token: with cached keys and values, or computed anew each time.

A step of a cached decoder costs one token, whatever was written before: in each layer the keys and values of earlier
tokens are kept, and those of the image, to which the decoder's cross attention goes, are computed once an image.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F

from vlm.errors import UsageError
from vlm.models.network import Captioner
from vlm.tensor_types import Bool, Float, Int64, Tensor


@runtime_checkable
class CaptionState(Protocol):
    """K captions of each of B images, all of one length; a captioner of another kind gives one of its own.

    attention: of the last place over the M tokens of the image, mean over layers and heads; None where it is not kept.
    """

    attention: Float[Tensor, "B K M"] | None

    def advance(self, tokens: Int64[Tensor, "B K"]) -> Float[Tensor, "B K V"]:
        """Append a token to each caption; the logits of the next one, in float32 at least."""
        ...

    def select(self, images: Int64[Tensor, " C"], rows: Int64[Tensor, "C J"]) -> None:
        """Go on with J captions of each of these images: copies of those with these numbers, from 0 to K - 1."""
        ...


def begin_captions(
    network: Captioner,
    image_tokens: Float[Tensor, "B M W"],
    *,
    max_length: int,
    is_cached: bool = True,
    has_attention: bool = False,
) -> CaptionState:
    """One empty caption of each image, for open_clip's CoCa.

    image_tokens: what `_encode_image` gives the decoder. max_length: tokens of the longest row.
    is_cached: False computes every row anew at each step, as do networks that cannot be cached (`can_cache`).

    Raises:
        UsageError: the attention is asked for where it is not kept.
    """
    if is_cached and can_cache(network):
        return _CachedState(network, image_tokens, max_length=max_length, has_attention=has_attention)
    if has_attention:
        raise UsageError(f"{type(network).__name__} of this text tower keeps no attention over the image's tokens.")
    return _UncachedState(network, image_tokens)


def can_cache(network: nn.Module) -> bool:
    """Whether a token's states depend on the tokens before it alone, and the layers are those that are known here.

    Not of a text tower of Hugging Face, nor one without a causal mask: there, every token changes with the next.
    """
    from vlm.data.open_clip_private import TextTransformer

    text: Any = getattr(network, "text", None)
    decoder: Any = getattr(network, "text_decoder", None)
    if not isinstance(text, TextTransformer) or text.attn_mask is None or decoder is None:
        return False
    for block in (*text.transformer.resblocks, *decoder.resblocks, *decoder.cross_attn):
        # open_clip's other block has no nn.MultiheadAttention; weights of other sizes for keys are stored apart
        attention = block.attn
        if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
            return False
    return True


class _KeyValueCache:
    """Keys and values of one layer's self attention [R, heads, length, E / heads], with room for `max_length`."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self._length = 0
        self._buffers: list[Tensor] = []

    def append(self, *keys_and_values: Float[Tensor, "R heads 1 D"]) -> list[Float[Tensor, "R heads L D"]]:
        """Both with those of one more token."""
        if not self._buffers:
            # the precision and device are known only now
            for states in keys_and_values:
                rows, heads, _, size = states.shape
                self._buffers.append(states.new_empty(rows, heads, self._max_length, size))
        self._length += 1
        filled: list[Tensor] = []
        for buffer, states in zip(self._buffers, keys_and_values, strict=True):
            buffer[:, :, self._length - 1 : self._length] = states
            filled.append(buffer[:, :, : self._length])
        return filled

    def select(self, rows: Int64[Tensor, " S"]) -> None:
        """Keep copies of these rows."""
        for number, buffer in enumerate(self._buffers):
            filled = buffer[rows, :, : self._length]
            if len(rows) != len(buffer):
                buffer = buffer.new_empty(len(rows), *buffer.shape[1:])
                self._buffers[number] = buffer
            buffer[:, :, : self._length] = filled


class _CachedState(CaptionState):
    def __init__(
        self, network: Captioner, image_tokens: Float[Tensor, "B M W"], *, max_length: int, has_attention: bool
    ) -> None:
        self._text: Any = network.text
        self._decoder: Any = network.text_decoder
        self._blocks = [*self._text.transformer.resblocks, *self._decoder.resblocks]
        self._caches = [_KeyValueCache(max_length) for _ in self._blocks]
        self._image_states: list[tuple[Tensor, Tensor]] = []
        for block in self._decoder.cross_attn:
            self._image_states.append(_project_image(block, image_tokens))
        self._num_images = len(image_tokens)
        self._num_rows = 1
        self._length = 0
        self._tokens = torch.zeros((self._num_images, max_length), dtype=torch.int64, device=image_tokens.device)
        self._has_attention = has_attention
        self.attention = None

    def advance(self, tokens: Int64[Tensor, "B K"]) -> Float[Tensor, "B K V"]:
        text, decoder = self._text, self._decoder
        flat_tokens = tokens.flatten()
        self._tokens[:, self._length] = flat_tokens
        states = text.token_embedding(flat_tokens).to(text.transformer.get_cast_dtype())
        states = states + text.positional_embedding[self._length].to(states.dtype)
        self._length += 1

        num_text_blocks = len(text.transformer.resblocks)
        is_visible = self._visible_tokens()
        for block, cache in zip(self._blocks[:num_text_blocks], self._caches, strict=False):
            states = _attend_to_text(block, states, cache, is_visible)
        # with a class token open_clip norms that token alone
        if text.cls_emb is None:
            states = text.ln_final(states)

        maps: list[Tensor] = []
        by_image = states.view(self._num_images, self._num_rows, -1)
        for number, block in enumerate(decoder.cross_attn):
            layer = num_text_blocks + number
            states = _attend_to_text(self._blocks[layer], by_image.flatten(0, 1), self._caches[layer], None)
            by_image = states.view(by_image.shape)
            by_image, weights = _attend_to_image(
                block, by_image, *self._image_states[number], has_attention=self._has_attention
            )
            if weights is not None:
                maps.append(weights)
        self.attention = torch.stack(maps).mean(dim=0) if maps else None
        return _wide(decoder.ln_final(by_image) @ decoder.text_projection)

    def select(self, images: Int64[Tensor, " C"], rows: Int64[Tensor, "C J"]) -> None:
        flat_rows = (images[:, None] * self._num_rows + rows).flatten()
        # beams that stay in their order, as most do at most steps, need no copy
        if not _is_counting(flat_rows, self._num_images * self._num_rows):
            for cache in self._caches:
                cache.select(flat_rows)
            self._tokens = self._tokens[flat_rows]
        if not _is_counting(images, self._num_images):
            self._image_states = [(keys[images], values[images]) for keys, values in self._image_states]
        if self.attention is not None:
            self.attention = self.attention[images[:, None], rows]
        self._num_images, self._num_rows = rows.shape

    def _visible_tokens(self) -> Bool[Tensor, "R 1 1 L"] | None:
        """Which tokens the text tower's attention sees; None if all, as in towers without a class token.

        As open_clip masks padding: by default one place too far to the right, which its published weights expect.
        """
        text = self._text
        if text.cls_emb is None:
            return None
        is_visible = self._tokens[:, : self._length] != text.pad_id
        if not text.correct_cls_mask:
            is_visible = F.pad(is_visible[:, :-1], (1, 0), value=True)
        return is_visible[:, None, None]


class _UncachedState(CaptionState):
    def __init__(self, network: Captioner, image_tokens: Float[Tensor, "B M W"]) -> None:
        self._network = network
        self._image_tokens = image_tokens
        self._tokens = torch.zeros((len(image_tokens), 1, 0), dtype=torch.int64, device=image_tokens.device)
        self.attention = None

    def advance(self, tokens: Int64[Tensor, "B K"]) -> Float[Tensor, "B K V"]:
        self._tokens = torch.cat([self._tokens, tokens[:, :, None]], dim=2)
        text: Any = self._network.text
        rows = self._tokens.flatten(0, 1)
        # without a class token open_clip's own tower takes whole rows only; no token sees those after it
        if getattr(text, "attn_mask", None) is not None and text.cls_emb is None:
            rows = F.pad(rows, (0, text.context_length - rows.shape[1]))
        _, text_tokens = self._network._encode_text(rows)
        text_tokens = text_tokens[:, : self._tokens.shape[2]]
        image_tokens = self._image_tokens.repeat_interleave(tokens.shape[1], dim=0)
        logits = self._network.text_decoder(image_tokens, text_tokens)[:, -1]
        return _wide(logits).unflatten(0, tokens.shape)

    def select(self, images: Int64[Tensor, " C"], rows: Int64[Tensor, "C J"]) -> None:
        self._image_tokens = self._image_tokens[images]
        self._tokens = self._tokens[images[:, None], rows]


def _attend_to_text(
    block: Any, states: Float[Tensor, "R E"], cache: _KeyValueCache, is_visible: Bool[Tensor, "R 1 1 L"] | None
) -> Float[Tensor, "R E"]:
    """A layer of self attention for one new token, which sees all tokens before it."""
    attention = block.attn
    projected = F.linear(block.ln_1(states), attention.in_proj_weight, attention.in_proj_bias)
    heads = projected.view(len(states), 3, attention.num_heads, 1, -1)
    keys, values = cache.append(heads[:, 1], heads[:, 2])
    attended = F.scaled_dot_product_attention(heads[:, 0], keys, values, attn_mask=is_visible)
    states = states + block.ls_1(attention.out_proj(attended.flatten(1)))
    return states + block.ls_2(block.mlp(block.ln_2(states)))


def _project_image(
    block: Any, image_tokens: Float[Tensor, "B M W"]
) -> tuple[Float[Tensor, "B heads M D"], Float[Tensor, "B heads M D"]]:
    """Keys and values of the image in one layer of cross attention."""
    attention = block.attn
    width = attention.embed_dim
    bias = attention.in_proj_bias
    projected = F.linear(
        block.ln_1_kv(image_tokens), attention.in_proj_weight[width:], None if bias is None else bias[width:]
    )
    keys, values = projected.unflatten(2, (2, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    # as one block each: they are read at every step
    return keys.contiguous(), values.contiguous()


def _attend_to_image(
    block: Any,
    states: Float[Tensor, "B K E"],
    keys: Float[Tensor, "B heads M D"],
    values: Float[Tensor, "B heads M D"],
    *,
    has_attention: bool,
) -> tuple[Float[Tensor, "B K E"], Float[Tensor, "B K M"] | None]:
    """A layer of cross attention for one new token of each caption; the captions of an image share its keys."""
    attention = block.attn
    width = attention.embed_dim
    bias = attention.in_proj_bias
    queries = F.linear(block.ln_1(states), attention.in_proj_weight[:width], None if bias is None else bias[:width])
    queries = queries.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    weights = None
    if has_attention:
        weights = (queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5).softmax(dim=-1)
        attended = weights @ values
        weights = weights.mean(dim=1)
    else:
        attended = F.scaled_dot_product_attention(queries, keys, values)
    states = states + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))
    return states + block.ls_2(block.mlp(block.ln_2(states))), weights


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _is_counting(numbers: Int64[Tensor, " S"], count: int) -> bool:
    return len(numbers) == count and bool((numbers == torch.arange(count, device=numbers.device)).all())
