"""Features of images and texts, computed once for each model and set and shared by all evaluators.

On disk a matrix lies next to a small JSON file with its checksum, which is written last: without it, or where it does
not fit, the features are computed again.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from vlm.console import progress
from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.evaluation.evaluation_set import IMAGES_AT_ONCE, EvaluationSet, Pixels, SetBatch, as_pixels
from vlm.files import atomic_write, compute_fingerprint, json_text, sha256_file, write_text
from vlm.models.onnx_encoder import OnnxEncoder
from vlm.tensor_types import Array, Float32, Tensor, UInt8

logger = logging.getLogger(__name__)

Layer = Literal["projected", "pooled"]
"""Unit vectors in the space of images and texts, or what the image tower gives before the projection into it."""

_FORMAT = "1"
# one batch of the network, so that processes that share the texts run it equally often
TEXTS_AT_ONCE = 256

Part = TypeVar("Part")


@runtime_checkable
class EvaluatedEncoder(Protocol):
    """What features need of a model."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Identity of weights, image preprocessing and tokenizer."""
        ...

    @property
    def view(self) -> EvalTransform:
        """The transform of its images."""
        ...

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature that turns cosines into logits."""
        ...

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of images; of an `OnnxEncoder` from arrays to arrays."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts."""
        ...


@runtime_checkable
class PoolingEncoder(Protocol):
    """A model that gives features before their projection, too."""

    def pool_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B P"]:
        """What the image tower gives before the projection, not normalised."""
        ...


@runtime_checkable
class WorkSharing(Protocol):
    """Processes that compute features together, each a part of the batches; all have to ask for the same in turn."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        ...

    @property
    def num_processes(self) -> int:
        """How many there are."""
        ...

    def gather(self, parts: list[Part]) -> list[Part]:
        """The parts of all processes."""
        ...


class _Alone:
    rank = 0
    num_processes = 1

    def gather(self, parts: list[Part]) -> list[Part]:
        return parts


@dataclass
class PixelMemory:
    """Images of sets as a model sees them, kept for the next time they are embedded, up to so many bytes in all.

    While a model trains its features change, and reading and decoding the same images again would take longer than
    embedding them.
    """

    max_bytes: int
    _batches: dict[str, list[SetBatch]] = field(default_factory=dict)
    _used_bytes: int = 0

    def batches(self, key: str, open_batches: Callable[[], Iterable[SetBatch]]) -> Iterator[SetBatch]:
        """The batches that are kept under a key; else those that are opened, which are kept where there is room."""
        if key in self._batches:
            yield from self._batches[key]
            return
        kept: list[SetBatch] | None = []
        num_bytes = 0
        for batch in open_batches():
            num_bytes += batch.images.nbytes
            if self._used_bytes + num_bytes > self.max_bytes:
                # half a set is of no use: its batches are let go, and it is read again next time
                kept = None
            if kept is not None:
                # a copy, since a batch of a loader may lie in memory that is used again
                images = batch.images
                kept.append(batch.with_images(images.copy() if isinstance(images, np.ndarray) else images.clone()))
            yield batch
        if kept is not None:
            self._batches[key] = kept
            self._used_bytes += num_bytes


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """The JSON file of a matrix. failures: rows of the set without features, and why."""

    sha256: str
    shape: tuple[int, ...]
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Features:
    """A row for each image that can be decoded, or for each text. failures: why others have none, by row of the set."""

    vectors: Float32[Array, "N D"]
    failures: dict[int, str] = field(default_factory=dict)


class FeatureCache:
    """Features by key, in a folder, or in memory where there is none. Several processes may share a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._in_memory: dict[str, Features] = {}

    def get(self, key: str, compute: Callable[[], Features], *, remember: bool = True) -> Features:
        """What is kept under the key, memory-mapped from a folder; else what `compute` gives, which is kept.

        remember: False keeps it in a folder alone, not in memory.

        Raises:
            OSError: the folder cannot be written. Also as `compute`.
        """
        if key in self._in_memory:
            return self._in_memory[key]
        stored = None if self._folder is None else self._read(self._folder / key)
        features = stored or self._keep(key, compute())
        if remember:
            self._in_memory[key] = features
        return features

    def _keep(self, key: str, features: Features) -> Features:
        if self._folder is None:
            return features
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / key
        with atomic_write(path.with_suffix(".npy")) as file:
            np.save(file, features.vectors)
        # the vectors first: without its JSON a file counts as unfinished, whoever was interrupted
        entry = _Entry(
            sha256=sha256_file(path.with_suffix(".npy")),
            shape=features.vectors.shape,
            failures={str(row): reason for row, reason in features.failures.items()},
        )
        write_text(path.with_suffix(".json"), json_text(asdict(entry)) + "\n")
        # mapped, not what was computed, so that the first use and every later one read the same
        return Features(np.load(path.with_suffix(".npy"), mmap_mode="r"), features.failures)

    def _read(self, path: Path) -> Features | None:
        """What lies at a path, or None where nothing does, or nothing that can be used."""
        if not path.with_suffix(".json").is_file():
            return None
        try:
            values = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            # JSON has no tuples
            entry = _Entry(**(values | {"shape": tuple(values["shape"])}))
            vectors = np.load(path.with_suffix(".npy"), mmap_mode="r")
            is_whole = vectors.shape == entry.shape and vectors.dtype == np.float32
            if is_whole and sha256_file(path.with_suffix(".npy")) == entry.sha256:
                return Features(vectors, {int(row): reason for row, reason in entry.failures.items()})
        # whatever a damaged file holds: features can always be computed again
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.debug(f"{path}: {error}")
        logger.warning(f"The features in {path.with_suffix('.npy')} are damaged; they are computed again.")
        return None


