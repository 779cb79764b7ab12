"""What the workers make of samples for teachers: every view of each picture, and all captions."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from vlm.data.arrays import view_rng
from vlm.data.batches import Incident, incident_of
from vlm.data.decode import EncodedPicture
from vlm.data.loader import ShardSet
from vlm.data.order import Address
from vlm.data.samples import Sample
from vlm.data.views import RandomView
from vlm.errors import BadSample
from vlm.tensors import Array, Tensor, UInt8
from vlm.train.reinforcement.views import view_seeds


@dataclass(frozen=True, kw_only=True)
class Viewed:
    """A usable sample: the seeds of its views, uint64 [A], and its captions, languages in their order."""

    key: str
    seeds: np.ndarray
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ViewedBatch:
    """Samples of one shard in file order.

    rows: of each address, its sample, or None for a bad one, which `incidents` names. images: of the usable samples,
    one after the other, the views [A, S, S, 3] at each size S of `sizes`, as rows of plain bytes [B, bytes]; empty on
    the way from a worker.
    """

    images: UInt8[Tensor, "..."]
    rows: tuple[Viewed | None, ...]
    num_views: int
    sizes: tuple[int, ...]
    incidents: tuple[Incident, ...] = field(default_factory=tuple)

    @property
    def usable(self) -> list[Viewed]:
        """The samples that have rows in `images`."""
        return [row for row in self.rows if row is not None]

    def with_images(self, images: UInt8[Tensor, "..."]) -> "ViewedBatch":
        """The same batch with other pictures."""
        return replace(self, images=images)

    def views(self, place: int) -> UInt8[Tensor, "views 3 S S"]:
        """All views at size number `place`, sample by sample."""
        first, size = sum(map(self._bytes, self.sizes[:place])), self.sizes[place]
        images = self.images[:, first : first + self._bytes(size)]
        return images.reshape(len(images) * self.num_views, size, size, 3).permute(0, 3, 1, 2)

    def _bytes(self, size: int) -> int:
        return 3 * size**2 * self.num_views


@dataclass(frozen=True, kw_only=True)
class AssembleViews:
    """Draws `num_views` crops of each picture and shows each of them through every view; no view decodes nothing.

    views: alike in all but size and interpolation, so that a seed gives all of them the same crop.
    """

    views: tuple[RandomView, ...]
    num_views: int
    seed: int

    @property
    def image_bytes(self) -> int:
        """Bytes of all views of a picture."""
        return sum(3 * view.size**2 for view in self.views) * self.num_views

    def __call__(self, addresses: list[Address], shards: ShardSet) -> ViewedBatch:
        """Read the samples at these addresses."""
        images = shards.new_images((len(addresses), self.image_bytes))
        rows: list[Viewed | None] = []
        incidents: list[Incident] = []
        for address in addresses:
            usable = len(rows) - len(incidents)
            try:
                rows.append(self._row(shards.read(address), images[usable]))
            except BadSample as error:
                rows.append(None)
                incidents.append(incident_of(address, error, shards))
        return ViewedBatch(
            images=torch.from_numpy(images[: len(rows) - len(incidents)]),
            rows=tuple(rows),
            num_views=self.num_views,
            sizes=tuple(view.size for view in self.views),
            incidents=tuple(incidents),
        )

    def _row(self, sample: Sample, room: UInt8[Array, " bytes"]) -> Viewed:
        captions = tuple(text for texts in sample.captions.values() for text in texts)
        if not captions:
            raise BadSample("no caption", f"key {sample.key!r}")
        seeds = view_seeds(self.seed, sample.key, self.num_views)
        if self.views:
            self._show(EncodedPicture(sample.image), seeds, room)
        return Viewed(key=sample.key, seeds=seeds, captions=captions)

    def _show(self, picture: EncodedPicture, seeds: np.ndarray, room: UInt8[Array, " bytes"]) -> None:
        first = 0
        for view in self.views:
            size = 3 * view.size**2
            for seed in seeds.tolist():
                crop = view.draw(picture.width, picture.height, view_rng(seed))
                room[first : first + size] = view.show(picture, crop).transpose(1, 2, 0).ravel()
                first += size
