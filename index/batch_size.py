"""The batch size at which a model embeds fastest, found by trying."""

import time
from collections.abc import Iterator

import torch

from vlm.console import say
from vlm.errors import VlmError
from vlm.index.encoder import Encoder

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
_TRIALS = 2
# a batch that takes longer tells enough; of a rate this far below the best one, larger batches make no better
_LONGEST_SECONDS = 5.0
_HOPELESS = 0.9


def fastest_batch_size(model: Encoder, *, largest: int) -> int:
    """The size of the most pictures per second, each size tried with random pixels of the model's view.

    largest: samples of the largest shard; no batch is larger.

    Raises:
        VlmError: not even the smallest fits into memory.
    """
    rates: dict[int, float] = {}
    for size, seconds in _tried(model, largest):
        rates[size] = size / seconds
        if seconds > _LONGEST_SECONDS or rates[size] < _HOPELESS * max(rates.values()):
            break
    if not rates:
        raise VlmError(f"Not even {SIZES[0]} pictures at once fit into memory; give a smaller --batch-size.")
    best = max(rates, key=rates.__getitem__)
    tried = ", ".join(f"{size}: {rate:,.0f}" for size, rate in rates.items())
    say(f"Batch size {best}, the fastest of these (samples per second by size): {tried}.")
    return best


def _tried(model: Encoder, largest: int) -> Iterator[tuple[int, float]]:
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
