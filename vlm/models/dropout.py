"""Dropout that belongs to the sample: what is dropped depends on the sample's number, the layer and the position.

torch's dropout draws one mask for whatever goes through the layer at once, so a batch in two halves, or on two
processes, drops something else than the whole batch. Here every random number is a hash of (seed, number of the sample
in the run, layer, position): micro-batches drop what the whole batch does, and a resumed run what an uninterrupted one
would have.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlm.errors import VlmError
from vlm.files import compute_fingerprint
from vlm.tensor_types import Float, Int, Int64, Tensor

_LOW_32 = 0xFFFFFFFF


@dataclass(eq=False)
class PerSampleNoise:
    """The numbers of the samples that are in the network now, int64 [B]; set before each forward pass."""

    seed: int
    rows: Int64[Tensor, " B"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def uniform(self, layer: int, rows: int, positions: int, device: torch.device) -> Float[Tensor, "N P"]:
        """Numbers in [0, 1) for N = `rows` rows of P = `positions` positions each.

        Where a layer sees several rows per sample (windows, sentences), these are the sample's in their order.

        Raises:
            VlmError: N is not a multiple of the samples.
        """
        keys = self._row_keys(layer, rows, device)[:, None]
        position_keys = _hash32(torch.arange(positions, device=device)[None, :] + 1)
        # the upper 24 bits of a hash, which are all that a float32 in [0, 1) can hold
        return (_hash32(keys ^ position_keys) >> 8).to(torch.float32) * 2.0**-24

    def _row_keys(self, layer: int, rows: int, device: torch.device) -> Int64[Tensor, " N"]:
        """A hash of (seed, sample, layer, row of the sample) for each row."""
        samples = self.rows.to(device)
        # a step that forgot to set the numbers would drop the same in every batch
        if not len(samples) or rows % len(samples):
            raise VlmError(
                f"A dropout layer was given {rows} rows for {len(samples)} samples; set their numbers (`rows`)."
            )
        rows_per_sample = rows // len(samples)
        row_of_sample = torch.arange(rows_per_sample, device=device).repeat(len(samples))
        # two words of 32 bits, mixed one after the other, hold every number of a sample that can occur
        low = samples & _LOW_32
        high = (samples >> 32) & _LOW_32
        keys = _hash32(_hash32(low ^ (self.seed & _LOW_32)) ^ high ^ layer)
        return _hash32(keys.repeat_interleave(rows_per_sample) ^ row_of_sample)


def _hash32(words: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Hash words of 32 bits, kept in 64: Wellons' lowbias32, whose constants a search for low bias has found."""
    words = words & _LOW_32
    words = words ^ (words >> 16)
    words = (words * 0x7FEB352D) & _LOW_32
    words = words ^ (words >> 15)
    words = (words * 0x846CA68B) & _LOW_32
    return words ^ (words >> 16)


class _PerSampleLayer(nn.Module):
    def __init__(self, noise: PerSampleNoise, name: str) -> None:
        super().__init__()
        self.noise = noise
        # by name rather than by order, so that adding a layer does not change the others
        self.layer = int(compute_fingerprint(name)[:8], 16)

    def numbers(self, rows: int, positions: int, device: torch.device) -> Float[Tensor, "N P"]:
        """Uniform numbers of this layer."""
        return self.noise.uniform(self.layer, rows, positions, device)


class PerSampleDropout(_PerSampleLayer):
    """Dropout (Srivastava et al. 2014) by sample; the first axis is the batch."""

    def __init__(self, noise: PerSampleNoise, name: str, probability: float) -> None:
        super().__init__(noise, name)
        self.p = probability

    def forward(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Zero values with probability p and scale the others by 1 / (1 - p), while training."""
        if not self.training or self.p == 0:
            return values
        numbers = self.numbers(len(values), values[0].numel(), values.device).view(values.shape)
        return values * (numbers >= self.p).to(values.dtype) / (1 - self.p)


class PerSampleDropPath(_PerSampleLayer):
    """Stochastic depth (Huang et al. 2016) by sample: the whole branch of a row is dropped."""

    def __init__(self, noise: PerSampleNoise, name: str, probability: float, *, rescale: bool) -> None:
        super().__init__(noise, name)
        self.drop_prob = probability
        self.rescale = rescale

    def forward(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Zero rows with the probability of this layer, while training."""
        if not self.training or self.drop_prob == 0:
            return values
        mask = (self.numbers(len(values), 1, values.device) >= self.drop_prob).to(values.dtype)
        # one number per row, for all of its values
        mask = mask.view(-1, *[1] * (values.ndim - 1))
        return values * (mask / (1 - self.drop_prob) if self.rescale else mask)


class PerSamplePatchDropout(_PerSampleLayer):
    """Drop patches by sample (FLIP, Li et al. 2023); prefix tokens stay."""

    def __init__(self, noise: PerSampleNoise, name: str, probability: float, *, prefix_tokens: int) -> None:
        super().__init__(noise, name)
        self.prob = probability
        self.prefix_tokens = prefix_tokens

    def forward(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B K D"]:
        """Keep the share 1 - p of the patches of each row, in their order, while training."""
        if not self.training or self.prob == 0:
            return tokens
        prefix = tokens[:, : self.prefix_tokens]
        patches = tokens[:, self.prefix_tokens :]
        num_kept = max(1, int(patches.shape[1] * (1 - self.prob)))
        indices = self.kept_patches(len(patches), patches.shape[1], num_kept, tokens.device)
        kept = patches.gather(1, indices[:, :, None].expand(-1, -1, patches.shape[2]))
        return torch.cat([prefix, kept], dim=1)

    def kept_patches(self, rows: int, patches: int, count: int, device: torch.device) -> Int[Tensor, "B K"]:
        """Which patches of each row stay, ascending."""
        return self.numbers(rows, patches, device).topk(count, dim=1).indices.sort(dim=1).values


def use_per_sample_dropout(network: nn.Module, noise: PerSampleNoise) -> int:
    """Replace the dropout layers of a network by ones that draw from `noise`; returns how many.

    Replaced are torch's Dropout, timm's DropPath and PatchDropout, open_clip's PatchDropout. What draws inside a
    function (dropout in a fused attention of some Hugging Face towers) is not replaced; for it the step seeds torch's
    generator.
    """
    replacements: list[tuple[nn.Module, str, nn.Module]] = []
    for path, parent in network.named_modules():
        for name, child in parent.named_children():
            replacement = _per_sample_layer(child, noise, f"{path}.{name}")
            if replacement is not None:
                replacements.append((parent, name, replacement.train(child.training)))
    # afterwards, since a network must not change while it is walked
    for parent, name, replacement in replacements:
        setattr(parent, name, replacement)
    return len(replacements)


def _per_sample_layer(layer: Any, noise: PerSampleNoise, name: str) -> nn.Module | None:
    if isinstance(layer, nn.Dropout):
        return PerSampleDropout(noise, name, layer.p) if layer.p else None
    kind = type(layer).__name__  # timm's classes by name, so that timm need not be imported
    if kind == "DropPath" and getattr(layer, "drop_prob", 0):
        return PerSampleDropPath(noise, name, layer.drop_prob, rescale=getattr(layer, "scale_by_keep", True))
    if kind == "PatchDropout" and getattr(layer, "prob", 0):
        prefix = getattr(layer, "num_prefix_tokens", int(getattr(layer, "exclude_first_token", True)))
        return PerSamplePatchDropout(noise, name, layer.prob, prefix_tokens=prefix)
    return None
