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
    """One empty caption of each image, for open_clip's CoCa and our captioners.

    image_tokens: what `_encode_image` gives the decoder. max_length: tokens of the longest row.
    is_cached: False computes every row anew at each step, as do networks that cannot be cached (`can_cache`).

    Raises:
        UsageError: the attention is asked for where it is not kept.
    """
    # a language model keeps its own cache
    begin: Any = getattr(network.text_decoder, "begin_captions", None)
    if is_cached and begin is not None and not has_attention:
        return begin(image_tokens, network.text)
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
    from vlm.models.towers.captioner import WordTower

    text: Any = getattr(network, "text", None)
    decoder: Any = getattr(network, "text_decoder", None)
    is_causal = isinstance(text, WordTower) or (isinstance(text, TextTransformer) and text.attn_mask is not None)
    if not is_causal or decoder is None:
        return False
    for block in (*text.transformer.resblocks, *decoder.resblocks, *decoder.cross_attn):
        # open_clip's other block has no nn.MultiheadAttention; weights of other sizes for keys are stored apart
        attention = block.attn
        if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
            return False
    return True


class _KeyValueCache:
    """Keys and values [B, heads, E, D] of one layer's self attention: an entry for each token of each image's tree.

    Captions of an image that begin alike share their first entries, and a beam that goes on elsewhere moves nothing:
    which entries belong to a caption is told to the attention (`_CachedState`).
    """

    def __init__(self) -> None:
        self._length = 0
        self._buffers: list[Tensor] = []

    def append(self, *keys_and_values: Float[Tensor, "B heads K D"], room: int) -> list[Float[Tensor, "B heads E D"]]:
        """Both with the entries of K more tokens; `room` is how many there may be in the end."""
        if not self._buffers:
            # the precision and device are known only now
            self._buffers = [states[:, :, :0] for states in keys_and_values]
        added = keys_and_values[0].shape[2]
        filled: list[Tensor] = []
        for number, states in enumerate(keys_and_values):
            if self._buffers[number].shape[2] < self._length + added:
                self._buffers[number] = self._with_room(self._buffers[number], room)
            buffer = self._buffers[number]
            buffer[:, :, self._length : self._length + added] = states
            filled.append(buffer[:, :, : self._length + added])
        self._length += added
        return filled

    def _with_room(self, buffer: Tensor, room: int) -> Tensor:
        images, heads, _, size = buffer.shape
        larger = buffer.new_empty(images, heads, room, size)
        larger[:, :, : self._length] = buffer[:, :, : self._length]
        return larger

    def keep_images(self, images: Int64[Tensor, " C"]) -> None:
        """Drop the entries of all other images."""
        self._buffers = [buffer[images] for buffer in self._buffers]


