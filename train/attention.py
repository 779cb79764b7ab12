"""Attention layers that need less for the same gradient while training: fewer copies, and in the last block of a
transformer only the position that is pooled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vlm.tensor_types import Float, Int64, Tensor
from vlm.train.bfloat16 import is_computed_in_bfloat16
from vlm.train.run_config import ModelConfig


def reduce_attention_work(
    network: nn.Module, settings: ModelConfig, device: torch.device, *, reads_patches: bool
) -> None:
    """Change a network that is to be trained in the ways below that its settings and the device allow."""
    if settings.compile:
        return
    if device.type == "cpu":
        attend_without_copies(network)
    if not settings.gradient_checkpointing:
        compute_pooled_positions(network, image=not reads_patches)


def attend_without_copies(network: nn.Module) -> None:
    """Let torch's self-attention read queries, keys and values where the one projection of all three wrote them.

    nn.MultiheadAttention copies them first; in the backward pass each of the three gradients is written into zeros of
    three times its size, and these are added. In float32 on a CPU that is a tenth of the layer's time; the bits are the
    same.
    """
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.forward = partial(_attend, module, module.forward)  # pyright: ignore[reportAttributeAccessIssue]


def _attend(
    module: nn.MultiheadAttention,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention [B, L, D] of a training pass; anything else by `attend`, the module's own forward pass."""
    is_self = query is key and key is value and query.ndim == 3
    is_known_mask = attn_mask is None or (attn_mask.ndim == 2 and attn_mask.dtype == query.dtype)
    is_plain_call = is_self and is_known_mask and key_padding_mask is None and not need_weights and not options
    if not (module.training and is_plain_call and is_plain_attention(module)):
        return attend(query, key, value, key_padding_mask, need_weights, attn_mask, **options)
    if is_computed_in_bfloat16(query):
        parts = split_heads(project_together(module, query), module.num_heads, 3)
        attended = F.scaled_dot_product_attention(*parts, attn_mask=attn_mask)
        return F.linear(attended.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias), None
    size, length, width = query.shape
    # position by position, which is the order in which the module sums
    by_head = project_together(module, query.transpose(0, 1)).view(length, size, 3, module.num_heads, module.head_dim)
    queries, keys, values = by_head.permute(2, 1, 3, 0, 4).unbind(0)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask)
    joined = attended.permute(2, 0, 1, 3).reshape(length * size, width)
    output = F.linear(joined, module.out_proj.weight, module.out_proj.bias)
    return output.view(length, size, width).transpose(0, 1), None


def is_plain_attention(module: nn.Module) -> bool:
    """Whether a module is torch's attention with one projection of queries, keys and values, and without dropout."""
    if type(module) is not nn.MultiheadAttention:
        return False
    has_other_keys = module.bias_k is not None or module.add_zero_attn or module.in_proj_weight is None
    return module.batch_first and not module.dropout and not has_other_keys


def project_together(module: nn.MultiheadAttention, tokens: Float[Tensor, "*N W"]) -> Float[Tensor, "*N V"]:
    """Queries, keys and values in one row, V = 3 W."""
    return F.linear(tokens, module.in_proj_weight, module.in_proj_bias)


def project_queries(
    module: nn.MultiheadAttention, queries: Float[Tensor, "*Q W"], tokens: Float[Tensor, "*N W"]
) -> tuple[Float[Tensor, "*Q W"], Float[Tensor, "*N V"]]:
    """Queries of some tokens; keys and values of all of them in one row, V = 2 W."""
    weights, biases = module.in_proj_weight.split([module.embed_dim, 2 * module.embed_dim]), (None, None)
    if module.in_proj_bias is not None:
        biases = module.in_proj_bias.split([module.embed_dim, 2 * module.embed_dim])
    return F.linear(queries, weights[0], biases[0]), F.linear(tokens, weights[1], biases[1])


def split_heads(projected: Float[Tensor, "B L W"], heads: int, parts: int) -> tuple[Float[Tensor, "B H L D"], ...]:
    """The parts of rows that hold several, as queries, keys and values, W = parts · H · D."""
    return _Split.apply(projected, heads, parts)


class _Split(torch.autograd.Function):
    """One copy each way: of views, autograd would put the gradients together in a copy of all parts, slowly."""

    @staticmethod
    def forward(ctx: Any, projected: Float[Tensor, "B L W"], heads: int, parts: int) -> tuple[Tensor, ...]:
        by_head = projected.view(*projected.shape[:2], parts, heads, -1)
        return tuple(part.transpose(1, 2).contiguous() for part in by_head.unbind(2))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Float[Tensor, "B H L D"]
    ) -> tuple[Tensor, None, None]:
        size, heads, length, width = gradients[0].shape
        joined = gradients[0].new_empty(size, length, len(gradients), heads, width)
        for target, gradient in zip(joined.unbind(2), gradients, strict=True):
            target.copy_(gradient.transpose(1, 2))
        return joined.flatten(2), None, None


