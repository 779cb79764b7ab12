"""Memory in which workers hand pictures over: mapped once before they start, used again and again.

A batch in fresh shared memory costs a page fault for every 4 KiB, in the worker and again in the reader; at 224
pixels that is more than decoding a small JPEG. Here each worker owns a few slots and fills a free one; the reader's
tensor lies in the slot itself, and when the last of its kind is gone the slot is free again. Where no slot is free,
fresh memory is taken, so nobody waits. The mapping is anonymous: it needs no room in /dev/shm, and a kill leaves
nothing behind.
"""

import math
import mmap
import weakref
from dataclasses import dataclass

import numpy as np
import torch

from vlm.tensors import Array, Tensor, UInt8

_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Slot:
    """A filled slot: of which worker, which one, and how the tensor in it is laid out."""

    worker: int
    number: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class SlotMemory:
    """Slots for `workers` processes forked from this one, `slots` each, of up to `slot_bytes`."""

    def __init__(self, *, workers: int, slots: int, slot_bytes: int) -> None:
        self._slot_bytes = -(-slot_bytes // _PAGE) * _PAGE
        flags = mmap.mmap(-1, workers * slots)
        memory = mmap.mmap(-1, workers * slots * self._slot_bytes)
        self._is_taken = np.frombuffer(flags, np.uint8).reshape(workers, slots)
        self._memory = np.frombuffer(memory, np.uint8).reshape(workers, slots, self._slot_bytes)

    def take(self, worker: int, shape: tuple[int, ...]) -> UInt8[Array, "..."] | None:
        """In a worker: a free slot of its own, as an array of this shape; None if there is none, or it is too small."""
        size = math.prod(shape)
        free = np.flatnonzero(self._is_taken[worker] == 0)
        if size > self._slot_bytes or not len(free):
            return None
        self._is_taken[worker, free[0]] = 1
        return self._memory[worker, free[0], :size].reshape(shape)

    def slot_of(self, worker: int, filled: UInt8[Tensor, "..."]) -> Slot | None:
        """The slot at whose beginning a tensor lies; None if it lies elsewhere."""
        distance = filled.data_ptr() - self._memory[worker].ctypes.data
        if not 0 <= distance < self._memory[worker].size:
            return None
        return Slot(worker, distance // self._slot_bytes, tuple(filled.shape), filled.stride())

    def open(self, slot: Slot) -> UInt8[Tensor, "..."]:
        """In the reader: what is in a slot, which is free once this tensor and all that share its memory are gone."""
        array = self._memory[slot.worker, slot.number, : math.prod(slot.shape)]
        weakref.finalize(array, self._free, slot.worker, slot.number)
        # the storage of the tensor keeps this very array
        return torch.from_numpy(array).as_strided(slot.shape, slot.strides)

    def _free(self, worker: int, number: int) -> None:
        self._is_taken[worker, number] = 0