class _CachedState(CaptionState):
    """is_own: which entries of its image belong to each caption, bool [B, K, E]."""

    def __init__(
        self, network: Captioner, image_tokens: Float[Tensor, "B M W"], *, max_length: int, has_attention: bool
    ) -> None:
        self._text: Any = network.text
        self._decoder: Any = network.text_decoder
        self._blocks = [*self._text.transformer.resblocks, *self._decoder.resblocks]
        self._caches = [_KeyValueCache() for _ in self._blocks]
        self._image_states: list[tuple[Tensor, Tensor]] = []
        for block in self._decoder.cross_attn:
            self._image_states.append(_project_image(block, image_tokens))
        self._max_length = max_length
        self._length = 0
        num_images = len(image_tokens)
        device = image_tokens.device
        self._is_own = torch.ones((num_images, 1, 0), dtype=torch.bool, device=device)
        # of each entry, for text towers that look away from padding, and whether the token after it is looked at
        self._is_visible = torch.ones((num_images, 0), dtype=torch.bool, device=device)
        self._shows_next = torch.ones((num_images, 1), dtype=torch.bool, device=device)
        self._has_attention = has_attention
        self.attention = None

    def advance(self, tokens: Int64[Tensor, "B K"]) -> Float[Tensor, "B K V"]:
        text = self._text
        decoder = self._decoder
        self._add_entries(tokens)
        states = text.token_embedding(tokens).to(text.transformer.get_cast_dtype())
        states = states + text.positional_embedding[self._length].to(states.dtype)
        self._length += 1
        num_entries = self._is_own.shape[2]
        room = num_entries + tokens.shape[1] * (self._max_length - self._length)
        # no entry is another caption's: nothing to mask
        own = None if num_entries == self._length else self._is_own[:, None]

        num_text_blocks = len(text.transformer.resblocks)
        text_mask = self._text_mask(own)
        for block, cache in zip(self._blocks[:num_text_blocks], self._caches, strict=False):
            states = _attend_to_text(block, states, cache, text_mask, room)
        # with a class token open_clip norms that token alone
        if text.cls_emb is None:
            states = text.ln_final(states)

        maps: list[Tensor] = []
        for number, block in enumerate(decoder.cross_attn):
            layer = num_text_blocks + number
            states = _attend_to_text(self._blocks[layer], states, self._caches[layer], own, room)
            states, weights = _attend_to_image(
                block, states, *self._image_states[number], has_attention=self._has_attention
            )
            if weights is not None:
                maps.append(weights)
        self.attention = torch.stack(maps).mean(dim=0) if maps else None
        return _wide(decoder.ln_final(states) @ decoder.text_projection)

    def select(self, images: Int64[Tensor, " C"], rows: Int64[Tensor, "C J"]) -> None:
        if not _is_counting(images, len(self._is_own)):
            for cache in self._caches:
                cache.keep_images(images)
            self._is_visible = self._is_visible[images]
            self._image_states = [(keys[images], values[images]) for keys, values in self._image_states]
        self._is_own = self._is_own[images[:, None], rows]
        self._shows_next = self._shows_next[images[:, None], rows]
        if self.attention is not None:
            self.attention = self.attention[images[:, None], rows]

    def _add_entries(self, tokens: Int64[Tensor, "B K"]) -> None:
        """An entry for the new token of each caption, its own alone."""
        num_images, num_rows = tokens.shape
        added = torch.eye(num_rows, dtype=torch.bool, device=tokens.device).expand(num_images, -1, -1)
        self._is_own = torch.cat([self._is_own, added], dim=2)
        text = self._text
        if text.cls_emb is None:
            return
        # As open_clip masks padding: by default one place too far to the right, which its published weights expect.
        is_text = tokens != text.pad_id
        shown = is_text if text.correct_cls_mask else self._shows_next
        self._is_visible = torch.cat([self._is_visible, shown], dim=1)
        self._shows_next = is_text

    def _text_mask(self, own: Bool[Tensor, "B 1 K E"] | None) -> Bool[Tensor, "B 1 #K E"] | None:
        """Which entries the text tower's attention sees; None if all."""
        if self._text.cls_emb is None or bool(self._is_visible.all()):
            return own
        is_visible = self._is_visible[:, None, None]
        return is_visible if own is None else own & is_visible


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
    block: Any,
    states: Float[Tensor, "B K W"],
    cache: _KeyValueCache,
    is_seen: Bool[Tensor, "B 1 #K E"] | None,
    room: int,
) -> Float[Tensor, "B K W"]:
    """A layer of self attention for one new token of each caption, which sees all tokens before it."""
    attention = block.attn
    projected = F.linear(block.ln_1(states), attention.in_proj_weight, attention.in_proj_bias)
    queries, keys, values = projected.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    keys, values = cache.append(keys, values, room=room)
    # in three calls: with a mask the fused one costs as much, and rounds otherwise
    weights = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5
    if is_seen is not None:
        weights = weights.masked_fill(~is_seen, -torch.inf)
    attended = weights.softmax(dim=-1) @ values
    states = states + block.ls_1(attention.out_proj(attended.transpose(1, 2).flatten(2)))
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
