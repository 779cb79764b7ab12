"""Collating: the samples a batch sampler names become a batch, in a loader's worker or in this process.

`TrainingCollator` draws one view and one caption of each sample and replaces the samples that cannot be used; what
evaluation and embedding read is `EvalCollator` of `vlm.data.shards`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, starmap
from typing import Any, NamedTuple

import numpy as np
import torch

from vlm.data.caption_sampler import CaptionMix, CaptionSampler, SampledCaption
from vlm.data.class_labels import ClassLabels
from vlm.data.decode import EncodedImage
from vlm.data.gpu_decode import PreparedView, prepare_view
from vlm.data.loader import stream_batches
from vlm.data.precomputed_features import CachedFeatures, PrecomputedFeatures
from vlm.data.sampler import BatchIndices, BatchSampler, SequentialBatches
from vlm.data.samples import RandomSource, Sample, SampleIndex, SampleRng, shuffled
from vlm.data.shards import EvalBatch, EvalCollator, SampleFailure, ShardSet, count_samples, sample_failure
from vlm.data.tokenizers import Tokenizer, trim_tokens
from vlm.data.transforms import Crop, EvalTransform, LocalCrops, RandomResizedCrop
from vlm.errors import BadSample, UsageError, VlmError
from vlm.files import content_digest
from vlm.tensor_types import Array, Float, Int64, Tensor, UInt8

_RECORDS = {"drawn": SampledCaption, "sample_indices": SampleIndex, "used": SampleIndex}


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One process's share of a global batch.

    images: raw bytes of colour, channels-last in memory, normalized on the device. drawn: which caption of each
        sample is in `tokens`.
    sample_indices: the samples requested; used: those in the batch. They differ where a replacement was needed, and
        `failures` says why.
    arrays: precomputed features by name.
    prepared: images still to be decoded on the device (by `DevicePrefetcher`); images is [0, 3, H, W] until then.
        offsets: byte offsets of those samples' first parts in their shards.
    position: of the first sample in the run; None if the sample indices are not from a sampler.

    On request (`TrainingCollator`), else None:
    class_labels: the number of each sample's class.
    sub_tokens: drawn sentences; rows of padding alone where a sample has fewer.
    local_images: small crops, as images are. identities: hashes of key and encoded image.
    """

    images: UInt8[Tensor, "B 3 H W"]
    tokens: Int64[Tensor, "B L"]
    keys: tuple[str, ...]
    drawn: tuple[SampledCaption, ...]
    sample_indices: tuple[SampleIndex, ...]
    used: tuple[SampleIndex, ...]
    failures: tuple[SampleFailure, ...]
    arrays: dict[str, Float[Tensor, "B D"]] = field(default_factory=dict)
    prepared: tuple[PreparedView, ...] = ()
    offsets: tuple[int, ...] = ()
    position: int | None = None
    sub_tokens: Int64[Tensor, "B S L"] | None = None
    local_images: UInt8[Tensor, "B V 3 h w"] | None = None
    identities: Int64[Tensor, "B 2"] | None = None
    class_labels: Int64[Tensor, " B"] | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """The text of each sample that was tokenized."""
        return tuple(caption.text for caption in self.drawn)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the batch."""
        optional = (self.sub_tokens, self.local_images, self.identities, self.class_labels)
        tensors = [self.images, self.tokens]
        for tensor in optional:
            if tensor is not None:
                tensors.append(tensor)
        return (*tensors, *self.arrays.values())

    @property
    def rows(self) -> Int64[Tensor, " B"]:
        """The position of each sample in the run."""
        assert self.position is not None, "the batch sampler of a run says where its batches are"
        return torch.arange(self.position, self.position + len(self.sample_indices), device=self.tokens.device)

    def __getstate__(self) -> dict[str, Any]:
        """On the way from a worker, small tensors go as plain arrays: each tensor would open a shared file.

        Records go as columns: pickle calls a function for each.
        """
        columns = {name: tuple(zip(*self.__dict__[name], strict=True)) for name in _RECORDS}
        state = self.__dict__ | columns | self._map_small(lambda tensor: tensor.cpu().numpy())
        # images that lie in a shared buffer leave an empty tensor here, which torch would take long to send
        return state if len(self.images) else state | {"images": tuple(self.images.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, kind in _RECORDS.items():
            columns = state[name]
            self.__dict__[name] = tuple(starmap(kind, zip(*columns, strict=True)))
        if isinstance(self.images, tuple):
            self.__dict__["images"] = torch.empty(self.images, dtype=torch.uint8)
        # the arrays are writable and owned by this process by now, so the tensors share their memory
        self.__dict__.update(self._map_small(torch.from_numpy))

    def with_images(self, images: UInt8[Tensor, "..."]) -> "TrainingBatch":
        """The same batch with other images."""
        return replace(self, images=images)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "TrainingBatch":
        """The same batch with each of its tensors changed; images that are still to be decoded are left."""
        tensors = self._map_small(change)
        # where images are prepared, `images` is empty until the device has decoded them
        for name in ("images", "local_images"):
            images = getattr(self, name)
            if images is not None and not self.prepared:
                tensors[name] = change(images)
        return replace(self, **tensors)

    def pin_memory(self) -> "TrainingBatch":
        """The same batch in page-locked memory, for overlapped copies to a GPU."""
        return self.changed(torch.Tensor.pin_memory)

    def _map_small(self, change: Callable[[Any], Any]) -> dict[str, Any]:
        """What a change makes of all tensors but images, by the name of their field."""
        changed: dict[str, Any] = {"arrays": {name: change(rows) for name, rows in self.arrays.items()}}
        for name in ("tokens", "sub_tokens", "identities", "class_labels"):
            tensor = getattr(self, name)
            if tensor is not None:
                changed[name] = change(tensor)
        return changed


MAX_BAD_IN_A_ROW = 100
NO_IDENTITY = 0
"""Stands for a thing that equals no other."""
_NO_IDENTITIES = (NO_IDENTITY, NO_IDENTITY)
_NO_FEATURES: dict[str, np.ndarray] = {}


class _DrawnSample(NamedTuple):
    """A sample with all that is drawn for it, before its pixels are decoded. attempt: 0, or of a replacement."""

    used: SampleIndex
    attempt: int
    key: str
    caption: SampledCaption
    arrays: tuple[np.ndarray, ...]
    features: dict[str, np.ndarray]
    sentences: list[str]
    identity: tuple[int, int]
    class_label: int
    image: EncodedImage
    crop: Crop


@dataclass(frozen=True)
class _ImageBuffers:
    """Memory for the images of a batch, channels last as decoders leave them; filled row by row."""

    images: UInt8[Array, "B S S 3"]
    local: UInt8[Array, "B V h w 3"] | None
    prepared: list[PreparedView] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainingCollator:
    """Draws a view and a caption of each sample; replaces a sample that cannot be used by the next one that can.

    decode_on_device: leave the decoding to the device; batches then hold prepared images.
    cached: features of frozen towers; where those of images are there, no image is decoded, and batches have none.
    caption_mix: captions from sidecars that take the place of the sample's own, with a probability.

    Optional parts of a batch, none of which changes the rest. num_sentences: how many different sentences, drawn from
    all captions in the requested languages. local: small crops of the image. has_identities: hashes of key and image.
    class_labels: reads the class of each sample.
    trim_text: cut the tokens to the longest caption of the batch.

    Raises:
        UsageError: small crops are requested of images that are decoded on the device, or features of captions that are
            not in the shards.
    """

    plan: BatchSampler
    view: RandomResizedCrop
    tokenizer: Tokenizer
    draw: CaptionSampler = field(default_factory=CaptionSampler)
    arrays: PrecomputedFeatures | None = None
    seed: int = 0
    max_bad_in_a_row: int = MAX_BAD_IN_A_ROW
    decode_on_device: bool = False
    num_sentences: int = 0
    local: LocalCrops | None = None
    has_identities: bool = False
    class_labels: ClassLabels | None = None
    trim_text: bool = False
    caption_mix: CaptionMix | None = None
    cached: CachedFeatures | None = None

    def __post_init__(self) -> None:
        if self.decode_on_device and self.local:
            raise UsageError(
                "Small crops are decoded by the workers; leave out --decode-on-device, or the objective that asks "
                "for them."
            )
        if self.caption_mix is not None and self.arrays is not None and self.arrays.has_captions:
            raise UsageError(
                f"{', '.join(self.arrays.names)} have rows for the captions in the shards alone; leave out the new "
                "captions (--captions-from), or these arrays."
            )

    @property
    def image_bytes(self) -> int:
        """Bytes of an image as the model sees it; 0 where it is not decoded here."""
        return 3 * self.view.size**2 if self._decodes else 0

    @property
    def _decodes(self) -> bool:
        return not (self.decode_on_device or self._reads_cached_images)

    @property
    def _reads_cached_images(self) -> bool:
        return self.cached is not None and self.cached.has_images

    def __call__(self, sample_indices: list[SampleIndex], shards: ShardSet) -> TrainingBatch:
        """Read, draw, decode and tokenize these samples."""
        failures: list[list[SampleFailure]] = [[] for _ in sample_indices]

        # First all reading and drawing, then all decoding: one by one, each step finds the processor's caches full of
        # what the other left, and takes half as long again.
        samples: list[_DrawnSample] = []
        for sample_index, own_failures in zip(sample_indices, failures, strict=True):
            samples.append(self._read_usable(sample_index, shards, own_failures))

        # A damaged image may show only now, so that its replacement is read and drawn in between.
        buffers = self._allocate(len(sample_indices), shards)
        for row, sample_index in enumerate(sample_indices):
            samples[row] = self._decode_usable(row, sample_index, samples[row], buffers, shards, failures[row])

        keys: list[str] = []
        drawn: list[SampledCaption] = []
        used: list[SampleIndex] = []
        texts: list[str] = []
        offsets: list[int] = []
        for sample in samples:
            keys.append(sample.key)
            drawn.append(sample.caption)
            used.append(sample.used)
            texts.append(sample.caption.text)
            # looked up only where damage may show later, on the device, when the shards are out of reach
            if buffers.prepared:
                offsets.append(shards.key_and_offset(sample.used)[1])
        return TrainingBatch(
            images=torch.from_numpy(buffers.images).permute(0, 3, 1, 2),
            tokens=self._tokens(texts),
            keys=tuple(keys),
            drawn=tuple(drawn),
            sample_indices=tuple(sample_indices),
            used=tuple(used),
            failures=tuple(chain.from_iterable(failures)),
            arrays=self._stacked(samples, keys),
            prepared=tuple(buffers.prepared),
            offsets=tuple(offsets),
            position=sample_indices.position if isinstance(sample_indices, BatchIndices) else None,
            sub_tokens=self._sub_tokens([sample.sentences for sample in samples]) if self.num_sentences else None,
            local_images=None if buffers.local is None else torch.from_numpy(buffers.local).permute(0, 1, 4, 2, 3),
            identities=torch.tensor([sample.identity for sample in samples]) if self.has_identities else None,
            class_labels=torch.tensor([sample.class_label for sample in samples]) if self.class_labels else None,
        )

    def _read_usable(
        self, requested: SampleIndex, shards: ShardSet, failures: list[SampleFailure], attempt: int = 0
    ) -> _DrawnSample:
        """The requested sample, or the first after it that can be read, from this attempt on."""
        for number in range(attempt, self.max_bad_in_a_row):
            sample_index = self.plan.replacement(requested, number) if number else requested
            try:
                return self._read_and_draw(sample_index, number, shards)
            except BadSample as error:
                failures.append(sample_failure(sample_index, error, shards, is_replacement=number > 0))
        raise VlmError(
            f"{self.max_bad_in_a_row} samples in a row cannot be used, from number {requested.number} of "
            f"{shards.shards[requested.shard]} on; the last, {failures[-1].key!r}: {failures[-1].reason}: "
            f"{failures[-1].detail}. See vlm inspect; --max-bad-in-a-row raises the limit."
        )

    def _decode_usable(
        self,
        row: int,
        requested: SampleIndex,
        sample: _DrawnSample,
        buffers: _ImageBuffers,
        shards: ShardSet,
        failures: list[SampleFailure],
    ) -> _DrawnSample:
        """The sample that was decoded into a row of the buffers: this one, or the first after it that decodes."""
        while True:
            try:
                self._decode_into(row, sample, buffers)
            except BadSample as error:
                failures.append(sample_failure(sample.used, error, shards, is_replacement=sample.attempt > 0))
                # from the next attempt on: beginning at 0 again would try the same damaged samples for ever
                sample = self._read_usable(requested, shards, failures, sample.attempt + 1)
            else:
                return sample

    def _read_and_draw(self, sample_index: SampleIndex, attempt: int, shards: ShardSet) -> _DrawnSample:
        sample = shards.read(sample_index, self.arrays.members if self.arrays else ())

        # The order of the draws must not change, or a seed gives other data: the caption first, then the view.
        rng = self._rng_for(sample_index, sample.key)
        caption = self._draw_caption(sample_index, sample, rng)
        view_rng = rng
        view = 0
        arrays: tuple[np.ndarray, ...] = ()
        if self.arrays is not None:
            if self.arrays.has_views:
                view, view_rng = self.arrays.sample_view(sample, rng)
            arrays = self.arrays.rows(sample, view=view, caption=caption)
        features = _NO_FEATURES
        if self.cached is not None:
            feature_rng = self._rng_for(sample_index, sample.key, "features")
            features = self.cached.rows(sample_index, sample, caption, feature_rng)

        sentences = self._sentences(sample_index, sample) if self.num_sentences else []
        identity = _NO_IDENTITIES
        if self.has_identities:
            # a hash each, so that an equal image is recognized under another key too
            identity = (content_hash(sample.key.encode()), content_hash(sample.image))

        # the header alone; a header that cannot be read is found here, before any pixel is decoded
        image = EncodedImage(sample.image)
        crop = self.view.draw(image.width, image.height, view_rng)
        class_label = self.class_labels.number(sample.metadata) if self.class_labels else 0
        return _DrawnSample(
            sample_index, attempt, sample.key, caption, arrays, features, sentences, identity, class_label, image, crop
        )

    def _draw_caption(self, sample_index: SampleIndex, sample: Sample, rng: RandomSource) -> SampledCaption:
        if self.caption_mix is None:
            return self.draw(sample, rng)
        mix_rng = self._rng_for(sample_index, sample.key, "mix")
        mixed = self.caption_mix.draw(sample_index.shard, sample_index.number, sample.key, mix_rng)
        # drawn in any case, so that mixing changes no crop
        try:
            own = self.draw(sample, rng)
        except BadSample:
            if mixed is None:
                raise
            return mixed
        return own if mixed is None else mixed

    def _rng_for(self, sample_index: SampleIndex, key: str, purpose: str = "") -> SampleRng:
        """The generator of one visit; a purpose of its own keeps an extra draw from shifting the others."""
        return SampleRng(self.seed, sample_index.epoch, key, sample_index.repeat, purpose)

    def _decode_into(self, row: int, sample: _DrawnSample, buffers: _ImageBuffers) -> None:
        """Put a sample's view into a row of the buffers."""
        image = sample.image
        if not self._decodes:
            if self.decode_on_device:
                buffers.prepared.append(prepare_view(image, sample.crop, self.view))
            return
        pixels = image.pixels(resolution=self.view.resolution(sample.crop))
        self.view.cut(image, pixels, sample.crop, out=buffers.images[row])
        if self.local and buffers.local is not None:
            crops = self.local.draw(image.width, image.height, self._rng_for(sample.used, sample.key, "local"))
            self.local.show(image, crops, pixels, out=buffers.local[row])

    def _allocate(self, number: int, shards: ShardSet) -> _ImageBuffers:
        size = self.view.size
        # channels last, as decoders leave them; the batch shows them as [B, 3, H, W] without a copy
        images = shards.allocate_images((number if self._decodes else 0, size, size, 3))
        if self.local is None:
            return _ImageBuffers(images, None)
        size = self.local.view.size
        return _ImageBuffers(images, np.empty((number, self.local.number, size, size, 3), np.uint8))

    def _sentences(self, sample_index: SampleIndex, sample: Sample) -> list[str]:
        rng = self._rng_for(sample_index, sample.key, "sentences")
        return shuffled(self.draw.sentences_of(sample), rng, number=self.num_sentences)

    def _stacked(self, samples: list[_DrawnSample], keys: list[str]) -> dict[str, Float[Tensor, "B F"]]:
        """The stored arrays and the cached features of a batch, by name."""
        stacked: dict[str, torch.Tensor] = {}
        if self.arrays is not None:
            stacked |= self.arrays.stack([sample.arrays for sample in samples], keys)
        for name in samples[0].features if samples else ():
            stacked[name] = torch.from_numpy(np.stack([sample.features[name] for sample in samples]))
        return stacked

    def _tokens(self, texts: list[str]) -> Int64[Tensor, "B L"]:
        tokens = self.tokenizer.encode(texts)
        return torch.from_numpy(trim_tokens(tokens, self.tokenizer) if self.trim_text else tokens)

    def _sub_tokens(self, sentences: list[list[str]]) -> Int64[Tensor, "B S L"]:
        # one text more, since not every tokenizer takes none at all
        rows = self.tokenizer.encode([*chain.from_iterable(sentences), ""])[:-1]
        tokens = np.full((len(sentences), self.num_sentences, rows.shape[1]), self.tokenizer.pad_token, np.int64)
        counts = np.array(list(map(len, sentences)))
        # the mask picks the first slots of each sample row by row, the order in which the sentences were encoded
        tokens[np.arange(self.num_sentences) < counts[:, None]] = rows
        return torch.from_numpy(trim_tokens(tokens, self.tokenizer) if self.trim_text else tokens)


def content_hash(content: bytes) -> int:
    """A number of 64 bits that tells contents apart; never `NO_IDENTITY`.

    Two of a million different ones collide once in 37 million times (birthday bound, 2^-65 n^2).
    """
    return int.from_bytes(content_digest(content, size=8), "little", signed=True) or NO_IDENTITY + 1


def iter_sample_batches(
    shards: Sequence[str], view: EvalTransform | None, *, workers: int, batch_size: int = 256
) -> Iterable[EvalBatch]:
    """Every sample of the shards once, in file order, ready for a model."""
    plan = SequentialBatches(counts=count_samples(list(shards)), batch_size=batch_size)
    return stream_batches(plan, shards, EvalCollator(view=view), numbers=range(len(plan)), workers=workers)
