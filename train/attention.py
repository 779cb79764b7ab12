"""Attention layers that need less for the same gradient while training: no copies, quick products in bfloat16 on a CPU,
and in the last block of a transformer only the position that is pooled.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from vlm.tensor_types import Float, Int64, Tensor
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


class PlainAttention(TorchFunctionMode):
    """Inside of it, attention in bfloat16 on a CPU is two batched products with a softmax in single precision between.

    torch's own plain kernel computes all of it in single precision, and its fused one has a slow backward pass: they
    take two and three times as long for 50 tokens. Attention with dropout, or with a mask for each row, is torch's.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _can_attend_by_products(*args, **kwargs):
            return _attend_by_products(*args, **kwargs)
        return func(*args, **kwargs)


def _can_attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> bool:
    is_plain = not dropout_p and not options.get("enable_gqa", False)
    # a row of another mask may leave nothing to attend to, for which torch's softmax has a rule
    is_causal = attn_mask is None or (attn_mask.ndim == 2 and attn_mask.is_floating_point())
    # some towers have one head of keys and values for all queries, which torch repeats
    has_same_heads = query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    return is_plain and is_causal and has_same_heads and query.dtype == key.dtype == value.dtype == torch.bfloat16


def _attend_by_products(
    query: Float[Tensor, "B H L D"],
    key: Float[Tensor, "B H S D"],
    value: Float[Tensor, "B H S E"],
    attn_mask: Float[Tensor, "L S"] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Float[Tensor, "B H L E"]:
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _Scores.apply(query.flatten(0, 1), key.flatten(0, 1), factor)
    if is_causal:
        attn_mask = torch.full_like(scores[0], -torch.inf).triu(1)
    if attn_mask is not None:
        scores = scores + attn_mask
    shares = scores.softmax(dim=-1).to(value.dtype)
    return torch.bmm(shares, value.flatten(0, 1)).unflatten(0, query.shape[:2])


class _Scores(torch.autograd.Function):
    """Products of queries and keys in single precision: large ones, rounded, would change what is attended to."""

    @staticmethod
    def forward(
        ctx: Any, queries: Float[Tensor, "N L D"], keys: Float[Tensor, "N S D"], factor: float
    ) -> Float[Tensor, "N L S"]:
        ctx.save_for_backward(queries, keys)
        ctx.factor = factor
        with torch.autocast("cpu", enabled=False):
            return torch.bmm(queries.float() * factor, keys.float().transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "N L S"]) -> tuple[Tensor, Tensor, None]:
        queries, keys = ctx.saved_tensors
        gradient = (gradients[0] * ctx.factor).to(queries.dtype)
        return torch.bmm(gradient, keys), torch.bmm(gradient.transpose(1, 2), queries), None


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
    if not (module.training and is_plain_call and _is_plain(module)):
        return attend(query, key, value, key_padding_mask, need_weights, attn_mask, **options)
    size, length, width = query.shape
    # position by position, which is the order in which the module sums
    projected = F.linear(query.transpose(0, 1), module.in_proj_weight, module.in_proj_bias)
    by_head = projected.view(length, size, 3, module.num_heads, module.head_dim).permute(2, 1, 3, 0, 4)
    queries, keys, values = by_head.unbind(0)
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask)
    joined = attended.permute(2, 0, 1, 3).reshape(length * size, width)
    output = F.linear(joined, module.out_proj.weight, module.out_proj.bias)
    return output.view(length, size, width).transpose(0, 1), None


def _is_plain(module: nn.MultiheadAttention) -> bool:
    has_other_keys = module.bias_k is not None or module.add_zero_attn or module.in_proj_weight is None
    return module.batch_first and not module.dropout and not has_other_keys


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
        pooled["text"] = PooledPositions(end=text.eos_id if text.pool_type == "eos" else None)
    return [name for name, positions in pooled.items() if _shorten_last_block(network.get_submodule(name), positions)]


@dataclass(eq=False)
class PooledPositions:
    """The position of each text that its tower pools, in the pass that runs.

    end: the token that is pooled; None for the one with the highest number.
    """

    end: int | None = None
    rows: Int64[Tensor, " B"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def read(self, tower: Any, arguments: tuple[Tensor, ...]) -> None:
        """Find them in the tokens that a tower in training is called with."""
        # tokens of an exported graph, which have no values, must not stay behind
        if not tower.transformer.resblocks[-1].training:
            return
        tokens = arguments[0]
        self.rows = (tokens if self.end is None else (tokens == self.end).int()).argmax(dim=-1)


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
