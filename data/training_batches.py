"""What a training batch holds: of each sample one view and one caption, with what replaced the unusable ones."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from vlm.data.arrays import StoredArrays
from vlm.data.batches import Incident, incident_of
from vlm.data.captions import CaptionDraw, DrawnCaption
from vlm.data.device_decode import PreparedView, prepare_view
from vlm.data.loader import ShardSet
from vlm.data.order import Address
from vlm.data.plan import TrainingPlan
from vlm.data.samples import sample_rng
from vlm.data.tokenizers import Tokenizer
from vlm.data.views import RandomView
from vlm.errors import BadSample, VlmError
from vlm.tensors import Float, Int64, Tensor, UInt8

MAX_BAD_IN_A_ROW = 100


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One process's share of a global batch.

    images are raw bytes of colour, channels-last in memory, normalised on the device. drawn: which caption of each
    sample is in `tokens`.
    addresses are those asked for, used those shown: they differ where a stand-in was needed, and `incidents` says why.
    arrays: stored rows (`StoredArrays`) by name.
    prepared: pictures that are yet to be decoded on the device (`DeviceAhead` does it); images is [0, 3, H, W] until
    then. offsets: byte offsets of those samples' first parts in their shards.
    """

    images: UInt8[Tensor, "B 3 H W"]
    tokens: Int64[Tensor, "B L"]
    keys: tuple[str, ...]
    drawn: tuple[DrawnCaption, ...]
    addresses: tuple[Address, ...]
    used: tuple[Address, ...]
    incidents: tuple[Incident, ...]
    arrays: dict[str, Float[Tensor, "B D"]] = field(default_factory=dict)
    prepared: tuple[PreparedView, ...] = ()
    offsets: tuple[int, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """The text of each sample that was tokenized."""
        return tuple(caption.text for caption in self.drawn)

    def __getstate__(self) -> dict[str, Any]:
        """On the way from a worker, small tensors go as plain arrays: each tensor would open a shared file."""
        arrays = {name: rows.cpu().numpy() for name, rows in self.arrays.items()}
        return self.__dict__ | {"tokens": self.tokens.cpu().numpy(), "arrays": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {name: torch.from_numpy(rows) for name, rows in state["arrays"].items()}
        self.__dict__.update(state | {"tokens": torch.from_numpy(state["tokens"]), "arrays": arrays})

    def with_images(self, images: UInt8[Tensor, "..."]) -> "TrainingBatch":
        """The same batch with other pictures."""
        return replace(self, images=images)

    def pin_memory(self) -> "TrainingBatch":
        """The same batch in page-locked memory, for overlapped copies to a GPU."""
        arrays = {name: rows.pin_memory() for name, rows in self.arrays.items()}
        images = self.images if self.prepared else self.images.pin_memory()
        return replace(self, images=images, tokens=self.tokens.pin_memory(), arrays=arrays)


class _Row(NamedTuple):
    used: Address
    key: str
    caption: DrawnCaption
    arrays: tuple[np.ndarray, ...]


_RowAndPicture = tuple[_Row, np.ndarray | PreparedView]


@dataclass(frozen=True, kw_only=True)
class AssembleTraining:
    """Draws a view and a caption for each sample; replaces what cannot be used by a stand-in.

    decode_on_device: leave the decoding to the device; batches then hold prepared pictures.
    """

    plan: TrainingPlan
    view: RandomView
    tokenizer: Tokenizer
    draw: CaptionDraw = field(default_factory=CaptionDraw)
    arrays: StoredArrays = field(default_factory=StoredArrays)
    seed: int = 0
    max_bad_in_a_row: int = MAX_BAD_IN_A_ROW
    decode_on_device: bool = False

    @property
    def image_bytes(self) -> int:
        """Bytes of a picture as the model sees it; 0 where it is not decoded here."""
        return 0 if self.decode_on_device else 3 * self.view.size**2

    def __call__(self, addresses: list[Address], shards: ShardSet) -> TrainingBatch:
        """Read, view, draw and tokenize the samples at these addresses."""
        incidents: list[Incident] = []
        rows: list[_Row] = []
        prepared: list[PreparedView] = []
        number = 0 if self.decode_on_device else len(addresses)
        # views are channels-last in memory, as decoders leave them, and stay so
        images = shards.new_images((number, self.view.size, self.view.size, 3))
        for place, address in enumerate(addresses):
            row, image = self._usable(address, shards, incidents)
            rows.append(row)
            if isinstance(image, PreparedView):
                prepared.append(image)
            else:  # copied at once, while it is in the processor's cache
                images[place] = image.transpose(1, 2, 0)
        keys = tuple(row.key for row in rows)
        return TrainingBatch(
            images=torch.from_numpy(images).permute(0, 3, 1, 2),
            tokens=torch.from_numpy(self.tokenizer.encode([row.caption.text for row in rows])),
            keys=keys,
            drawn=tuple(row.caption for row in rows),
            addresses=tuple(addresses),
            used=tuple(row.used for row in rows),
            incidents=tuple(incidents),
            arrays=self.arrays.stack([row.arrays for row in rows], keys),
            prepared=tuple(prepared),
            offsets=tuple(shards.place(row.used)[1] for row in rows) if prepared else (),
        )

    def _usable(self, asked: Address, shards: ShardSet, incidents: list[Incident]) -> _RowAndPicture:
        """The row of the sample asked for, or of the first usable one after it."""
        address = asked
        for attempt in range(1, self.max_bad_in_a_row + 1):
            try:
                return self._row(address, shards)
            except BadSample as error:
                incidents.append(incident_of(address, error, shards, is_stand_in=attempt > 1))
                address = self.plan.stand_in(asked, attempt)
        raise VlmError(
            f"{self.max_bad_in_a_row} samples in a row cannot be used, from number {asked.number} of "
            f"{shards.shards[asked.shard]} on; the last, {incidents[-1].key!r}: {incidents[-1].reason}: "
            f"{incidents[-1].detail}. See vlm inspect; --max-bad-in-a-row raises the limit."
        )

    def _row(self, address: Address, shards: ShardSet) -> _RowAndPicture:
        sample = shards.read(address, self.arrays.members)
        rng = view_rng = sample_rng(self.seed, address.epoch, sample.key, address.repeat)
        caption, view = self.draw(sample, rng), 0
        if self.arrays.has_views:
            view, view_rng = self.arrays.draw_view(sample, rng)
        image = self._picture(sample.image, view_rng)
        arrays = self.arrays.rows(sample, view=view, caption=caption)
        return _Row(address, sample.key, caption, arrays), image

    def _picture(self, image: bytes, rng: np.random.Generator) -> np.ndarray | PreparedView:
        return prepare_view(image, self.view, rng) if self.decode_on_device else self.view(image, rng)
