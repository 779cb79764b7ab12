"""Which parts of an image make it match a text: heat maps of any image tower.

A text is a direction in the joint space: its embedding, or what sets it apart from other texts. The score that is
explained is the inner product of the image's unit vector with it. Methods:

- "attention" (Chefer, Gur and Wolf 2021, arXiv:2103.15679, §3.1): attention weighted by its gradient, layer by layer;
- "grad-cam" (Selvaraju et al. 2017, arXiv:1610.02391, §3): the last map of features, weighted by the gradient's mean;
- "hires-cam" (Draelos and Carin 2020, arXiv:2011.08891): the same, each place weighted by its own gradient;
- "similarity": the cosine of each patch's embedding with the text (see `vlm.models.patch_features`); where there is
  attention, its last layer lets each patch see itself only (MaskCLIP: Zhou et al. 2022, arXiv:2112.01071, §3.2), since
  what patches gather there is the background;
- "eigen-cam" (Muhammad and Yeasin 2020, arXiv:2008.00299): the first principal component of the last map of features.
  It needs no gradient and knows no text: it says where the tower looks, not why the text matches;
- "occlusion" (Zeiler and Fergus 2014, arXiv:1311.2901, §4.2): how much the score falls when a square is covered. It
  needs nothing of the tower but embeddings, and takes 169 of them.

A map of few places is refined by shifting the image by parts of a place and averaging.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vlm.errors import UsageError
from vlm.models.network import Network
from vlm.models.patch_features import run_image_tower, supports_patch_features
from vlm.tensor_types import Float, Tensor

Method = Literal["auto", "attention", "grad-cam", "hires-cam", "similarity", "eigen-cam", "occlusion"]
"""How a heat map is computed; "auto" is attention where the tower has any, else Grad-CAM."""

METHODS: tuple[Method, ...] = get_args(Method)

# maps of fewer places a side point nowhere; then an earlier map of the tower is used, if it has one that is finer
_MIN_SIDE = 4
# the grid of a ViT-B/16 at 224 pixels
_FINE_SIDE = 14
# class, distillation and register tokens in front of the patches
_MAX_PREFIX = 8
# a side of the covered square, and its step, in parts of the image's
_OCCLUDED = 4
_OCCLUSION_STEPS = 13
_IMAGES_AT_ONCE = 64
_TINY = 1e-12


@dataclass(frozen=True)
class _Activation:
    """A module's output as a map. prefix: tokens in front of the patches; -1 of maps with channels first, -2 last."""

    output: Tensor
    grid: tuple[int, int]
    prefix: int

    def places(self, values: Tensor) -> Float[Tensor, "P C"]:
        """Values like the output, a row for each place of the map."""
        if self.prefix == -1:
            return values[0].flatten(1).T
        if self.prefix == -2:
            return values[0].flatten(0, 1)
        return values[0, self.prefix :]


def heat_maps(
    network: Network,
    pixels: Float[Tensor, "1 3 H W"],
    texts: Float[Tensor, "T D"],
    method: str = "auto",
    *,
    shifts: int = 0,
) -> Float[Tensor, "T H W"]:
    """A map for each text over the image; higher means more of a reason.

    pixels: one image, normalised as the network takes it. texts: directions of any length.
    shifts: for how many shifts along each axis the map is computed; 0 takes as many as make 14 places a side of it.
        Occlusion is never shifted.

    Raises:
        UsageError: there is no such method, or the tower has nothing that it needs.
    """
    if method not in METHODS:
        raise UsageError(f"There is no method {method!r} of explaining; give one of {', '.join(METHODS)}.")
    if shifts < 0:
        raise UsageError(f"shifts = {shifts} is out of range: give 0 or more.")
    if method == "auto":
        method = default_method(network, pixels)
    # the weights may be frozen, and a caller in inference mode
    with torch.inference_mode(False), torch.enable_grad():
        pixels = pixels.detach().clone()
        texts = texts.detach().clone().to(pixels.device)
        if method == "occlusion":
            return _occlusion_maps(network, pixels, texts)
        coarse = _coarse_maps(network, pixels, texts, method)
        shifts = shifts or math.ceil(_FINE_SIDE / min(coarse.shape[1:]))
        if shifts == 1:
            return _enlarged(coarse, pixels)
        return _shifted_maps(network, pixels, texts, method, shifts=shifts, cell=pixels.shape[2] / coarse.shape[1])


