"""Captions of a batch through the text tower with little work for padding, and the same gradient.

The captions of a causal transformer of open_clip are packed: the positions of all of them, up to the pooled one, are
rows of one matrix, and attention alone sees which of them belong together. Other towers get the captions in groups of
like length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from vlm.data.tokenizers import Padding, round_widths, text_widths
from vlm.models.network import Network
from vlm.tensor_types import Array, Float, Int64, Tensor
from vlm.train.attention import (
    is_plain_attention,
    pooled_positions,
    project_queries,
    project_together,
    split_heads,
)

_MAX_LENGTH_GROUPS = 16
_UNUSED_SHARE = 8
"""Rows are rounded up by less than an eighth."""


def encode_captions(network: Network, tokens: Int64[Tensor, "T L"], padding: Padding) -> Float[Tensor, "T D"]:
    """Embeddings of captions, not normalised."""
    tower = packing_tower(network)
    return encode_by_length(network, tokens, padding) if tower is None else encode_packed(tower, tokens)


def computed_rows(
    network: Network, tokens: Int64[Array, "T L"], padding: Padding
) -> list[tuple[Int64[Array, " N"], int]]:
    """Numbers of the captions that are computed at each length: packed ones at their mean, whose work is the same."""
    tower = packing_tower(network)
    if tower is None:
        return length_groups(text_widths(tokens, padding))
    lengths = pooled_positions(tower, torch.from_numpy(tokens)).numpy() + 1
    return [(np.arange(len(lengths)), round(lengths.mean()))]


def packing_tower(network: Any) -> Any:
    """The text tower, if its captions can be packed: a causal transformer of open_clip that pools a token, or None."""
    from vlm.data.open_clip_private import ResidualAttentionBlock, TextTransformer

    tower = getattr(network, "text", None)
    # PEFT and others put layers of their own in the place of these
    if type(tower) is not TextTransformer or tower.output_tokens or tower.transformer.grad_checkpointing:
        return None
    if tower.attn_mask is None or tower.cls_emb is not None or tower.pool_type not in ("argmax", "eos"):
        return None
    for block in tower.transformer.resblocks:
        if type(block) is not ResidualAttentionBlock or not is_plain_attention(block.attn):
            return None
    # hooks would wait in vain for a module that is not called as a whole; those before a pass are our own
    blocks: list[Any] = list(tower.transformer.resblocks)
    uncalled: list[nn.Module] = [tower, tower.transformer, *blocks, *(block.attn for block in blocks)]
    is_hooked = any(module._forward_hooks or module._backward_hooks for module in uncalled)
    return None if is_hooked else tower


def length_groups(widths: Int64[Array, " T"]) -> list[tuple[Int64[Array, " N"], int]]:
    """Numbers of the rows of like width, and the width they may be cut to, the shortest first; each row is in one.

    A group of less than a sixteenth of the rows joins the next, since each costs a pass of its own.
    """
    rows = np.argsort(widths, kind="stable")
    groups: list[tuple[Array, int]] = []
    first = 0
    for width in np.unique(widths):
        end = int((widths <= width).sum())
        if end - first >= len(rows) / _MAX_LENGTH_GROUPS or end == len(rows):
            groups.append((rows[first:end], int(width)))
            first = end
    return groups


def encode_by_length(network: Network, tokens: Int64[Tensor, "T L"], padding: Padding) -> Float[Tensor, "T D"]:
    """Embeddings of texts, those of like length together."""
    groups = length_groups(text_widths(tokens.numpy(), padding))
    texts = [tokens[rows, :width] for rows, width in groups]
    with _OneLookup(texts):
        parts = [network.encode_text(text) for text in texts]
    order = torch.from_numpy(np.concatenate([rows for rows, _ in groups]))
    return torch.cat(parts)[order.argsort()]


class _OneLookup(TorchFunctionMode):
    """Inside of it a tower finds the embeddings of the tokens of several texts [N, L] in one lookup.

    The gradient of each lookup is as large as the vocabulary.
    """

    def __init__(self, texts: Sequence[Tensor]) -> None:
        super().__init__()
        self.texts = texts
        self.found: dict[tuple[Any, ...], list[Tensor]] = {}

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        place = self._place(*args[:2]) if func is F.embedding and len(args) > 1 else None
        if place is None:
            return func(*args, **kwargs)
        key = (*args[1:], *kwargs.items())
        if key not in self.found:
            rows = func(torch.cat([text.flatten() for text in self.texts]), *args[1:], **kwargs)
            parts = rows.split([text.numel() for text in self.texts])
            self.found[key] = [part.unflatten(0, text.shape) for part, text in zip(parts, self.texts, strict=True)]
        return self.found[key][place]

    def _place(self, tokens: Tensor, weight: Tensor) -> int | None:
        """Which of the texts these tokens are, or a view of; None for others, and for weights made anew each time."""
        for place, text in enumerate(self.texts):
            if weight.is_leaf and tokens.data_ptr() == text.data_ptr() and tokens.shape == text.shape:
                return place
        return None


def encode_packed(tower: Any, tokens: Int64[Tensor, "T L"]) -> Float[Tensor, "T D"]:
    """Embeddings of texts by a tower whose captions can be packed."""
    # of a causal tower nothing after the pooled position has any influence
    packed = PackedTexts(tokens, pooled_positions(tower, tokens) + 1)
    rows = tower.token_embedding(packed.tokens) + F.embedding(packed.positions, tower.positional_embedding)
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        rows = rows + block.ls_1(_attend_packed(block.attn, block.ln_1(rows), packed))
        rows = rows + block.ls_2(block.mlp(block.ln_2(rows)))
    normed = last.ln_1(rows)
    pooled = rows[packed.ends] + last.ls_1(_attend_from_ends(last.attn, normed, packed))
    pooled = tower.ln_final(pooled + last.ls_2(last.mlp(last.ln_2(pooled))))
    projection = tower.text_projection
    if projection is not None:
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    return pooled[packed.order.argsort()]


@dataclass(frozen=True)
class AttentionGroup:
    """Texts that attention sees side by side, padded to one width.

    first, end: their rows. source: the row that each of their padded positions is filled from, counted from the first.
    places: the padded position of each row.
    """

    first: int
    end: int
    width: int
    source: Int64[Tensor, " P"]
    places: Int64[Tensor, " N"]
    lengths: Int64[Tensor, " T"]


class PackedTexts:
    """Rows of all positions of texts [T, L], text by text, the shortest first.

    order: the number of each text. ends: the last row of each. num_unused: rows after them that belong to no text, so
    that batches differ in size less often, and memory of one fits the next.
    """

    def __init__(self, tokens: Int64[Tensor, "T L"], lengths: Int64[Tensor, " T"]) -> None:
        self.order = lengths.argsort(stable=True)
        self.lengths = lengths[self.order]
        self.ends = self.lengths.cumsum(0) - 1
        is_used = torch.arange(tokens.shape[1]) < self.lengths[:, None]
        num_rows = int(self.lengths.sum())
        self.num_unused = -num_rows % max(1, 2 ** (num_rows.bit_length() - 1) // _UNUSED_SHARE)
        self.tokens = F.pad(tokens[self.order][is_used], (0, self.num_unused))
        self.positions = F.pad(torch.arange(tokens.shape[1]).expand_as(is_used)[is_used], (0, self.num_unused))

    @cached_property
    def groups(self) -> list[AttentionGroup]:
        """The texts as attention sees them."""
        groups: list[AttentionGroup] = []
        first = 0
        for texts, width in length_groups(round_widths(self.lengths.numpy())):
            lengths = self.lengths[texts]
            positions = torch.arange(width)
            starts = lengths.cumsum(0) - lengths
            # padding repeats the last row: it is masked, but has to be finite
            source = starts[:, None] + torch.minimum(positions, lengths[:, None] - 1)
            places = (positions < lengths[:, None]).flatten().nonzero()[:, 0]
            end = first + int(lengths.sum())
            groups.append(AttentionGroup(first, end, width, source.flatten(), places, lengths))
            first = end
        return groups


def _attend_packed(
    module: nn.MultiheadAttention, rows: Float[Tensor, "N W"], packed: PackedTexts
) -> Float[Tensor, "N W"]:
    projected = project_together(module, rows)
    parts: list[Tensor] = []
    for group in packed.groups:
        padded = _pad(projected, group)
        queries, keys, values = split_heads(padded, module.num_heads, 3)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        parts.append(attended.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, group.places))
    joined = F.pad(torch.cat(parts), (0, 0, 0, packed.num_unused))
    return F.linear(joined, module.out_proj.weight, module.out_proj.bias)


def _attend_from_ends(
    module: nn.MultiheadAttention, rows: Float[Tensor, "N W"], packed: PackedTexts
) -> Float[Tensor, "T W"]:
    queries, projected = project_queries(module, rows[packed.ends], rows)
    queries = queries.unflatten(1, (module.num_heads, -1))[:, :, None]
    parts: list[Tensor] = []
    texts = queries.split([len(group.lengths) for group in packed.groups])
    for group, of_group in zip(packed.groups, texts, strict=True):
        padded = _pad(projected, group)
        keys, values = split_heads(padded, module.num_heads, 2)
        is_used = (torch.arange(group.width) < group.lengths[:, None])[:, None, None]
        parts.append(F.scaled_dot_product_attention(of_group, keys, values, is_used).flatten(1))
    return F.linear(torch.cat(parts), module.out_proj.weight, module.out_proj.bias)


def _pad(rows: Float[Tensor, "N W"], group: AttentionGroup) -> Float[Tensor, "T L W"]:
    """The rows of a group, padded; its attention leaves padding out, so no gradient comes back from there."""
    padded = rows[group.first : group.end].index_select(0, group.source)
    return padded.unflatten(0, (-1, group.width))
