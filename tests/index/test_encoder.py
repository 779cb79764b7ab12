import pytest
import torch

from tests.index.conftest import ColourModel
from vlm.errors import VlmError
from vlm.index import encoder
from vlm.index.encoder import find_fastest_batch_size


class SmallMemory(ColourModel):
    most: int = 100

    def embed_images(self, images):
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().embed_images(images)


def test_the_size_of_the_highest_rate_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {8: 1.0, 16: 1.9, 32: 2.0, 64: 3.9, 128: 9.0}
    monkeypatch.setattr(encoder, "_seconds", lambda model, images: seconds[len(images)])
    assert find_fastest_batch_size(ColourModel(), largest=1000) == 64


def test_sizes_that_do_not_fit_into_memory_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_seconds", lambda model, images: 1.0)
    assert find_fastest_batch_size(SmallMemory(), largest=1000) == 64
    nothing_fits = SmallMemory()
    nothing_fits.most = 7
    with pytest.raises(VlmError, match="Not even 8 pictures"):
        find_fastest_batch_size(nothing_fits, largest=1000)


@pytest.mark.parametrize(("largest", "expected"), [(1, 8), (8, 8), (9, 16), (100, 128), (5000, 1024)])
def test_no_batch_is_much_larger_than_a_shard(monkeypatch: pytest.MonkeyPatch, largest: int, expected: int) -> None:
    monkeypatch.setattr(encoder, "_seconds", lambda model, images: 1.0)
    assert find_fastest_batch_size(ColourModel(), largest=largest) == expected