def _coarse_maps(network: Network, pixels: Tensor, texts: Tensor, method: str) -> Float[Tensor, "T h w"]:
    pixels = pixels.requires_grad_()
    match method:
        case "similarity":
            return _similarity_maps(network, pixels, texts)
        case "attention":
            return _attention_maps(network, pixels, texts)
        case "eigen-cam":
            return _eigen_cam(network, pixels).expand(len(texts), -1, -1)
        case _:
            return _grad_cams(network, pixels, texts, is_local=method == "hires-cam")


def _shifted_maps(
    network: Network, pixels: Tensor, texts: Tensor, method: str, *, shifts: int, cell: float
) -> Float[Tensor, "T H W"]:
    """The mean of maps of the image shifted by parts of a place, each shifted back."""
    height, width = pixels.shape[2:]
    margin = math.ceil(cell / 2)
    padded = F.pad(pixels.detach(), (margin,) * 4, mode="replicate")
    total = pixels.new_zeros(len(texts), height, width)
    # evenly over one place, around no shift
    offsets = [margin + round(((number + 0.5) / shifts - 0.5) * cell) for number in range(shifts)]
    for row in offsets:
        for column in offsets:
            shifted = padded[:, :, row : row + height, column : column + width].clone()
            maps = _enlarged(_coarse_maps(network, shifted, texts, method), pixels)
            # equal shares for all shifts, whatever their scores
            maps = maps / maps.abs().amax(dim=(1, 2), keepdim=True).clamp_min(_TINY)
            back = F.pad(maps[None], (margin,) * 4, mode="replicate")[0]
            top = 2 * margin - row
            left = 2 * margin - column
            total += back[:, top : top + height, left : left + width]
    return total / shifts**2


def _enlarged(maps: Float[Tensor, "T h w"], pixels: Tensor) -> Float[Tensor, "T H W"]:
    return F.interpolate(maps[None], size=pixels.shape[2:], mode="bilinear", align_corners=False)[0]


def default_method(network: Network, pixels: Float[Tensor, "1 3 H W"]) -> Method:
    """What "auto" stands for with this tower."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _recorded_activations(network) as activations,
        _AttentionRecorder() as recorder,
    ):
        network.encode_image(pixels.detach().clone().requires_grad_())
    return "attention" if _attends_to_patches(activations, recorder.weights) else "grad-cam"


def _scores(image: Float[Tensor, "1 D"], texts: Float[Tensor, "T D"]) -> Float[Tensor, " T"]:
    return F.normalize(image.float(), dim=-1)[0] @ texts.to(image.device, torch.float32).T


def _similarity_maps(network: Network, pixels: Tensor, texts: Tensor) -> Float[Tensor, "T h w"]:
    if not supports_patch_features(network):
        raise UsageError(
            "This image tower gives no embeddings of patches; explain by grad-cam, attention or occlusion."
        )
    with torch.no_grad():
        with _AttentionRecorder() as recorder:
            patches = run_image_tower(network, pixels, with_patches=True).patches
        # the last self-attention mixes all patches; seen by itself alone, a patch keeps what is at its place
        # (MaskCLIP's idea)
        square = [number for number, weight in enumerate(recorder.weights) if weight.shape[-1] == weight.shape[-2]]
        if square:
            with _AttentionRecorder(blind_call=square[-1]):
                patches = run_image_tower(network, pixels, with_patches=True).patches
    assert patches is not None
    # towers of this project and of open_clip take square images
    side = math.isqrt(patches.shape[1])
    scores = texts.float() @ F.normalize(patches[0].float(), dim=-1).T
    return scores.unflatten(1, (side, side))


def _grad_cams(network: Network, pixels: Tensor, texts: Tensor, *, is_local: bool) -> Float[Tensor, "T h w"]:
    with _recorded_activations(network) as activations:
        image = network.encode_image(pixels)
    maps: list[Tensor] = []
    for score in _scores(image, texts):
        gradients = torch.autograd.grad(
            score, [activation.output for activation in activations], retain_graph=True, allow_unused=True
        )
        # the last that the score depends on: of a class token's last layer the patches' outputs go unused
        used: list[tuple[_Activation, Tensor]] = []
        for activation, gradient in zip(activations, gradients, strict=True):
            if gradient is not None and bool(activation.places(gradient).any()):
                used.append((activation, gradient))
        if not used:
            raise UsageError("No layer of this image tower has a map of features; explain it by occlusion.")
        activation, gradient = _last_fine(used)
        weights = activation.places(gradient)
        # Grad-CAM weighs channels by their mean gradient; HiResCAM keeps the gradient of each place
        if not is_local:
            weights = weights.mean(dim=0, keepdim=True)
        cam = (activation.places(activation.output) * weights).sum(dim=1).relu()
        maps.append(cam.detach().float().unflatten(0, activation.grid))
    return torch.stack(maps)


def _last_fine(used: "Sequence[tuple[_Activation, Tensor]]") -> "tuple[_Activation, Tensor]":
    fine = [entry for entry in used if min(entry[0].grid) >= _MIN_SIDE]
    return (fine or list(used))[-1]


def _eigen_cam(network: Network, pixels: Tensor) -> Float[Tensor, "1 h w"]:
    with torch.no_grad(), _recorded_activations(network) as activations:
        network.encode_image(pixels)
    if not activations:
        raise UsageError("No layer of this image tower has a map of features; explain it by occlusion.")
    activation, _ = _last_fine([(activation, activation.output) for activation in activations])
    places = activation.places(activation.output).float()
    # principal components are those of what differs between places
    places = places - places.mean(dim=0)
    component = torch.linalg.svd(places, full_matrices=False)[2][0]
    projection = places @ component
    # an axis has no sign: things are smaller than their background, so the longer tail is theirs
    projection = projection * (projection**3).sum().sign()
    return projection.relu().unflatten(0, activation.grid)[None]


@contextmanager
def _recorded_activations(network: Network) -> Iterator[list[_Activation]]:
    """Outputs of the image tower's modules that are maps, in the order they are computed."""
    visual = network.get_submodule("visual")
    channels_last = getattr(getattr(visual, "trunk", None), "output_fmt", "NCHW") == "NHWC"
    activations: list[_Activation] = []
    # tokens are a map only on the grid of the patches that they were made of
    grid: list[tuple[int, int]] = []
    # a server may embed images by the same network in other threads meanwhile
    own_thread = threading.get_ident()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if threading.get_ident() != own_thread or not isinstance(output, torch.Tensor) or output.shape[0] != 1:
            return
        # what does not depend on the image, as embeddings of positions
        if torch.is_grad_enabled() and not output.requires_grad:
            return
        if output.ndim == 4:
            height, width = output.shape[1:3] if channels_last else output.shape[2:]
            # images are square, heads of queries and keys mostly not
            if height == width > 1:
                activations.append(_Activation(output, (height, width), -2 if channels_last else -1))
                grid[:] = [(height, width)]
        elif output.ndim == 3 and grid:
            prefix = output.shape[1] - grid[0][0] * grid[0][1]
            if 0 <= prefix <= _MAX_PREFIX:
                activations.append(_Activation(output, grid[0], prefix))

    handles: list[Any] = []
    for name, module in visual.named_modules():
        # what pools has one row for each query, which is no place; heads of queries and keys are none either
        if "pool" not in name and not name.endswith(("q_norm", "k_norm")):
            handles.append(module.register_forward_hook(record))
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


