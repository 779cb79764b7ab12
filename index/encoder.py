"""What this room asks of a model, and the check of what it gives.

The batch size at which a model embeds fastest, found by trying.

A model compiled by torch for batches of one size.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from vlm.data.transforms import EvalTransform
from vlm.errors import UsageError, VlmError
from vlm.index.embeddings import find_non_unit_rows
from vlm.models.model import VisionLanguageModel
from vlm.models.variants import DIMENSIONS_SEPARATOR, split_model_spec
from vlm.tensors import Array, Float32, Tensor, UInt8

logger = logging.getLogger(__name__)


@runtime_checkable
class Encoder(Protocol):
    """Pictures and texts to unit vectors on the CPU; `fingerprint` is the identity of their space."""

    @property
    def view(self) -> EvalTransform:
        """From an encoded picture to the pixels the model sees."""
        ...

    @property
    def fingerprint(self) -> str:
        """Models with the same fingerprint give the same vectors."""
        ...

    @property
    def embedding_size(self) -> int:
        """D."""
        ...

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Pictures as `view` gives them."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Texts as people write them."""
        ...


def check_unit_norm(vectors: Float32[Array, "N D"], names: Sequence[str]) -> None:
    """Refuse what cannot be compared by cosine.

    Raises:
        VlmError: a vector is not finite, zero, or not of length 1; `names` says whose it is.
    """
    wrong, lengths = find_non_unit_rows(vectors)
    if len(wrong):
        raise VlmError(
            f"The model gave a vector of length {lengths[0]:.4g} for {names[wrong[0]]!r} ({len(wrong)} such of "
            f"{len(vectors)} in this batch); 1 was expected. Its weights are damaged or its training diverged: "
            "use another checkpoint."
        )


def absolute_spec(spec: str) -> str:
    """A model's folder as an absolute path, so that it is found from anywhere; a name as it is."""
    model, kept = split_model_spec(spec)
    if Path(model).exists():
        model = str(Path(model).resolve())
    return model if kept is None else f"{model}{DIMENSIONS_SEPARATOR}{kept}"


SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
_TRIALS = 2
# a batch that takes longer tells enough; of a rate this far below the best one, larger batches make no better
_LONGEST_SECONDS = 5.0
_GIVE_UP_BELOW = 0.9


def find_fastest_batch_size(model: Encoder, *, largest: int) -> int:
    """The size of the most pictures per second, each size tried with random pixels of the model's view.

    largest: samples of the largest shard; no batch is larger.

    Raises:
        VlmError: not even the smallest fits into memory.
    """
    rates: dict[int, float] = {}
    for size, seconds in _timed_sizes(model, largest):
        rates[size] = size / seconds
        if seconds > _LONGEST_SECONDS or rates[size] < _GIVE_UP_BELOW * max(rates.values()):
            break
    if not rates:
        raise VlmError(f"Not even {SIZES[0]} pictures at once fit into memory; give a smaller --batch-size.")
    best = max(rates, key=rates.__getitem__)
    tried = ", ".join(f"{size}: {rate:,.0f}" for size, rate in rates.items())
    logger.info(f"Batch size {best}, the fastest of these (samples per second by size): {tried}.")
    return best


def _timed_sizes(model: Encoder, largest: int) -> Iterator[tuple[int, float]]:
    """Sizes, as far as they fit into memory, and the seconds a batch takes."""
    generator, side = torch.Generator().manual_seed(0), model.view.size
    sizes = [size for size in SIZES if size < 2 * largest]
    for size in sizes or SIZES[:1]:
        images = torch.randint(256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
        try:
            model.embed_images(images)
            yield size, min(_seconds(model, images) for _ in range(_TRIALS))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return


def _seconds(model: Encoder, images: torch.Tensor) -> float:
    started = time.perf_counter()
    model.embed_images(images)
    return time.perf_counter() - started


@dataclass(frozen=True)
class CompiledEncoder:
    """Shows the model pictures in batches of just `batch_size`, the last ones filled up with black."""

    model: VisionLanguageModel
    batch_size: int

    @property
    def view(self) -> EvalTransform:
        """Of the model."""
        return self.model.view

    @property
    def fingerprint(self) -> str:
        """Of the model: compiling changes no weight."""
        return self.model.fingerprint

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.model.embedding_size

    def embed_images(self, images: UInt8[Tensor, "B 3 H W"]) -> Float32[Tensor, "B D"]:
        """Unit vectors of pictures, as many at most as the batch size."""
        missing = self.batch_size - len(images)
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return self.model.embed_images(images)[: self.batch_size - missing]

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts."""
        return self.model.embed_texts(texts)


def compile_encoder(model: Encoder, batch_size: int) -> CompiledEncoder:
    """Compile the image tower of a model and try it.

    Raises:
        UsageError: it is no network. VlmError: torch cannot compile it here.
    """
    if not isinstance(model, VisionLanguageModel):
        raise UsageError(f"A {type(model).__name__} cannot be compiled; leave --compile out.")
    model.fingerprint  # noqa: B018  taken of the weights before anything is changed
    network, encoder, side = model.network, CompiledEncoder(model, batch_size), model.view.size
    network.encode_image = torch.compile(network.encode_image)  # pyright: ignore[reportCallIssue, reportArgumentType]
    try:
        encoder.embed_images(torch.zeros(batch_size, 3, side, side, dtype=torch.uint8))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever compilers stumble over
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise VlmError(f"{model.name} cannot be compiled on {model.device}: {reason}. Leave --compile out.") from error
    return encoder
