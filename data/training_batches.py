"""How a training batch is made: of each sample one view and one caption; others stand in for the unusable ones."""

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch

from vlm.data.arrays import StoredArrays
from vlm.data.batches import Incident, incident_of
from vlm.data.captions import CaptionDraw, DrawnCaption
from vlm.data.decode import EncodedPicture
from vlm.data.device_decode import PreparedView, prepare_view
from vlm.data.loader import ShardSet
from vlm.data.local_views import LocalViews
from vlm.data.order import Address, Visits
from vlm.data.plan import TrainingPlan
from vlm.data.samples import Sample, SampleChance, shuffled
from vlm.data.tokenizers import Tokenizer, trimmed
from vlm.data.training_batch import TrainingBatch
from vlm.data.views import Crop, RandomView
from vlm.errors import BadSample, UsageError, VlmError
from vlm.tensors import Array, Int64, Tensor, UInt8

__all__ = ["AssembleTraining", "TrainingBatch", "identity_of"]

MAX_BAD_IN_A_ROW = 100
NO_IDENTITY = 0
"""Stands for a thing that equals no other."""
_NAMELESS = (NO_IDENTITY, NO_IDENTITY)


class _Row(NamedTuple):
    """A sample with all that is drawn for it; its pixels are yet to be made. attempt: 0, or of a stand-in."""

    used: Address
    attempt: int
    key: str
    caption: DrawnCaption
    arrays: tuple[np.ndarray, ...]
    sentences: list[str]
    identity: tuple[int, int]
    picture: EncodedPicture
    crop: Crop