def _attention_maps(network: Network, pixels: Tensor, texts: Tensor) -> Float[Tensor, "T h w"]:
    with _recorded_activations(network) as activations, _AttentionRecorder() as recorder:
        image = network.encode_image(pixels)
    if not _attends_to_patches(activations, recorder.weights):
        raise UsageError("This image tower has no attention over all its patches; explain it by grad-cam or occlusion.")
    weights = recorder.weights
    last = [activation for activation in activations if activation.prefix >= 0][-1]
    maps: list[Tensor] = []
    for score in _scores(image, texts):
        gradients = torch.autograd.grad(score, [*weights, last.output], retain_graph=True, allow_unused=True)
        row = _relevance(weights, gradients[:-1], _token_weights(gradients[-1], last.output))
        maps.append(row[last.prefix :].detach().float().unflatten(0, last.grid))
    return torch.stack(maps)


def _attends_to_patches(activations: Sequence[_Activation], weights: Sequence[Tensor]) -> bool:
    """Whether there is self-attention, and the last tokens are those that it joins."""
    square = [weight for weight in weights if weight.shape[-1] == weight.shape[-2]]
    tokens = [activation for activation in activations if activation.prefix >= 0]
    return bool(square and tokens) and square[-1].shape[-1] == tokens[-1].output.shape[1]


def _token_weights(gradient: Tensor | None, tokens: Float[Tensor, "1 L C"]) -> Float[Tensor, " L"]:
    """How much each output of the last layer counts for the image: all for a class token, alike for a mean."""
    if gradient is None:
        return tokens.new_full((tokens.shape[1],), 1 / tokens.shape[1])
    sizes = gradient[0].norm(dim=-1)
    return sizes / sizes.sum().clamp_min(torch.finfo(sizes.dtype).tiny)


