"""What embedding asks of a model (`Encoder`, or its ONNX export), what is quickest for it, and torch.compile."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from vlm.errors import UsageError, VlmError
from vlm.models.onnx_encoder import OnnxEncoder
from vlm.tensor_types import Float32, Tensor, UInt8

# named alone: a search by words needs neither torch nor an image library
if TYPE_CHECKING:
    import vlm.data.transforms
    import vlm.models.model


@runtime_checkable
class Encoder(Protocol):
    """Images and texts to unit vectors on the CPU; `fingerprint` identifies their embedding space."""

    @property
    def view(self) -> "vlm.data.transforms.EvalTransform":
        """From an encoded image to the pixels the model sees."""
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
        """Images as `view` gives them."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Texts, not yet tokenized."""
        ...


AnyEncoder: TypeAlias = Encoder | OnnxEncoder
"""A model by torch, which takes and gives tensors, or its ONNX export, which takes and gives arrays."""

logger = logging.getLogger(__name__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a model was out of memory, on any device."""
    # torch's is known by its name, since an ONNX export does not import torch
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
_NUM_TRIALS = 2
# after a batch this slow, or a rate this far below the best one, larger batches will not be faster
_MAX_BATCH_SECONDS = 5.0
_MIN_RELATIVE_RATE = 0.9


def find_fastest_batch_size(model: AnyEncoder, *, largest: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """The batch size with the most images per second, each size tried with random pixels of the model's view.

    largest: samples of the largest shard; no batch is larger. clock: seconds since any moment.

    Raises:
        VlmError: not even the smallest fits into memory.
    """
    rates: dict[int, float] = {}
    for size, seconds in _timed_sizes(model, largest, clock):
        rates[size] = size / seconds
        if seconds > _MAX_BATCH_SECONDS or rates[size] < _MIN_RELATIVE_RATE * max(rates.values()):
            break
    if not rates:
        raise VlmError(f"Not even {BATCH_SIZES[0]} images at once fit into memory; give a smaller --batch-size.")
    best = max(rates, key=rates.__getitem__)
    listing = ", ".join(f"{size}: {rate:,.0f}" for size, rate in rates.items())
    logger.info(f"Batch size {best}, the fastest of these (samples per second by size): {listing}.")
    return best


def _timed_sizes(model: AnyEncoder, largest: int, clock: Callable[[], float]) -> Iterator[tuple[int, float]]:
    """Batch sizes, as far as they fit into memory, and the seconds a batch takes."""
    from vlm.data.shards import as_pixels

    rng = np.random.default_rng(0)
    side = model.view.size
    # one size may exceed the largest shard, whose samples then are one batch
    sizes = [size for size in BATCH_SIZES if size < 2 * largest] or [BATCH_SIZES[0]]
    for size in sizes:
        pixels = rng.integers(0, 256, (size, 3, side, side), dtype=np.uint8)
        images: Any = as_pixels(pixels, as_arrays=isinstance(model, OnnxEncoder))
        try:
            # the first batch warms up: it allocates memory and picks kernels
            model.embed_images(images)
            trials = []
            for _ in range(_NUM_TRIALS):
                started = clock()
                model.embed_images(images)
                trials.append(clock() - started)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _free_gpu_memory()
            return
        yield size, min(trials)


def _free_gpu_memory() -> None:
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


@dataclass(frozen=True)
class CompiledEncoder:
    """A compiled model, which sees images in batches of exactly `batch_size`, the last ones padded with black."""

    model: "vlm.models.model.VisionLanguageModel"
    batch_size: int

    @property
    def view(self) -> "vlm.data.transforms.EvalTransform":
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
        """Unit vectors of images, at most as many as the batch size."""
        import torch

        missing = self.batch_size - len(images)
        if missing:
            images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        return self.model.embed_images(images)[: self.batch_size - missing]

    def embed_texts(self, texts: Sequence[str]) -> Float32[Tensor, "T D"]:
        """Unit vectors of texts."""
        return self.model.embed_texts(texts)


def compile_encoder(model: AnyEncoder, batch_size: int) -> CompiledEncoder:
    """Compile the image tower of a model, and run it once.

    Raises:
        UsageError: it is not a network. VlmError: torch cannot compile it here.
    """
    import torch

    from vlm.models.model import VisionLanguageModel

    if not isinstance(model, VisionLanguageModel):
        raise UsageError(f"A {type(model).__name__} cannot be compiled; leave --compile out.")
    model.fingerprint  # noqa: B018  computed from the weights before anything is changed
    network = model.network
    network.encode_image = torch.compile(network.encode_image)  # pyright: ignore[reportCallIssue, reportArgumentType]
    encoder = CompiledEncoder(model, batch_size)
    side = model.view.size
    try:
        encoder.embed_images(torch.zeros(batch_size, 3, side, side, dtype=torch.uint8))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise VlmError(f"{model.name} cannot be compiled on {model.device}: {reason}. Leave --compile out.") from error
    return encoder
