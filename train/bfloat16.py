"""Training in bfloat16 on a CPU: matrix products as oneDNN computes them best, and attention made of such products.

Under autocast alone, torch on a CPU adds the bias of a linear layer in a pass of its own, sums the bias's gradient in
another, multiplies for a wide layer's weights in the slower of two orders, and computes attention in single precision.
"""

import contextlib
import functools
import math
from typing import Any, cast

import torch
from accelerate.utils import convert_to_fp32
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from vlm.models.model import longest_sequence
from vlm.tensor_types import Float, Tensor
from vlm.train.objectives.loss_term import Inputs, Outputs
from vlm.train.run_config import ModelConfig

_LONGEST_BY_PRODUCTS = 128
"""Positions; of longer sequences all scores would take too much memory."""


def compute_in_bfloat16(task: Any, device: torch.device, settings: ModelConfig) -> None:
    """Let a `TrainingTask` compute in bfloat16 where torch holds that to be safe, with outputs in single precision."""
    forward = task.forward
    # checkpointing computes a block again outside of these contexts, by other functions
    is_changed = device.type == "cpu" and not settings.gradient_checkpointing
    is_short = longest_sequence(task.network) <= _LONGEST_BY_PRODUCTS

    def autocast_forward(inputs: Inputs, outputs: frozenset[str] | None = None) -> Outputs:
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
            if is_changed and is_short:
                contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
            # dynamo would have to trace the mode
            if is_changed and not settings.compile:
                contexts.enter_context(BFloat16Products())
            computed = forward(inputs, outputs)
        return cast(Outputs, convert_to_fp32(computed))

    # on the instance, inside of what DDP wraps
    task.forward = autocast_forward


