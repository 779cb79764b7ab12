"""Batches on the device one step ahead: the next one is copied while the current one is computed on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vlm.data.training_batches import TrainingBatch


@dataclass
class DeviceAhead:
    """Yields the batches with their tensors on `device`, the copy of the next one under way on a stream of its own.

    On the CPU there is nothing to copy, and the batches pass through.
    """

    batches: Iterator[TrainingBatch]
    device: torch.device

    def __iter__(self) -> Iterator[TrainingBatch]:
        if self.device.type != "cuda":
            yield from self.batches
            return
        stream = torch.cuda.Stream(self.device)
        current = self._copied(next(self.batches, None), stream)
        while current is not None:
            torch.cuda.current_stream(self.device).wait_stream(stream)
            for tensor in (current.images, current.tokens, *current.arrays.values()):
                tensor.record_stream(torch.cuda.current_stream(self.device))
            coming = self._copied(next(self.batches, None), stream)
            yield current
            current = coming

    def _copied(self, batch: TrainingBatch | None, stream: torch.cuda.Stream) -> TrainingBatch | None:
        if batch is None:
            return None
        batch = batch.pin_memory()
        with torch.cuda.stream(stream):
            return replace(
                batch,
                images=batch.images.to(self.device, non_blocking=True),
                tokens=batch.tokens.to(self.device, non_blocking=True),
                arrays={name: rows.to(self.device, non_blocking=True) for name, rows in batch.arrays.items()},
            )
