import pytest
import torch

from tests.index.conftest import ColourModel
from vlm.errors import VlmError
from vlm.index.encoder import find_fastest_batch_size


class TimedModel(ColourModel):
    """Fake: a batch takes one second, or what `seconds` says of its size, by a clock of its own."""

    def __init__(self, seconds: dict[int, float] | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def embed_images(self, images):
        self.now += self.seconds[len(images)] if self.seconds else 1.0
        return super().embed_images(images)


class SmallMemory(TimedModel):
    most: int = 100

    def embed_images(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().embed_images(images)


def test_the_size_of_the_highest_rate_is_taken() -> None:
    model = TimedModel({8: 1.0, 16: 1.9, 32: 2.0, 64: 3.9, 128: 9.0})
    assert find_fastest_batch_size(model, largest=1000, clock=model.clock) == 64


def test_sizes_that_do_not_fit_into_memory_are_skipped() -> None:
    model = SmallMemory()
    assert find_fastest_batch_size(model, largest=1000, clock=model.clock) == 64
    nothing_fits = SmallMemory()
    nothing_fits.most = 7
    with pytest.raises(VlmError, match="Not even 8 images"):
        find_fastest_batch_size(nothing_fits, largest=1000)


@pytest.mark.parametrize(("largest", "expected"), [(1, 8), (8, 8), (9, 16), (100, 128), (5000, 1024)])
def test_no_batch_is_much_larger_than_a_shard(largest: int, expected: int) -> None:
    model = TimedModel()
    assert find_fastest_batch_size(model, largest=largest, clock=model.clock) == expected
