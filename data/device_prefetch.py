"""Prefetching to the device: the next batch is copied, or decoded there, while the current one is computed on."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from vlm.data.collate import TrainingBatch
from vlm.data.gpu_decode import decode_views_on_device
from vlm.data.shards import SampleFailure
from vlm.data.transforms import RandomResizedCrop
from vlm.errors import BadSample, VlmError


@dataclass
class DevicePrefetcher:
    """Yields the batches with their tensors on `device`; a thread gets the next one there on a stream of its own.

    view: of the prepared images of the batches, which are decoded on the device, be it the CPU. Without it there is
    nothing to do on the CPU, and the batches pass through.

    Raises:
        VlmError: no image of a batch can be decoded; also whatever `batches` raises.
    """

    batches: Iterator[TrainingBatch]
    device: torch.device
    view: RandomResizedCrop | None = None

    def __iter__(self) -> Iterator[TrainingBatch]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if stream is None and self.view is None:
            yield from self.batches
            return
        # one thread, so that the batches stay in order
        with ThreadPoolExecutor(max_workers=1) as executor:
            coming = executor.submit(self._next, stream)
            while (current := coming.result()) is not None:
                if stream is not None:
                    _record_on_current_stream(current, stream)
                # before the yield, so that the next batch comes in while the caller computes on this one
                coming = executor.submit(self._next, stream)
                yield current

    def _next(self, stream: torch.cuda.Stream | None) -> TrainingBatch | None:
        batch = next(self.batches, None)
        if batch is None:
            return None
        if stream is not None:
            # a copy from pageable memory is not asynchronous, whatever non_blocking says
            batch = batch.pin_memory()
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            if self.view is not None:
                batch = decode_batch(batch, self.view, self.device)
            return batch.changed(lambda tensor: tensor.to(self.device, non_blocking=True))


def decode_batch(batch: TrainingBatch, view: RandomResizedCrop, device: torch.device) -> TrainingBatch:
    """Decode the prepared images of a batch on the device; the next intact row replaces a damaged one.

    Which row that is depends on the rows of this process alone, so with damage that only the device finds, what is
    seen depends on the number of processes.

    Raises:
        VlmError: none of them can be decoded.
    """
    decoded = decode_views_on_device(batch.prepared, view, device)
    batch = replace(batch, images=decoded.images, prepared=())
    return _with_replacements(batch, decoded.damaged) if decoded.damaged else replace(batch, offsets=())


def _with_replacements(batch: TrainingBatch, damaged: dict[int, BadSample]) -> TrainingBatch:
    size = len(batch.keys)
    if len(damaged) == size:
        row, error = next(iter(damaged.items()))
        raise VlmError(
            f"None of the {size} images of a batch can be decoded; the first, {batch.keys[row]!r}: {error}. "
            "See vlm inspect, or train without --decode-on-device."
        )
    # the next intact row, around the end; at least one is intact, so the search ends
    rows: list[int] = []
    for row in range(size):
        while row in damaged:
            row = (row + 1) % size
        rows.append(row)

    failures: list[SampleFailure] = []
    for row, error in damaged.items():
        failure = SampleFailure(
            sample_index=batch.used[row],
            key=batch.keys[row],
            offset=batch.offsets[row],
            reason=error.reason,
            detail=error.detail,
            is_replacement=batch.used[row] != batch.sample_indices[row],
        )
        failures.append(failure)
    return replace(
        batch.changed(lambda tensor: tensor[rows]),
        keys=tuple(batch.keys[row] for row in rows),
        drawn=tuple(batch.drawn[row] for row in rows),
        used=tuple(batch.used[row] for row in rows),
        failures=(*batch.failures, *failures),
        offsets=(),
    )


def _record_on_current_stream(batch: TrainingBatch, stream: torch.cuda.Stream) -> None:
    """Let the stream that computes wait for the copies, and keep their memory until it has used them.

    Without `record_stream` the allocator may hand the memory of a batch to the next copy while it is still being read.
    """
    computing = torch.cuda.current_stream(stream.device)
    computing.wait_stream(stream)
    for tensor in batch.tensors:
        tensor.record_stream(computing)