class EvaluatedModel:
    """A model as evaluators use it: whatever several of them need is computed once.

    encoder: the model itself, for what is not a feature. cache: where features are kept; in memory if not given.
    workers: processes that read and decode images; 0 does it in this one. sharing: processes that compute features
    together; their features are bit for bit those of one process. pixels: where decoded images are kept.
    """

    def __init__(
        self,
        encoder: EvaluatedEncoder | OnnxEncoder,
        *,
        cache: FeatureCache | None = None,
        workers: int = 0,
        sharing: WorkSharing | None = None,
        pixels: PixelMemory | None = None,
    ) -> None:
        self.encoder = encoder
        self._cache = cache or FeatureCache()
        self._workers = workers
        self._sharing = sharing or _Alone()
        self._pixels = pixels or PixelMemory(max_bytes=0)

    @property
    def name(self) -> str:
        """What it was loaded from."""
        return self.encoder.name

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space."""
        return self.encoder.fingerprint

    @property
    def view(self) -> EvalTransform:
        """The transform of its images."""
        return self.encoder.view

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature that turns cosines into logits."""
        return self.encoder.logit_scale

    def image_features(
        self, data: EvaluationSet, *, layer: Layer = "projected"
    ) -> tuple[EvaluationSet, Float32[Array, "N D"]]:
        """The images of the set that can be decoded, as a set, and a row of features for each of them.

        Raises:
            UsageError: no image can be decoded, or the model gives no such features.
            VlmError: features are not finite: the model has diverged.
        """
        key = self._key("images", layer, data.digest)
        # altered images are looked at once, in up to 75 ways
        remember = not data.images.alterations
        features = self._cache.get(key, lambda: self._compute_images(data, layer), remember=remember)
        if not len(features.vectors):
            reason = next(iter(features.failures.values()), "there are none")
            raise UsageError(f"No image of {data.name} can be used: {reason}.")
        if features.failures:
            logger.warning(f"{len(features.failures):,} of {len(data):,} images of {data.name} cannot be decoded.")
            # features have rows only for what could be decoded, so the set must have the same
            data = data.select([row for row in range(len(data)) if row not in features.failures])
        return data, features.vectors

    def text_features(self, texts: Sequence[str]) -> Float32[Array, "T D"]:
        """A unit vector for each text.

        Raises:
            VlmError: features are not finite: the model has diverged.
        """
        key = self._key("texts", compute_fingerprint(*texts))
        return self._cache.get(key, lambda: self._compute_texts(texts)).vectors

    def _key(self, kind: str, *parts: str) -> str:
        # what decides over a vector's bits: the weights, how they compute, and what they see
        precision = str(getattr(self.encoder, "precision", ""))
        identity = compute_fingerprint(_FORMAT, type(self.encoder).__name__, self.fingerprint, precision, *parts)
        return f"{kind}-{identity}"

    def _compute_images(self, data: EvaluationSet, layer: Layer) -> Features:
        share = (self._sharing.rank, self._sharing.num_processes)
        embedded: list[tuple[int, np.ndarray, dict[int, str]]] = []
        num_embedded = 0
        batches = self._pixels.batches(
            f"{data.digest} {self.view}",
            lambda: data.iter_images(self.view, workers=self._workers, share=share, as_arrays=self._takes_arrays),
        )
        with progress(total=len(data), what=f"embedding {data.name}", unit="image") as bar:
            for batch in batches:
                vectors = np.zeros((0, 0), np.float32)
                if batch.rows:
                    vectors = self._embed(batch.images, layer)
                    num_embedded += 1
                # by its lowest row, since processes take batches in turn and their parts are put in order later
                embedded.append((min((*batch.rows, *batch.failures)), vectors, batch.failures))
                # the others are as far as this process, near enough for a bar
                bar.update((len(batch.rows) + len(batch.failures)) * self._sharing.num_processes)
        self._keep_pace(len(data.images.plan(IMAGES_AT_ONCE)), num_embedded, lambda: self._embed(self._blank(), layer))
        rows: list[np.ndarray] = []
        failures: dict[int, str] = {}
        for _, vectors, failed in sorted(self._sharing.gather(embedded), key=lambda part: part[0]):
            failures |= failed
            if len(vectors):
                rows.append(vectors)
        return Features(_finite(np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)), failures)

    def _keep_pace(self, num_batches: int, num_embedded: int, embed: Callable[[], object]) -> None:
        """Run the network as often as the process with the most batches does: sharded weights are gathered in step."""
        for _ in range(-(-num_batches // self._sharing.num_processes) - num_embedded):
            if self._sharing.num_processes > 1:
                embed()

    def _blank(self) -> Pixels:
        return as_pixels(np.zeros((1, 3, self.view.size, self.view.size), np.uint8), as_arrays=self._takes_arrays)

    @property
    def _takes_arrays(self) -> bool:
        """Whether the model needs no torch, and its images neither."""
        return isinstance(self.encoder, OnnxEncoder)

    def _embed(self, images: Any, layer: Layer) -> Float32[Array, "B D"]:
        if layer == "pooled":
            if not isinstance(self.encoder, PoolingEncoder):
                raise UsageError(f"{self.name} gives no features before their projection; use layer = 'projected'.")
            return np.asarray(self.encoder.pool_images(images))
        return np.asarray(self.encoder.embed_images(images))

    def _compute_texts(self, texts: Sequence[str]) -> Features:
        # each text once: sets of products and emoji have the same one for many images. By length, since a batch is as
        # long as its longest text; equal lengths in alphabetical order, so that the batches depend on the texts alone
        unlike = sorted(set(texts), key=lambda text: (len(text), text))
        parts: list[tuple[int, np.ndarray]] = []
        firsts = range(0, len(unlike), TEXTS_AT_ONCE)
        is_shown = len(unlike) > 4 * TEXTS_AT_ONCE
        with progress(total=len(unlike), what="embedding texts", unit="text", is_shown=is_shown) as bar:
            for first in firsts[self._sharing.rank :: self._sharing.num_processes]:
                some = unlike[first : first + TEXTS_AT_ONCE]
                parts.append((first, np.asarray(self.encoder.embed_texts(some))))
                bar.update(len(some) * self._sharing.num_processes)
        self._keep_pace(len(firsts), len(parts), lambda: self.encoder.embed_texts([""]))
        in_order = [part for _, part in sorted(self._sharing.gather(parts), key=lambda part: part[0])]
        vectors = _finite(np.concatenate(in_order) if in_order else np.zeros((0, 0), np.float32))
        rows_by_text = {text: row for row, text in enumerate(unlike)}
        return Features(vectors[[rows_by_text[text] for text in texts]])


def _finite(vectors: Float32[Array, "N D"]) -> Float32[Array, "N D"]:
    if not np.isfinite(vectors).all():
        raise VlmError(
            "The model's embeddings are not finite: its weights have diverged. Evaluate an earlier checkpoint, or "
            "retrain with a lower learning rate."
        )
    return vectors