class BFloat16Products(TorchFunctionMode):
    """Inside of it and of autocast, layers on a CPU are computed by the functions of this module, for one forward pass.

    Each weight is rounded once. Long sequences have torch's fused attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rounded: dict[Tensor, Tensor] = {}

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # called by keywords alone, which few do, they are torch's
        if func is F.linear and args and _can_multiply(*args, **kwargs):
            return self._multiply(*args, **kwargs)
        if func is F.conv2d and args and _can_embed_patches(*args, **kwargs):
            return self._embed_patches(*args, **kwargs)
        if func is F.scaled_dot_product_attention and len(args) > 2:
            if max(args[0].shape[-2], args[1].shape[-2]) > _LONGEST_BY_PRODUCTS:
                with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
                    return func(*args, **kwargs)
            if _can_attend(*args, **kwargs):
                return _attend_by_products(*args, **kwargs)
        return func(*args, **kwargs)

    def _multiply(
        self, inputs: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None = None
    ) -> Float[Tensor, "*N O"]:
        """A linear layer, rounded where autocast rounds it."""
        rounded = self._rounded.get(weight)
        if rounded is None:
            rounded = weight.detach().to(torch.bfloat16)
            if weight.is_leaf:
                self._rounded[weight] = rounded
        # reshaped out here, since what leaves a function as a view cannot be changed in place
        rows = _Product.apply(inputs.reshape(-1, inputs.shape[-1]), weight, rounded, bias)
        return rows.view(*inputs.shape[:-1], len(weight))

    def _embed_patches(
        self,
        pixels: Float[Tensor, "B C Y X"],
        weight: Float[Tensor, "W C P Q"],
        bias: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Float[Tensor, "B W R S"]:
        """A convolution whose places do not overlap, as a product: half the time, backward."""
        height, width = weight.shape[2:]
        rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
        places = pixels.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
        # one copy, which also rounds
        patches = torch.empty(places.shape, dtype=torch.bfloat16).copy_(places).flatten(3).flatten(1, 2)
        return self._multiply(patches, weight.flatten(1), bias).transpose(1, 2).unflatten(2, (rows, columns))


def is_computed_in_bfloat16(tensor: Tensor) -> bool:
    """Whether autocast computes products with this tensor in bfloat16 on a CPU for which oneDNN has such products."""
    is_cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    is_known = tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)
    return is_cast and is_known and has_bfloat16_products()


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 on this CPU; builds of torch without it lack its operators too."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _can_multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    # weights of another class, as quantised ones are, have functions of their own
    is_plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.ndim == 2 and inputs.ndim > 1
    return is_plain and inputs.numel() > 0 and is_computed_in_bfloat16(inputs) and is_computed_in_bfloat16(weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Float[Tensor, "N I"],
        weight: Float[Tensor, "O I"],
        rounded: Float[Tensor, "O I"],
        bias: Float[Tensor, " O"] | None,
    ) -> Float[Tensor, "N O"]:
        rows = inputs.to(torch.bfloat16)
        ctx.save_for_backward(rows, rounded)
        ctx.types = inputs.dtype, weight.dtype, None if bias is None else bias.dtype
        summand = None if bias is None else bias.to(torch.bfloat16)
        # adds the bias to the sums while they are in registers
        return torch.ops.mkldnn._linear_pointwise(rows, rounded, summand, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Float[Tensor, "N O"]
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        rows, rounded = ctx.saved_tensors
        gradient = gradients[0]
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_inputs = (gradient @ rounded).to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            # the shorter side first: oneDNN reads the first of two transposed matrices more slowly
            is_wide = rounded.shape[0] > rounded.shape[1]
            of_weight = (rows.t() @ gradient).t() if is_wide else gradient.t() @ rows
            of_weight = of_weight.to(ctx.types[1], memory_format=torch.contiguous_format)
        if ctx.needs_input_grad[3]:
            of_bias = (gradient.new_ones(1, len(gradient)) @ gradient)[0].to(ctx.types[2])
        return of_inputs, of_weight, None, of_bias


def _can_embed_patches(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    size = tuple(weight.shape[2:])
    is_patchwise = _pair(stride) == size and padding in (0, (0, 0), "valid") and _pair(dilation) == (1, 1)
    is_whole = pixels.ndim == 4 and pixels.shape[2] % size[0] == 0 and pixels.shape[3] % size[1] == 0
    # of images, or of what is not trained: features would have to be brought into rows, and their gradient back
    is_first = not pixels.requires_grad and groups == 1
    return is_patchwise and is_whole and is_first and _can_multiply(pixels, weight.flatten(1), bias)


def _pair(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _can_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> bool:
    is_plain = not dropout_p and not options.get("enable_gqa", False) and is_computed_in_bfloat16(query)
    is_known_mask = attn_mask is None or (not is_causal and _is_fixed_mask(attn_mask))
    # some towers have one head of keys and values for all queries, which torch repeats
    has_same_heads = query.ndim == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    is_rounded = query.dtype == key.dtype == value.dtype == torch.bfloat16
    return is_plain and is_known_mask and has_same_heads and is_rounded


def _is_fixed_mask(mask: Tensor) -> bool:
    """Whether it is one for all heads and samples, is not learned, and leaves each position something to attend to."""
    is_shared = mask.ndim == 2 and mask.is_floating_point() and not mask.requires_grad
    return is_shared and not bool(mask.isneginf().all(dim=-1).any())


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
    """Attention as two batched products with a softmax in single precision between.

    torch's own plain kernel computes all of it in single precision, and its fused one has a slow backward pass: they
    take two and three times as long for 50 tokens.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        attn_mask = torch.full(query.shape[-2:-1] + key.shape[-2:-1], -math.inf).triu(1)
    attended = _Attention.apply(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask, factor)
    return attended.unflatten(0, query.shape[:2])


class _Attention(torch.autograd.Function):
    """Scores are in single precision: large ones, rounded, would change what is attended to."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Float[Tensor, "N L D"],
        keys: Float[Tensor, "N S D"],
        values: Float[Tensor, "N S E"],
        mask: Float[Tensor, "L S"] | None,
        factor: float,
    ) -> Float[Tensor, "N L E"]:
        with torch.autocast("cpu", enabled=False):
            scores = torch.bmm(queries.float().mul_(factor), keys.float().mT)
        if mask is not None:
            scores += mask
        shares = scores.softmax(dim=-1)
        ctx.save_for_backward(queries, keys, values, shares)
        ctx.factor = factor
        return torch.bmm(shares.to(values.dtype), values)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Float[Tensor, "N L E"]
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, shares = ctx.saved_tensors
        gradient = gradients[0]
        of_values = torch.bmm(shares.to(values.dtype).mT, gradient)
        # what all positions have in common has no influence, but would not cancel once it is rounded: so it is taken
        # from the values; and shares, whose sum is one, are not rounded
        size, length, _ = values.shape
        # as a product, the mean takes an eighth of the time
        centred = values - torch.bmm(values.new_full((size, 1, length), 1 / length), values)
        of_shares = torch.bmm(gradient, centred.mT).float()
        of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
        of_scores = of_scores.mul_(ctx.factor).to(keys.dtype)
        return torch.bmm(of_scores, keys), torch.bmm(of_scores.mT, queries), of_values, None, None
