"""What a batch of evaluation and embedding holds: each sample with its fixed view, all captions, its metadata.

A training batch: its tensors, what they were made of, and the way from worker to device.

How a training batch is made: of each sample one view and one caption; others stand in for the unusable ones.

A batch of the embedding stage: pictures as the model sees them, and samples whose captions can be read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np
import torch

from vlm.data.decode import EncodedImage
from vlm.data.gpu_decode import PreparedView, prepare_view
from vlm.data.loader import ShardSet
from vlm.data.precomputed import PrecomputedFeatures
from vlm.data.sampler import BatchIndices, BatchSampler, SampleIndex
from vlm.data.samples import Captions, CaptionSampler, Sample, SampledCaption, SampleRng, shuffled
from vlm.data.tokenizers import Tokenizer, trim_tokens
from vlm.data.transforms import Crop, EvalTransform, LocalCrops, RandomResizedCrop
from vlm.errors import BadSample, UsageError, VlmError
from vlm.tensors import Array, Float, Int64, Tensor, UInt8


@dataclass(frozen=True, kw_only=True)
class SampleFailure:
    """A sample that could not be used: where it is, its key, the byte offset of its first part in the tar, and why.

    is_stand_in: it was not asked for itself, but tried in place of another.
    """

    sample_index: SampleIndex
    key: str
    offset: int
    reason: str
    detail: str
    is_replacement: bool = False


@dataclass(frozen=True, kw_only=True)
class EvalSample:
    """What evaluation and the catalogue keep of a sample besides its picture."""

    sample_index: SampleIndex
    key: str
    captions: Captions
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvalBatch:
    """Samples of one shard in file order; the bad ones are left out and named in `incidents`."""

    images: UInt8[Tensor, "B 3 H W"]
    items: tuple[EvalSample, ...]
    incidents: tuple[SampleFailure, ...] = field(default_factory=tuple)

    def with_images(self, images: UInt8[Tensor, "..."]) -> "EvalBatch":
        """The same batch with other pictures."""
        return replace(self, images=images)


@dataclass(frozen=True, kw_only=True)
class EvalCollator:
    """Each sample with its fixed view, all its captions and its metadata; without a view, no picture is decoded."""

    view: EvalTransform | None

    @property
    def image_bytes(self) -> int:
        """Bytes of a picture as the model sees it."""
        return 3 * self.view.size**2 if self.view else 0

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> EvalBatch:
        """Read the samples at these addresses."""
        images: list[np.ndarray] = []
        items: list[EvalSample] = []
        incidents: list[SampleFailure] = []
        for sample_index in sample_indices:
            try:
                sample: Sample = shards.read(sample_index)
                if self.view is not None:
                    images.append(self.view(sample.image))
                items.append(
                    EvalSample(
                        sample_index=sample_index, key=sample.key, captions=sample.captions, metadata=sample.metadata
                    )
                )
            except BadSample as error:
                incidents.append(sample_failure(sample_index, error, shards))
        size = self.view.size if self.view else 0
        stacked = shards.allocate_images((len(images), 3, size, size))
        if images:
            np.stack(images, out=stacked)
        return EvalBatch(images=torch.from_numpy(stacked), items=tuple(items), incidents=tuple(incidents))


def sample_failure(
    sample_index: SampleIndex, error: BadSample, shards: ShardSet, *, is_replacement: bool = False
) -> SampleFailure:
    """What is told of a sample that cannot be used."""
    key, offset = shards.key_and_offset(sample_index)
    return SampleFailure(
        sample_index=sample_index,
        key=key,
        offset=offset,
        reason=error.reason,
        detail=error.detail,
        is_replacement=is_replacement,
    )


_RECORDS = {"drawn": SampledCaption, "sample_indices": SampleIndex, "used": SampleIndex}


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
    drawn: tuple[SampledCaption, ...]
    sample_indices: tuple[SampleIndex, ...]
    used: tuple[SampleIndex, ...]
    incidents: tuple[SampleFailure, ...]
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
        return torch.arange(self.position, self.position + len(self.sample_indices), device=self.tokens.device)

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
            images = getattr(self, name)
            if images is not None and not self.prepared:
                changed[name] = change(images)
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


MAX_BAD_IN_A_ROW = 100
NO_IDENTITY = 0
"""Stands for a thing that equals no other."""
_NO_IDENTITIES = (NO_IDENTITY, NO_IDENTITY)


class _Row(NamedTuple):
    """A sample with all that is drawn for it; its pixels are yet to be made. attempt: 0, or of a stand-in."""

    used: SampleIndex
    attempt: int
    key: str
    caption: SampledCaption
    arrays: tuple[np.ndarray, ...]
    sentences: list[str]
    identity: tuple[int, int]
    image: EncodedImage
    crop: Crop


@dataclass(frozen=True)
class _ImageBuffers:
    """Room for those of a batch, channels last as decoders leave them; filled row by row."""

    images: UInt8[Array, "B S S 3"]
    local: UInt8[Array, "B V h w 3"] | None
    prepared: list[PreparedView] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainingCollator:
    """Draws a view and a caption for each sample; replaces what cannot be used by a stand-in.

    decode_on_device: leave the decoding to the device; batches then hold prepared pictures.

    What batches carry besides, none of which changes the rest. num_sentences: how many different sentences, drawn from
    all captions in the languages asked for. local: small crops of the picture. has_identities: hashes of key and
    picture. trim_text: cut the tokens to the longest caption of the batch.

    Raises:
        UsageError: small crops are asked for of pictures that are decoded on the device.
    """

    plan: BatchSampler
    view: RandomResizedCrop
    tokenizer: Tokenizer
    draw: CaptionSampler = field(default_factory=CaptionSampler)
    arrays: PrecomputedFeatures = field(default_factory=PrecomputedFeatures)
    seed: int = 0
    max_bad_in_a_row: int = MAX_BAD_IN_A_ROW
    decode_on_device: bool = False
    num_sentences: int = 0
    local: LocalCrops | None = None
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

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> TrainingBatch:
        """Read, view, draw and tokenize the samples at these addresses."""
        incidents: list[list[SampleFailure]] = [[] for _ in sample_indices]
        # first all reading and drawing, then all decoding: taken in turns, each finds the processor's caches full of
        # what the other left, and takes half as long again
        drawn = [
            self._read_usable(sample_index, shards, found)
            for sample_index, found in zip(sample_indices, incidents, strict=True)
        ]
        buffers = self._allocate(len(sample_indices), shards)
        rows = [
            self._decode_usable(batch_row, sample_index, row, buffers, shards, incidents[batch_row])
            for batch_row, (sample_index, row) in enumerate(zip(sample_indices, drawn, strict=True))
        ]
        keys = tuple(row.key for row in rows)
        return TrainingBatch(
            images=torch.from_numpy(buffers.images).permute(0, 3, 1, 2),
            tokens=self._tokens([row.caption.text for row in rows]),
            keys=keys,
            drawn=tuple(row.caption for row in rows),
            sample_indices=tuple(sample_indices),
            used=tuple(row.used for row in rows),
            incidents=tuple(incident for found in incidents for incident in found),
            arrays=self.arrays.stack([row.arrays for row in rows], keys),
            prepared=tuple(buffers.prepared),
            offsets=tuple(shards.key_and_offset(row.used)[1] for row in rows) if buffers.prepared else (),
            position=sample_indices.position if isinstance(sample_indices, BatchIndices) else None,
            sub_tokens=self._sub_tokens([row.sentences for row in rows]) if self.num_sentences else None,
            local_images=None if buffers.local is None else torch.from_numpy(buffers.local).permute(0, 1, 4, 2, 3),
            identities=torch.tensor([row.identity for row in rows]) if self.has_identities else None,
        )

    def _read_usable(
        self, requested: SampleIndex, shards: ShardSet, incidents: list[SampleFailure], attempt: int = 0
    ) -> _Row:
        """The row of the sample asked for, or of the first after it that can be read, from this attempt on."""
        for number in range(attempt, self.max_bad_in_a_row):
            sample_index = self.plan.replacement(requested, number) if number else requested
            try:
                return self._row(sample_index, number, shards)
            except BadSample as error:
                incidents.append(sample_failure(sample_index, error, shards, is_replacement=number > 0))
        raise VlmError(
            f"{self.max_bad_in_a_row} samples in a row cannot be used, from number {requested.number} of "
            f"{shards.shards[requested.shard]} on; the last, {incidents[-1].key!r}: {incidents[-1].reason}: "
            f"{incidents[-1].detail}. See vlm inspect; --max-bad-in-a-row raises the limit."
        )

    def _decode_usable(
        self,
        batch_row: int,
        requested: SampleIndex,
        row: _Row,
        buffers: _ImageBuffers,
        shards: ShardSet,
        incidents: list[SampleFailure],
    ) -> _Row:
        """The row whose pictures are now in their place: this one, or of the first after it that can be shown."""
        while True:
            try:
                self._decode_into(batch_row, row, buffers)
            except BadSample as error:
                incidents.append(sample_failure(row.used, error, shards, is_replacement=row.attempt > 0))
                row = self._read_usable(requested, shards, incidents, row.attempt + 1)
            else:
                return row

    def _row(self, sample_index: SampleIndex, attempt: int, shards: ShardSet) -> _Row:
        sample = shards.read(sample_index, self.arrays.members)
        rng = view_rng = self._rng_for(sample_index, sample.key)
        caption, view = self.draw(sample, rng), 0
        if self.arrays.has_views:
            view, view_rng = self.arrays.sample_view(sample, rng)
        arrays = self.arrays.rows(sample, view=view, caption=caption)
        sentences = self._sentences(sample_index, sample) if self.num_sentences else []
        identity = (
            (content_hash(sample.key.encode()), content_hash(sample.image)) if self.has_identities else _NO_IDENTITIES
        )
        image = EncodedImage(sample.image)
        crop = self.view.draw(image.width, image.height, view_rng)
        return _Row(sample_index, attempt, sample.key, caption, arrays, sentences, identity, image, crop)

    def _rng_for(self, sample_index: SampleIndex, key: str, purpose: str = "") -> SampleRng:
        return SampleRng(self.seed, sample_index.epoch, key, sample_index.repeat, purpose)

    def _decode_into(self, batch_row: int, row: _Row, buffers: _ImageBuffers) -> None:
        image, crop = row.image, row.crop
        if self.decode_on_device:
            buffers.prepared.append(prepare_view(image, crop, self.view))
            return
        pixels = image.pixels(resolution=self.view.resolution(crop))
        self.view.cut(image, pixels, crop, out=buffers.images[batch_row])
        if self.local and buffers.local is not None:
            crops = self.local.draw(image.width, image.height, self._rng_for(row.used, row.key, "local"))
            self.local.show(image, crops, pixels, out=buffers.local[batch_row])

    def _allocate(self, number: int, shards: ShardSet) -> _ImageBuffers:
        size = self.view.size
        images = shards.allocate_images((0 if self.decode_on_device else number, size, size, 3))
        if self.local is None:
            return _ImageBuffers(images, None)
        size = self.local.view.size
        return _ImageBuffers(images, np.empty((number, self.local.number, size, size, 3), np.uint8))

    def _sentences(self, sample_index: SampleIndex, sample: Sample) -> list[str]:
        rng = self._rng_for(sample_index, sample.key, "sentences")
        return shuffled(self.draw.sentences_of(sample), rng, number=self.num_sentences)

    def _tokens(self, texts: list[str]) -> Int64[Tensor, "B L"]:
        tokens = self.tokenizer.encode(texts)
        return torch.from_numpy(trim_tokens(tokens, self.tokenizer) if self.trim_text else tokens)

    def _sub_tokens(self, sentences: list[list[str]]) -> Int64[Tensor, "B S L"]:
        # one text more, since not every tokenizer takes none at all
        rows = self.tokenizer.encode([*(sentence for some in sentences for sentence in some), ""])[:-1]
        tokens = np.full((len(sentences), self.num_sentences, rows.shape[1]), self.tokenizer.pad_token, np.int64)
        is_given = np.arange(self.num_sentences) < np.array([[len(some)] for some in sentences])
        tokens[is_given] = rows
        return torch.from_numpy(trim_tokens(tokens, self.tokenizer) if self.trim_text else tokens)


def content_hash(content: bytes) -> int:
    """A number of 64 bits that tells contents apart; never `NO_IDENTITY`.

    Two of a million different ones collide once in 37 million times (birthday bound, 2^-65 n^2).
    """
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little", signed=True) or NO_IDENTITY + 1


@dataclass(frozen=True, kw_only=True)
class EmbedBatch:
    """Samples of one shard in file order.

    items: those that can be read. images, pictures: the views [B, 3, H, W] of those whose picture can be decoded, and
        the samples they are of. unread: samples that cannot be read. undecoded: those whose picture cannot be decoded.
    """

    images: UInt8[Tensor, "..."]
    image_samples: tuple[EvalSample, ...]
    items: tuple[EvalSample, ...]
    unread: tuple[SampleFailure, ...]
    undecoded: tuple[SampleFailure, ...]

    def with_images(self, images: UInt8[Tensor, "..."]) -> "EmbedBatch":
        """The same batch with other pictures."""
        return replace(self, images=images)


@dataclass(frozen=True, kw_only=True)
class EmbedCollator:
    """Reads the samples; without a view, no picture is decoded."""

    view: EvalTransform | None

    @property
    def image_bytes(self) -> int:
        """Bytes of a picture as the model sees it."""
        return 3 * self.view.size**2 if self.view else 0

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> EmbedBatch:
        """Read the samples at these addresses."""
        images: list[np.ndarray] = []
        image_samples: list[EvalSample] = []
        items: list[EvalSample] = []
        unread: list[SampleFailure] = []
        undecoded: list[SampleFailure] = []
        for sample_index in sample_indices:
            try:
                sample = shards.read(sample_index)
            except BadSample as error:
                unread.append(sample_failure(sample_index, error, shards))
                continue
            item = EvalSample(
                sample_index=sample_index, key=sample.key, captions=sample.captions, metadata=sample.metadata
            )
            items.append(item)
            if self.view is None:
                continue
            try:
                images.append(self.view(sample.image))
                image_samples.append(item)
            except BadSample as error:
                undecoded.append(sample_failure(sample_index, error, shards))
        size = self.view.size if self.view else 0
        stacked = shards.allocate_images((len(images), 3, size, size))
        if images:
            np.stack(images, out=stacked)
        return EmbedBatch(
            images=torch.from_numpy(stacked),
            image_samples=tuple(image_samples),
            items=tuple(items),
            unread=tuple(unread),
            undecoded=tuple(undecoded),
        )