def compute_pooled_positions(network: nn.Module, *, image: bool) -> list[str]:
    """Let the last block of open_clip's transformers compute, in training, only the position that is pooled.

    Nothing else that it gives has any influence on the embedding: of the 12 W² products for each token, W the width of
    the block, the 2 W² for keys and values are left. Not with gradient checkpointing or compilation, where a block
    also runs outside of its tower's forward pass.

    image: the image tower's as well; not where patches are read. Returns the towers that were changed, of `visual` and
    `text`; those that pool all positions, or give them on, are left alone.
    """
    from vlm.data.open_clip_private import TextTransformer, VisionTransformer

    pooled: dict[str, PooledPositions | None] = {}
    visual, text = getattr(network, "visual", None), getattr(network, "text", None)
    if image and isinstance(visual, VisionTransformer) and visual.pool_type == "tok" and visual.attn_pool is None:
        pooled["visual"] = None
    if isinstance(text, TextTransformer) and text.cls_emb is None and text.pool_type in ("argmax", "eos"):
        pooled["text"] = PooledPositions()
    return [name for name, positions in pooled.items() if _shorten_last_block(network.get_submodule(name), positions)]


@dataclass(eq=False)
class PooledPositions:
    """The position of each text that its tower pools, in the pass that runs."""

    rows: Int64[Tensor, " B"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def read(self, tower: Any, arguments: tuple[Tensor, ...]) -> None:
        """Find them in the tokens that a tower in training is called with."""
        # tokens of an exported graph, which have no values, must not stay behind
        if tower.transformer.resblocks[-1].training:
            self.rows = pooled_positions(tower, arguments[0])


def pooled_positions(tower: Any, tokens: Int64[Tensor, "T L"]) -> Int64[Tensor, " T"]:
    """Which position of each text a tower of open_clip pools: that of the end token, or of the highest number."""
    return ((tokens == tower.eos_id).int() if tower.pool_type == "eos" else tokens).argmax(dim=-1)


def _shorten_last_block(tower: Any, pooled: PooledPositions | None) -> bool:
    from vlm.data.open_clip_private import ResidualAttentionBlock

    block = tower.transformer.resblocks[-1]
    is_known = type(block) is ResidualAttentionBlock and type(block.attn) is nn.MultiheadAttention
    if not is_known or tower.output_tokens or not tower.transformer.batch_first:
        return False
    block.forward = partial(_forward_pooled, block, pooled)  # pyright: ignore[reportAttributeAccessIssue]
    if pooled is not None:
        tower.register_forward_pre_hook(pooled.read)
    return True


def _forward_pooled(
    block: Any,
    pooled: PooledPositions | None,
    tokens: Float[Tensor, "B L W"],
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Float[Tensor, "B K W"]:
    """The block's forward pass; in training that of one position: of images the first, of texts theirs, L times."""
    if not block.training:
        return type(block).forward(block, tokens, k_x, v_x, attn_mask)
    normed = block.ln_1(tokens)
    if pooled is None:
        queries, residual = normed[:, :1], tokens[:, :1]
    else:
        places = torch.arange(len(tokens), device=tokens.device), pooled.rows
        queries, residual = normed[places][:, None], tokens[places][:, None]
        attn_mask = _rows_of_mask(attn_mask, pooled.rows, block.attn.num_heads)
    residual = residual + block.ls_1(block.attention(queries, normed, normed, attn_mask=attn_mask))
    residual = residual + block.ls_2(block.mlp(block.ln_2(residual)))
    # of the L places the tower picks the pooled one; no view, whose gradient FSDP could lose
    return residual if pooled is None else residual.expand(-1, tokens.shape[1], -1).contiguous()


def _rows_of_mask(mask: Tensor | None, rows: Int64[Tensor, " B"], heads: int) -> Float[Tensor, "N 1 L"] | None:
    """The rows of a mask [L, L], or of one for each head of each sample, as attention takes them: N is B · heads."""
    if mask is None:
        return None
    rows = rows.repeat_interleave(heads)
    return (mask[rows] if mask.ndim == 2 else mask[torch.arange(len(rows), device=rows.device), rows])[:, None]
