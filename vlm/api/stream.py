"""Streams: batches of shards for any training loop, which go on exactly where they were stopped."""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import torch
from typing_extensions import override

from vlm.data.collate import TrainingBatch, TrainingCollator
from vlm.data.loader import stream_batches
from vlm.data.sampler import BatchSampler, SequentialBatches
from vlm.data.samples import Captions, SampleIndex, select_languages
from vlm.data.shards import BatchPlan, Collator, EvalBatch, EvalCollator, SampleFailure
from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError, os_errors_explained
from vlm.index.embed import ProcessRank
from vlm.index.ids import UidAssigner
from vlm.models.model import normalise
from vlm.tensor_types import Array, Float32, Int64, Tensor, UInt8

# of an endless stream: more than any loop asks for, and a length that `range` still has
_ENDLESS = 1 << 40


@dataclass(frozen=True, kw_only=True)
class StreamBatch:
    """Image-text pairs for one step.

    images: normalised for the model, or bytes of colour if the stream was asked for those. tokens: of `texts`.
    keys: of the samples in their shards. failures: samples that could not be used; in training another one stands in
        for each, in evaluation they are left out.
    """

    images: Float32[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"]
    tokens: Int64[Tensor, "B L"]
    texts: tuple[str, ...]
    keys: tuple[str, ...]
    sample_indices: tuple[SampleIndex, ...]
    failures: tuple[SampleFailure, ...]
    _name: Callable[[int, int, str], str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def uids(self) -> tuple[str, ...]:
        """As an index over the same shards names the samples: the key, longer where several samples share it."""
        samples = zip(self.sample_indices, self.keys, strict=True)
        return tuple(self._name(sample_index.shard, sample_index.number, key) for sample_index, key in samples)


@dataclass(frozen=True, kw_only=True)
class PairRows:
    """What a batch of either kind holds."""

    images: UInt8[Tensor, "B 3 H W"]
    tokens: Int64[Tensor, "B L"]
    texts: tuple[str, ...]
    keys: tuple[str, ...]
    sample_indices: tuple[SampleIndex, ...]
    failures: tuple[SampleFailure, ...]


class Reading(Protocol):
    """Which batches a stream has, and what it makes of one."""

    @property
    def plan(self) -> BatchPlan:
        """Which samples a batch holds."""
        ...

    @property
    def collate(self) -> Collator[Any]:
        """What makes a batch of them."""
        ...

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, over all processes."""
        ...

    @property
    def length(self) -> int | None:
        """Batches of a pass in this process; None for an endless one."""
        ...

    @property
    def epochs_per_batch(self) -> float:
        """The share of an epoch that a batch is."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What a state must have in common with a stream to fit it."""
        ...

    def numbers(self, position: int) -> range:
        """The numbers in the plan of what is left of a pass, after so many batches."""
        ...

    def rows(self, batch: Any) -> PairRows:
        """The content of a batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingReading:
    """Shuffled samples with random crops and drawn captions.

    epochs: of a pass; None is endless. sequence: fingerprint of the order of all samples.
    """

    plan: BatchSampler
    collate: TrainingCollator
    epochs: float | None
    sequence: str

    @property
    def num_samples(self) -> int:
        """Visits of an epoch."""
        return self.plan.order.num_samples

    @property
    def length(self) -> int | None:
        """Batches of a pass; the last one is filled from the next epoch."""
        return None if self.epochs is None else max(1, math.ceil(self.epochs * self.num_samples / self.plan.batch_size))

    @property
    def epochs_per_batch(self) -> float:
        """The share of an epoch that a global batch is."""
        return self.plan.batch_size / self.num_samples

    @property
    def identity(self) -> dict[str, Any]:
        """Not the processes: a global batch is the same for any number of them."""
        return {"transform": "training", "batch_size": self.plan.batch_size, "sequence": self.sequence}

    def numbers(self, position: int) -> range:
        """From the position to the end of its pass."""
        if self.length is None:
            return range(position, position + _ENDLESS)
        # a position at the end of a pass is the start of the next one
        return range(position, (position // self.length + 1) * self.length)

    def rows(self, batch: TrainingBatch) -> PairRows:
        """The content of a batch."""
        return PairRows(
            images=batch.images,
            tokens=batch.tokens,
            texts=batch.captions,
            keys=batch.keys,
            sample_indices=batch.used,
            failures=batch.failures,
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationReading:
    """Each sample once, in file order, with its fixed view and its first caption; each process has every n-th batch."""

    plan: SequentialBatches
    collate: EvalCollator
    tokenizer: Tokenizer
    languages: tuple[str, ...]
    share: ProcessRank
    sequence: str

    @property
    def num_samples(self) -> int:
        """Samples of the shards, without those that a selection leaves out."""
        return sum(self.plan.samples_per_shard)

    @property
    def length(self) -> int:
        """Batches of this process."""
        return len(self._own_numbers)

    @property
    def epochs_per_batch(self) -> float:
        """The share of this process's batches that one is."""
        return 1 / max(self.length, 1)

    @property
    def identity(self) -> dict[str, Any]:
        """With the processes, among which the batches are dealt."""
        return {
            "transform": "evaluation",
            "batch_size": self.plan.batch_size,
            "sequence": self.sequence,
            "world_size": self.share.world_size,
        }

    @property
    def _own_numbers(self) -> range:
        return range(self.share.rank, len(self.plan), self.share.world_size)

    def numbers(self, position: int) -> range:
        """From the position to the end."""
        return self._own_numbers[position % max(self.length, 1) :]

    def rows(self, batch: EvalBatch) -> PairRows:
        """The content of a batch; an image without a caption has an empty text."""
        texts = tuple(self._first_text(sample.captions) for sample in batch.decoded)
        # not every tokenizer takes no text at all
        tokens = self.tokenizer.encode([*texts, ""])[:-1]
        return PairRows(
            images=batch.images,
            tokens=torch.from_numpy(tokens),
            texts=texts,
            keys=tuple(sample.key for sample in batch.decoded),
            sample_indices=tuple(sample.sample_index for sample in batch.decoded),
            failures=(*batch.unread, *batch.undecoded),
        )

    def _first_text(self, captions: Captions) -> str:
        # a sample without captions of these languages is still an image to evaluate on
        try:
            selected = select_languages(captions, self.languages)
        except BadSample:
            return ""
        return next(iter(selected.values()))[0]


TextsToTokens: TypeAlias = Callable[[list[str]], Any]
"""A tokenizer of another library, such as open_clip's: texts to ids [T, L], as a tensor or an array."""


class CallableTokenizer(Tokenizer):
    """A tokenizer of another library as a stream needs it, which encodes and does nothing else."""

    start_token = end_token = pad_token = vocab_size = 0

    def __init__(self, texts_to_tokens: TextsToTokens) -> None:
        self._texts_to_tokens = texts_to_tokens
        self.context_length = self.encode([""]).shape[1]

    @override
    def encode(self, texts: Sequence[str]) -> Int64[Array, "T L"]:
        rows = np.asarray(self._texts_to_tokens(list(texts)), dtype=np.int64)
        if rows.ndim != 2 or len(rows) != len(texts):
            raise UsageError(
                f"The tokenizer gives {rows.shape} for {len(texts)} texts; it must give a row of ids for each, padded "
                "to one length."
            )
        return rows

    @override
    def decode(self, tokens: Sequence[int]) -> str:
        raise UsageError("A tokenizer of another library decodes by itself.")

    @override
    def save(self, folder: Path) -> None:
        raise UsageError("A tokenizer of another library is not saved with a model.")

    @override
    def fingerprint(self) -> str:
        raise UsageError("A tokenizer of another library has no fingerprint.")


class SampleStream:
    """What `vlm.stream` gives: loop over it for batches; close it, or use it in a `with`, to end its workers.

    A loop is one pass of so many epochs as were asked for. It goes on where the one before stopped, by `break`, by
    `load_state_dict` or at the end of a pass, after which the next pass begins. Of a state that was saved in the loop,
    at the last batch of a pass, nothing is left: the first loop is empty, and the one after it is the next pass.

    num_failures: samples of this process so far that could not be used.
    """

    def __init__(
        self, shards: tuple[str, ...], reading: Reading, view: EvalTransform, *, workers: int, is_normalised: bool
    ) -> None:
        self._shards = shards
        self._reading = reading
        self._view = view
        self._workers = workers
        self._is_normalised = is_normalised
        self._position = 0
        self._is_between_passes = True
        self._is_rest_empty = False
        self._batches: Generator[StreamBatch, None, None] | None = None
        self.num_failures = 0

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, over all processes."""
        return self._reading.num_samples

    @property
    def position(self) -> int:
        """Batches handed out since the beginning of the first pass."""
        return self._position

    @property
    def epoch(self) -> float:
        """Epochs handed out: 1.5 in the middle of the second one."""
        return self._position * self._reading.epochs_per_batch

    def __len__(self) -> int:
        """Batches of a pass, in this process."""
        if self._reading.length is None:
            raise TypeError("An endless stream (epochs=None) has no length.")
        return self._reading.length

    def __iter__(self) -> Iterator[StreamBatch]:
        # a second loop over the same stream would read ahead beside the first one's workers
        self.close()
        self._batches = self._open()
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in plain values; every batch that was handed out counts as used."""
        return {
            "position": self._position,
            "is_between_passes": self._is_between_passes,
            "num_failures": self.num_failures,
            **self._reading.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream of the same samples was; the number of workers has no influence on its batches.

        Raises:
            UsageError: the state is that of another stream.
        """
        if not isinstance(state, dict):
            raise UsageError(f"{type(state).__name__} is not a state; give what state_dict gave.")
        for name, value in self._reading.identity.items():
            if state.get(name) != value:
                raise UsageError(
                    f"The state is of another stream: {name} was {state.get(name)!r} and is {value!r} here. Open the "
                    "stream with the shards, selection, seed, transform and batch size it had."
                )
        position = state.get("position")
        num_failures = state.get("num_failures", 0)
        if not isinstance(position, int) or not isinstance(num_failures, int) or position < 0:
            raise UsageError(f"position = {position!r} is none; give the whole state that state_dict gave.")
        self.close()
        self._position = position
        self.num_failures = num_failures
        self._is_between_passes = bool(state.get("is_between_passes", True))
        length = self._reading.length
        # a state saved in the body of the last batch: the pass is over, though its loop had not ended
        self._is_rest_empty = not self._is_between_passes and length is not None and position % max(length, 1) == 0

    def close(self) -> None:
        """End the workers; a later loop starts new ones."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Generator[StreamBatch, None, None]:
        if self._is_rest_empty:
            self._is_rest_empty = False
            self._is_between_passes = True
            return
        batches = stream_batches(
            self._reading.plan,
            self._shards,
            self._reading.collate,
            numbers=self._reading.numbers(self._position),
            workers=self._workers,
        )
        try:
            while True:
                # the errors of the loop's own body, which run through the yield, are not ours to explain
                with os_errors_explained():
                    batch = next(batches, None)
                if batch is None:
                    self._is_between_passes = True
                    return
                rows = self._reading.rows(batch)
                # before the yield: a state that is saved in the loop's body counts this batch as used
                self._position += 1
                self._is_between_passes = False
                self.num_failures += len(rows.failures)
                # a batch of which no sample can be used is counted, but a loop cannot do anything with it
                if rows.keys:
                    yield self._finished(rows)
        finally:
            batches.close()

    def _finished(self, rows: PairRows) -> StreamBatch:
        return StreamBatch(
            images=normalise(rows.images, self._view) if self._is_normalised else rows.images,
            tokens=rows.tokens,
            texts=rows.texts,
            keys=rows.keys,
            sample_indices=rows.sample_indices,
            failures=rows.failures,
            _name=self._name,
        )

    def _name(self, shard: int, number: int, key: str) -> str:
        return self._assigner.name(shard, number, key)

    @cached_property
    def _assigner(self) -> UidAssigner:
        # only when a uid is asked for: it reads the keys of all shards
        return UidAssigner.for_shards(self._shards)
