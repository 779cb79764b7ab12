"""What a batch of evaluation and embedding holds: each sample with its fixed view, all captions, its metadata."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from vlm.data.loader import ShardSet
from vlm.data.order import Address
from vlm.data.samples import Captions, Sample
from vlm.data.views import FixedView
from vlm.errors import BadSample
from vlm.tensors import Tensor, UInt8


@dataclass(frozen=True, kw_only=True)
class Incident:
    """A sample that could not be used: where it is, its key, the byte offset of its first part in the tar, and why.

    is_stand_in: it was not asked for itself, but tried in place of another.
    """

    address: Address
    key: str
    offset: int
    reason: str
    detail: str
    is_stand_in: bool = False


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

    def with_images(self, images: UInt8[Tensor, "..."]) -> "ItemBatch":
        """The same batch with other pictures."""
        return replace(self, images=images)


@dataclass(frozen=True, kw_only=True)
class AssembleItems:
    """Each sample with its fixed view, all its captions and its metadata; without a view, no picture is decoded."""

    view: FixedView | None

    @property
    def image_bytes(self) -> int:
        """Bytes of a picture as the model sees it."""
        return 3 * self.view.size**2 if self.view else 0

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
                incidents.append(incident_of(address, error, shards))
        size = self.view.size if self.view else 0
        stacked = shards.new_images((len(images), 3, size, size))
        if images:
            np.stack(images, out=stacked)
        return ItemBatch(images=torch.from_numpy(stacked), items=tuple(items), incidents=tuple(incidents))


def incident_of(address: Address, error: BadSample, shards: ShardSet, *, is_stand_in: bool = False) -> Incident:
    """What is told of a sample that cannot be used."""
    key, offset = shards.place(address)
    return Incident(
        address=address, key=key, offset=offset, reason=error.reason, detail=error.detail, is_stand_in=is_stand_in
    )