def _relevance(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], pooling: Float[Tensor, " L"]
) -> Float[Tensor, " L"]:
    """The pooled row of R, to which each layer adds the heads' mean of (∇A ∘ A)⁺ · R (Chefer et al., eq. 5 and 6)."""
    num_tokens = len(pooling)
    # at first each token stands for itself alone
    relevance = torch.eye(num_tokens, device=pooling.device)
    row = pooling
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is None or weight.shape[-1] != num_tokens:
            continue
        counted = (weight * gradient).relu().mean(dim=(0, 1)).float()
        if counted.shape[0] == num_tokens:
            relevance = relevance + counted @ relevance
        else:
            # attention pooling, whose queries stand for the image
            row = counted.mean(dim=0)
    return row @ relevance


class _AttentionRecorder(TorchFunctionMode):
    """Computes attention in the open and keeps its weights, [1, heads, queries, keys], whoever's layer asks for it.

    blind_call: number of a call in which each token attends to itself alone.
    """

    def __init__(self, *, blind_call: int = -1) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self._blind_call = blind_call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called instead of every function of torch."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attend_in_module(**_MULTI_HEAD.bind(*args, **kwargs).arguments)
        result = func(*args, **kwargs)
        # layers that spell attention out
        if func in _SOFTMAX and result.ndim == 4 and result.shape[0] == 1:
            self.weights.append(result)
        return result

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        logits = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        weights = logits.softmax(dim=-1)
        if len(self.weights) == self._blind_call:
            weights = torch.eye(weights.shape[-1], device=weights.device, dtype=weights.dtype).expand_as(weights)
        if weights.ndim == 4 and weights.shape[0] == 1:
            self.weights.append(weights)
        return weights @ value

    def _attend_in_module(self, **given: Any) -> tuple[Tensor, None]:
        """What nn.MultiheadAttention computes, [length, batch, width], for a tower: without masks and dropout."""
        width = given["embed_dim_to_check"]
        parts = given["in_proj_weight"].chunk(3) if given["in_proj_weight"] is not None else _separate(given)
        bias = given["in_proj_bias"]
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        heads: list[Tensor] = []
        for name, weight, of_part in zip(("query", "key", "value"), parts, biases, strict=True):
            projected = F.linear(given[name], weight, of_part)
            split = projected.unflatten(-1, (given["num_heads"], width // given["num_heads"]))
            heads.append(split.permute(1, 2, 0, 3))
        mask = given.get("attn_mask")
        attended = self._attend(*heads, attn_mask=mask)
        joined = attended.permute(2, 0, 1, 3).flatten(2)
        return F.linear(joined, given["out_proj_weight"], given["out_proj_bias"]), None


def _separate(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return given["q_proj_weight"], given["k_proj_weight"], given["v_proj_weight"]


_MULTI_HEAD = signature(F.multi_head_attention_forward)
_SOFTMAX = (torch.softmax, F.softmax, torch.Tensor.softmax)


def _occlusion_maps(network: Network, pixels: Tensor, texts: Tensor) -> Float[Tensor, "T h w"]:
    height, width = pixels.shape[2:]
    sides = (max(1, height // _OCCLUDED), max(1, width // _OCCLUDED))
    rows = torch.linspace(0, height - sides[0], min(_OCCLUSION_STEPS, height)).round().long().tolist()
    columns = torch.linspace(0, width - sides[1], min(_OCCLUSION_STEPS, width)).round().long().tolist()
    corners = list(product(rows, columns))
    with torch.no_grad():
        # the image's own mean colour says least
        filling = pixels.mean(dim=(2, 3), keepdim=True)
        whole = _scores(network.encode_image(pixels), texts)
        falls: list[Tensor] = []
        for first in range(0, len(corners), _IMAGES_AT_ONCE):
            some = corners[first : first + _IMAGES_AT_ONCE]
            covered = pixels.repeat(len(some), 1, 1, 1)
            for image, (row, column) in zip(covered, some, strict=True):
                image[:, row : row + sides[0], column : column + sides[1]] = filling[0]
            embeddings = F.normalize(network.encode_image(covered).float(), dim=-1)
            falls.append(whole - embeddings @ texts.float().T)
    fall = torch.cat(falls)
    total = pixels.new_zeros(len(texts), height, width)
    times = pixels.new_zeros(height, width)
    for of_square, (row, column) in zip(fall, corners, strict=True):
        total[:, row : row + sides[0], column : column + sides[1]] += of_square[:, None, None]
        times[row : row + sides[0], column : column + sides[1]] += 1
    return total / times.clamp_min(1)
