"""From the batches a loader hands over to the inputs a network is given, part by part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from vlm.data.training_batches import TrainingBatch
from vlm.data.views import FixedView
from vlm.models.encoder import normalise
from vlm.models.row_noise import RowNoise
from vlm.tensors import Int64, Tensor, UInt8
from vlm.train.objectives.term import Inputs
from vlm.train.state import seed_step

Provider = Callable[[UInt8[Tensor, "B 3 H W"], Sequence[str]], Inputs]
"""Inputs that a model makes of pictures and captions while training, without gradient (`vlm.train.teachers`)."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """The parts of one process's share of a global batch.

    first_row: number, in the run, of its first sample. providers: by the input they give.
    """

    batches: Sequence[TrainingBatch]
    view: FixedView
    device: torch.device
    noise: RowNoise
    seed: int
    step: int
    process: int
    first_row: int
    with_same: bool
    providers: dict[str, Provider]

    def __call__(self, number: int, names: frozenset[str]) -> Inputs:
        """The inputs of a part, on the device; what the network draws from is seeded for this part."""
        batch = self.batches[number]
        inputs = self.counted(number)
        images = batch.images.to(self.device, non_blocking=True)
        inputs["pixels"] = normalise(images, self.view)
        if batch.local_images is not None and "local_pixels" in names:
            local = batch.local_images.to(self.device, non_blocking=True)
            inputs["local_pixels"] = normalise(local.flatten(0, 1), self.view).unflatten(0, local.shape[:2])
        asked = [self.providers[name] for name in sorted(names & self.providers.keys())]
        for provider in dict.fromkeys(asked):
            inputs |= provider(images, batch.captions)
        self.noise.rows = inputs["rows"]
        seed_step(self.seed, self.step, self.process, number)
        return inputs

    def counted(self, number: int) -> Inputs:
        """All inputs of a part but pictures and what providers make."""
        batch = self.batches[number]
        inputs: Inputs = {"tokens": batch.tokens, "rows": self._rows(number)} | batch.arrays
        if batch.sub_tokens is not None:
            inputs["sub_tokens"] = batch.sub_tokens
        if self.with_same:
            inputs["same"] = identities_of(batch)
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}

    def _rows(self, number: int) -> Int64[Tensor, " B"]:
        first = self.first_row + sum(len(batch.keys) for batch in self.batches[:number])
        return torch.arange(first, first + len(self.batches[number].keys))


def identities_of(batch: TrainingBatch) -> Int64[Tensor, "B G"]:
    """What makes two pairs the same: key and picture as the loader hashed them, where it did, and the caption."""
    captions = torch.tensor([_hash(caption) for caption in batch.captions])[:, None]
    if batch.identities is None:
        return torch.cat([torch.tensor([_hash(key) for key in batch.keys])[:, None], captions], dim=1)
    return torch.cat([batch.identities, captions.to(batch.identities.device)], dim=1)


def _hash(text: str) -> int:
    """64 bits of a text, never 0; 0 for an empty one, which is the same as nothing."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True) or 1 if text else 0