@dataclass(frozen=True)
class _Pictures:
    """Room for those of a batch, channels last as decoders leave them; filled row by row."""

    images: UInt8[Array, "B S S 3"]
    local: UInt8[Array, "B V h w 3"] | None
    prepared: list[PreparedView] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class AssembleTraining:
    """Draws a view and a caption for each sample; replaces what cannot be used by a stand-in.

    decode_on_device: leave the decoding to the device; batches then hold prepared pictures.

    What batches carry besides, none of which changes the rest. num_sentences: how many different sentences, drawn from
    all captions in the languages asked for. local: small crops of the picture. has_identities: hashes of key and
    picture. trim_text: cut the tokens to the longest caption of the batch.

    Raises:
        UsageError: small crops are asked for of pictures that are decoded on the device.
    """

    plan: TrainingPlan
    view: RandomView
    tokenizer: Tokenizer
    draw: CaptionDraw = field(default_factory=CaptionDraw)
    arrays: StoredArrays = field(default_factory=StoredArrays)
    seed: int = 0
    max_bad_in_a_row: int = MAX_BAD_IN_A_ROW
    decode_on_device: bool = False
    num_sentences: int = 0
    local: LocalViews | None = None
    has_identities: bool = False
    trim_text: bool = False

    def __post_init__(self) -> None:
        if self.decode_on_device and self.local:
            raise UsageError(
                "Small crops are decoded by the workers; leave out --decode-on-device, or the objective that asks "
                "for them."
            )

    @property
    def image_bytes(self) -> int:
        """Bytes of a picture as the model sees it; 0 where it is not decoded here."""
        return 0 if self.decode_on_device else 3 * self.view.size**2

    def __call__(self, addresses: list[Address], shards: ShardSet) -> TrainingBatch:
        """Read, view, draw and tokenize the samples at these addresses."""
        incidents: list[list[Incident]] = [[] for _ in addresses]
        # first all reading and drawing, then all decoding: taken in turns, each finds the processor's caches full of
        # what the other left, and takes half as long again
        drawn = [self._usable(address, shards, found) for address, found in zip(addresses, incidents, strict=True)]
        pictures = self._room(len(addresses), shards)
        rows = [
            self._shown(place, address, row, pictures, shards, incidents[place])
            for place, (address, row) in enumerate(zip(addresses, drawn, strict=True))
        ]
        keys = tuple(row.key for row in rows)
        return TrainingBatch(
            images=torch.from_numpy(pictures.images).permute(0, 3, 1, 2),
            tokens=self._tokens([row.caption.text for row in rows]),
            keys=keys,
            drawn=tuple(row.caption for row in rows),
            addresses=tuple(addresses),
            used=tuple(row.used for row in rows),
            incidents=tuple(incident for found in incidents for incident in found),
            arrays=self.arrays.stack([row.arrays for row in rows], keys),
            prepared=tuple(pictures.prepared),
            offsets=tuple(shards.place(row.used)[1] for row in rows) if pictures.prepared else (),
            position=addresses.position if isinstance(addresses, Visits) else None,
            sub_tokens=self._sub_tokens([row.sentences for row in rows]) if self.num_sentences else None,
            local_images=None if pictures.local is None else torch.from_numpy(pictures.local).permute(0, 1, 4, 2, 3),
            identities=torch.tensor([row.identity for row in rows]) if self.has_identities else None,
        )

    def _usable(self, asked: Address, shards: ShardSet, incidents: list[Incident], attempt: int = 0) -> _Row:
        """The row of the sample asked for, or of the first after it that can be read, from this attempt on."""
        for number in range(attempt, self.max_bad_in_a_row):
            address = self.plan.stand_in(asked, number) if number else asked
            try:
                return self._row(address, number, shards)
            except BadSample as error:
                incidents.append(incident_of(address, error, shards, is_stand_in=number > 0))
        raise VlmError(
            f"{self.max_bad_in_a_row} samples in a row cannot be used, from number {asked.number} of "
            f"{shards.shards[asked.shard]} on; the last, {incidents[-1].key!r}: {incidents[-1].reason}: "
            f"{incidents[-1].detail}. See vlm inspect; --max-bad-in-a-row raises the limit."
        )

    def _shown(
        self,
        place: int,
        asked: Address,
        row: _Row,
        pictures: _Pictures,
        shards: ShardSet,
        incidents: list[Incident],
    ) -> _Row:
        """The row whose pictures are now in their place: this one, or of the first after it that can be shown."""
        while True:
            try:
                self._show(place, row, pictures)
            except BadSample as error:
                incidents.append(incident_of(row.used, error, shards, is_stand_in=row.attempt > 0))
                row = self._usable(asked, shards, incidents, row.attempt + 1)
            else:
                return row

    def _row(self, address: Address, attempt: int, shards: ShardSet) -> _Row:
        sample = shards.read(address, self.arrays.members)
        rng = view_rng = self._chance(address, sample.key)
        caption, view = self.draw(sample, rng), 0
        if self.arrays.has_views:
            view, view_rng = self.arrays.draw_view(sample, rng)
        arrays = self.arrays.rows(sample, view=view, caption=caption)
        sentences = self._sentences(address, sample) if self.num_sentences else []
        identity = (identity_of(sample.key.encode()), identity_of(sample.image)) if self.has_identities else _NAMELESS
        picture = EncodedPicture(sample.image)
        crop = self.view.draw(picture.width, picture.height, view_rng)
        return _Row(address, attempt, sample.key, caption, arrays, sentences, identity, picture, crop)

    def _chance(self, address: Address, key: str, purpose: str = "") -> SampleChance:
        return SampleChance(self.seed, address.epoch, key, address.repeat, purpose)

    def _show(self, place: int, row: _Row, pictures: _Pictures) -> None:
        picture, crop = row.picture, row.crop
        if self.decode_on_device:
            pictures.prepared.append(prepare_view(picture, crop, self.view))
            return
        pixels = picture.pixels(resolution=self.view.resolution(crop))
        self.view.cut(picture, pixels, crop, out=pictures.images[place])
        if self.local and pictures.local is not None:
            crops = self.local.draw(picture.width, picture.height, self._chance(row.used, row.key, "local"))
            self.local.show(picture, crops, pixels, out=pictures.local[place])

    def _room(self, number: int, shards: ShardSet) -> _Pictures:
        size = self.view.size
        images = shards.new_images((0 if self.decode_on_device else number, size, size, 3))
        if self.local is None:
            return _Pictures(images, None)
        size = self.local.view.size
        return _Pictures(images, np.empty((number, self.local.number, size, size, 3), np.uint8))

    def _sentences(self, address: Address, sample: Sample) -> list[str]:
        chance = self._chance(address, sample.key, "sentences")
        return shuffled(self.draw.sentences_of(sample), chance, number=self.num_sentences)

    def _tokens(self, texts: list[str]) -> Int64[Tensor, "B L"]:
        tokens = self.tokenizer.encode(texts)
        return torch.from_numpy(trimmed(tokens, self.tokenizer) if self.trim_text else tokens)

    def _sub_tokens(self, sentences: list[list[str]]) -> Int64[Tensor, "B S L"]:
        # one text more, since not every tokenizer takes none at all
        rows = self.tokenizer.encode([*(sentence for some in sentences for sentence in some), ""])[:-1]
        tokens = np.full((len(sentences), self.num_sentences, rows.shape[1]), self.tokenizer.pad_token, np.int64)
        is_given = np.arange(self.num_sentences) < np.array([[len(some)] for some in sentences])
        tokens[is_given] = rows
        return torch.from_numpy(trimmed(tokens, self.tokenizer) if self.trim_text else tokens)


def identity_of(content: bytes) -> int:
    """A number of 64 bits that tells contents apart; never `NO_IDENTITY`.

    Two of a million different ones collide once in 37 million times (birthday bound, 2^-65 n^2).
    """
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True) or NO_IDENTITY + 1
