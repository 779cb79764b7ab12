"""A training batch: its tensors, what they were made of, and the way from worker to device."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import starmap
from typing import Any

import torch

from vlm.data.batches import Incident
from vlm.data.captions import DrawnCaption
from vlm.data.device_decode import PreparedView
from vlm.data.order import Address
from vlm.tensors import Float, Int64, Tensor, UInt8

_RECORDS = {"drawn": DrawnCaption, "addresses": Address, "used": Address}


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One process's share of a global batch.

    images are raw bytes of colour, channels-last in memory, normalised on the device. drawn: which caption of each
    sample is in `tokens`.
    addresses are those asked for, used those shown: they differ where a stand-in was needed, and `incidents` says why.
    arrays: stored rows (`StoredArrays`) by name.
    prepared: pictures that are yet to be decoded on the device (`DeviceAhead` does it); images is [0, 3, H, W] until
    then. offsets: byte offsets of those samples' first parts in their shards.
    position: of the first sample in the run; None if the addresses were made up by hand.

    On request (`AssembleTraining`), else None:
    sub_tokens: drawn sentences; rows of padding alone where a sample has fewer.
    local_images: small crops, as images are. identities: of key and encoded picture.
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
    position: int | None = None
    sub_tokens: Int64[Tensor, "B S L"] | None = None
    local_images: UInt8[Tensor, "B V 3 h w"] | None = None
    identities: Int64[Tensor, "B 2"] | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """The text of each sample that was tokenized."""
        return tuple(caption.text for caption in self.drawn)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        given = (self.images, self.tokens, self.sub_tokens, self.local_images, self.identities, *self.arrays.values())
        return tuple(tensor for tensor in given if tensor is not None)

    @property
    def rows(self) -> Int64[Tensor, " B"]:
        """The position of each sample in the run."""
        assert self.position is not None, "the plan of a run says where its batches are"
        return torch.arange(self.position, self.position + len(self.addresses), device=self.tokens.device)

    def __getstate__(self) -> dict[str, Any]:
        """On the way from a worker, small tensors go as plain arrays: each tensor would open a shared file.

        Records go as columns: pickle calls a function for each.
        """
        columns = {name: tuple(zip(*self.__dict__[name], strict=True)) for name in _RECORDS}
        return self.__dict__ | columns | self._each_small(lambda tensor: tensor.cpu().numpy())

    def __setstate__(self, state: dict[str, Any]) -> None:
        records = {name: tuple(starmap(kind, zip(*state[name], strict=True))) for name, kind in _RECORDS.items()}
        self.__dict__.update(state | records)
        self.__dict__.update(self._each_small(torch.from_numpy))

    def with_images(self, images: UInt8[Tensor, "..."]) -> "TrainingBatch":
        """The same batch with other pictures."""
        return replace(self, images=images)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        """The same batch with each tensor of it changed; pictures that are yet to be decoded are left."""
        changed = self._each_small(change)
        for name in ("images", "local_images"):
            pictures = getattr(self, name)
            if pictures is not None and not self.prepared:
                changed[name] = change(pictures)
        return replace(self, **changed)

    def pin_memory(self) -> "TrainingBatch":
        """The same batch in page-locked memory, for overlapped copies to a GPU."""
        return self.changed(torch.Tensor.pin_memory)

    def _each_small(self, change: Callable[[Any], Any]) -> dict[str, Any]:
        """What a change makes of all that is no picture, by the name of its field."""
        changed: dict[str, Any] = {"arrays": {name: change(rows) for name, rows in self.arrays.items()}}
        for name in ("tokens", "sub_tokens", "identities"):
            value = getattr(self, name)
            if value is not None:
                changed[name] = change(value)
        return changed
