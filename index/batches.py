"""A batch of the embedding stage: pictures as the model sees them, and samples whose captions can be read."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from vlm.data.batches import Incident, Item, incident_of
from vlm.data.loader import ShardSet
from vlm.data.order import Address
from vlm.data.views import FixedView
from vlm.errors import BadSample
from vlm.tensors import Tensor, UInt8


@dataclass(frozen=True, kw_only=True)
class EmbedBatch:
    """Samples of one shard in file order.

    items: those that can be read. images, pictures: the views [B, 3, H, W] of those whose picture can be decoded, and
        the samples they are of. unread: samples that cannot be read. undecoded: those whose picture cannot be decoded.
    """

    images: UInt8[Tensor, "..."]
    pictures: tuple[Item, ...]
    items: tuple[Item, ...]
    unread: tuple[Incident, ...]
    undecoded: tuple[Incident, ...]

    def with_images(self, images: UInt8[Tensor, "..."]) -> "EmbedBatch":
        """The same batch with other pictures."""
        return replace(self, images=images)


@dataclass(frozen=True, kw_only=True)
class AssembleForEmbedding:
    """Reads the samples; without a view, no picture is decoded."""

    view: FixedView | None

    @property
    def image_bytes(self) -> int:
        """Bytes of a picture as the model sees it."""
        return 3 * self.view.size**2 if self.view else 0

    def __call__(self, addresses: list[Address], shards: ShardSet) -> EmbedBatch:
        """Read the samples at these addresses."""
        images: list[np.ndarray] = []
        pictures: list[Item] = []
        items: list[Item] = []
        unread: list[Incident] = []
        undecoded: list[Incident] = []
        for address in addresses:
            try:
                sample = shards.read(address)
            except BadSample as error:
                unread.append(incident_of(address, error, shards))
                continue
            item = Item(address=address, key=sample.key, captions=sample.captions, metadata=sample.metadata)
            items.append(item)
            if self.view is None:
                continue
            try:
                images.append(self.view(sample.image))
                pictures.append(item)
            except BadSample as error:
                undecoded.append(incident_of(address, error, shards))
        size = self.view.size if self.view else 0
        stacked = shards.new_images((len(images), 3, size, size))
        if images:
            np.stack(images, out=stacked)
        return EmbedBatch(
            images=torch.from_numpy(stacked),
            pictures=tuple(pictures),
            items=tuple(items),
            unread=tuple(unread),
            undecoded=tuple(undecoded),
        )
