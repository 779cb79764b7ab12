"""What a batch holds: for training one view and one caption a sample, for evaluation and embedding everything."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from vlm.data.loader import ShardSet
from vlm.data.order import Address
from vlm.data.plan import TrainingPlan
from vlm.data.samples import Captions, Sample, draw_caption, sample_rng
from vlm.data.tokenizers import Tokenizer
from vlm.data.views import FixedView, RandomView
from vlm.errors import BadSample, VlmError
from vlm.tensors import Int64, Tensor, UInt8

MAX_BAD_IN_A_ROW = 100


@dataclass(frozen=True, kw_only=True)
class Incident:
    """A sample that could not be used: where it is, its key if known, why."""

    address: Address
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One process's share of a global batch.

    images are raw bytes of colour, normalised on the device. addresses are those asked for; where one could not be
    used, `incidents` says why and its row holds a stand-in.
    """

    images: UInt8[Tensor, "B 3 H W"]
    tokens: Int64[Tensor, "B L"]
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    addresses: tuple[Address, ...]
    incidents: tuple[Incident, ...]

    def pin_memory(self) -> "TrainingBatch":
        """The same batch in page-locked memory, for overlapped copies to a GPU."""
        return replace(self, images=self.images.pin_memory(), tokens=self.tokens.pin_memory())


@dataclass(frozen=True, kw_only=True)
class AssembleTraining:
    """Draws a view and a caption for each sample; replaces what cannot be used by a stand-in."""

    plan: TrainingPlan
    view: RandomView
    tokenizer: Tokenizer
    languages: tuple[str, ...] = ()
    seed: int = 0

    def __call__(self, addresses: list[Address], shards: ShardSet) -> TrainingBatch:
        """Read, view, draw and tokenize the samples at these addresses."""
        incidents: list[Incident] = []
        rows = [self._row(address, shards, incidents) for address in addresses]
        captions = tuple(caption for _, _, caption in rows)
        return TrainingBatch(
            images=torch.from_numpy(np.stack([image for _, image, _ in rows])),
            tokens=torch.from_numpy(self.tokenizer.encode(captions)),
            keys=tuple(key for key, _, _ in rows),
            captions=captions,
            addresses=tuple(addresses),
            incidents=tuple(incidents),
        )

    def _row(self, asked: Address, shards: ShardSet, incidents: list[Incident]) -> tuple[str, np.ndarray, str]:
        address = asked
        for attempt in range(1, MAX_BAD_IN_A_ROW + 1):
            try:
                sample = shards.read(address)
                rng = sample_rng(self.seed, address.epoch, sample.key)
                caption = draw_caption(sample.captions, self.languages, rng)
                return sample.key, self.view(sample.image, rng), caption
            except BadSample as error:
                incidents.append(Incident(address=address, reason=error.reason, detail=error.detail))
                address = self.plan.stand_in(asked, attempt)
        raise VlmError(
            f"{MAX_BAD_IN_A_ROW} samples in a row cannot be used, from number {asked.number} of "
            f"{shards.shards[asked.shard]} on; the last: {incidents[-1].reason}: {incidents[-1].detail}"
        )


@dataclass(frozen=True, kw_only=True)
class Item:
    """What evaluation and the catalogue keep of a sample besides its picture."""

    address: Address
    key: str
    captions: Captions
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ItemBatch:
    """Samples of one shard in file order; the bad ones are left out and named in `incidents`."""

    images: UInt8[Tensor, "B 3 H W"]
    items: tuple[Item, ...]
    incidents: tuple[Incident, ...] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class AssembleItems:
    """Each sample with its fixed view, all its captions and its metadata; without a view, no picture is decoded."""

    view: FixedView | None

    def __call__(self, addresses: list[Address], shards: ShardSet) -> ItemBatch:
        """Read the samples at these addresses."""
        images: list[np.ndarray] = []
        items: list[Item] = []
        incidents: list[Incident] = []
        for address in addresses:
            try:
                sample: Sample = shards.read(address)
                if self.view is not None:
                    images.append(self.view(sample.image))
                items.append(Item(address=address, key=sample.key, captions=sample.captions, metadata=sample.metadata))
            except BadSample as error:
                incidents.append(Incident(address=address, reason=error.reason, detail=error.detail))
        size = self.view.size if self.view else 0
        stacked = np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8)
        return ItemBatch(images=torch.from_numpy(stacked), items=tuple(items), incidents=tuple(incidents))
