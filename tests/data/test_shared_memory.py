import gc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.loader import SharedMemoryPool

SHAPE = (2, 3, 4, 4)


@pytest.fixture
def memory():
    return SharedMemoryPool(workers=2, buffers=2, buffer_bytes=96)


def filled(memory, worker, value):
    array = memory.acquire(worker, SHAPE)
    array[:] = value
    return memory.buffer_of(worker, torch.from_numpy(array))


def test_what_a_worker_fills_the_reader_opens(memory):
    buffers: list[Any] = [filled(memory, worker, value) for worker, value in ((0, 1), (1, 2), (0, 3))]
    opened = [memory.open(buffer) for buffer in buffers]
    assert [tensor.unique().tolist() for tensor in opened] == [[1], [2], [3]]
    assert memory.acquire(0, SHAPE) is None


def test_the_layout_in_memory_is_kept(memory):
    array = memory.acquire(0, (2, 4, 4, 3))
    array[..., 0], array[..., 1:] = 7, 1
    buffer: Any = memory.buffer_of(0, torch.from_numpy(array).permute(0, 3, 1, 2))
    opened = memory.open(buffer)
    assert opened.shape == (2, 3, 4, 4)
    assert opened.is_contiguous(memory_format=torch.channels_last)
    assert opened[:, 0].unique().tolist() == [7]


@pytest.mark.parametrize(
    "derive",
    [lambda t: t[0], lambda t: t.view(-1), lambda t: t.numpy()[1:], lambda t: t.permute(0, 2, 3, 1), np.asarray],
    ids=["row", "view", "numpy slice", "permuted", "array"],
)
def test_a_slot_stays_taken_while_anything_shares_its_memory(memory, derive):
    filled(memory, 0, 9)
    kept = derive(memory.open(filled(memory, 0, 5)))
    gc.collect()
    assert memory.acquire(0, SHAPE) is None
    assert set(np.asarray(kept).ravel().tolist()) == {5}
    del kept
    gc.collect()
    assert memory.acquire(0, SHAPE) is not None


def test_what_does_not_fit_or_lies_elsewhere_is_left_alone(memory):
    assert memory.acquire(0, (5000,)) is None
    assert memory.buffer_of(0, torch.zeros(SHAPE, dtype=torch.uint8)) is None
    assert memory.buffer_of(1, torch.from_numpy(memory.acquire(0, SHAPE))) is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=60))
def test_no_batch_is_ever_written_over_while_it_is_held(actions):
    memory, held = SharedMemoryPool(workers=2, buffers=3, buffer_bytes=96), []
    for value, (worker, is_dropped) in enumerate(actions):
        array = memory.acquire(worker, SHAPE)
        if array is not None:
            array[:] = value
            buffer: Any = memory.buffer_of(worker, torch.from_numpy(array))
            held.append((value, memory.open(buffer)))
            del array
        if is_dropped and held:
            held.pop(0)
        assert all(torch.equal(tensor, torch.full(SHAPE, value, dtype=torch.uint8)) for value, tensor in held)
