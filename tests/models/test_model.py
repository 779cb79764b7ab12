import pytest
import torch

from vlm.data.tokenizers import SentencePieceTokenizer
from vlm.data.transforms import EvalTransform
from vlm.models.model import normalise, space_fingerprint

LAYOUTS = {
    "channels first": lambda images: images,
    "channels last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "a piece of larger ones": lambda images: images.contiguous(memory_format=torch.channels_last)[:, :, 2:, 1:],
    "none": lambda images: images[:0].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_memory_is_normalised_to_the_same_bits(layout):
    images = LAYOUTS[layout](torch.arange(3 * 3 * 9 * 7).mul(37).to(torch.uint8).view(3, 3, 9, 7))
    view = EvalTransform(size=7, mean=(0.1, 0.5, 0.7), std=(0.2, 0.3, 0.9))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (view.mean, view.std))
    found = normalise(images, view)
    assert torch.equal(found, (images.float() / 255 - mean) / std)
    if layout == "channels last":
        assert found.stride() == images.stride()


def test_the_fingerprint_of_a_space_outlives_renamings():
    """Indexes and models of earlier commits name each other by it: the value is that of commit 08f97cd."""

    class Words(SentencePieceTokenizer):
        def __init__(self):
            pass  # no vocabulary: only its fingerprint is asked for

        def fingerprint(self):
            return "words"

    network = torch.nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.fill_(0.5)
        network.bias.fill_(-1)
    found = space_fingerprint(network, EvalTransform(size=32), Words())
    assert found == "f683cd4577e0d1d4"
