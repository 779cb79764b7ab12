import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data.image_inputs import encoded_image, image_list
from vlm.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def decoded(data: Path | bytes) -> np.ndarray:
    assert isinstance(data, bytes)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        (torch.from_numpy(PIXELS).float() / 255).requires_grad_(),
        PIXELS / 255.0,
        PIXELS.astype(np.int64),
    ],
)
def test_pixels_become_a_file_without_loss(image: object) -> None:
    np.testing.assert_array_equal(decoded(encoded_image(image)), PIXELS)


def test_paths_and_bytes_stay_what_they_are() -> None:
    assert encoded_image("a/b.jpg") == encoded_image(Path("a/b.jpg")) == Path("a/b.jpg")
    assert encoded_image(bytearray(b"file")) == b"file"


@pytest.mark.parametrize("image", [PIXELS[..., 0], PIXELS[..., :1], PIXELS[..., 0] > 127])
def test_one_channel_is_grey(image: np.ndarray) -> None:
    found = decoded(encoded_image(image))[..., 1]
    expected = image.squeeze()
    np.testing.assert_array_equal(found, expected * np.uint8(255) if expected.dtype == bool else expected)


def test_cmyk_becomes_rgb() -> None:
    assert decoded(encoded_image(Image.new("CMYK", (2, 2)))).shape == (2, 2, 3)


def test_one_or_several_are_a_list() -> None:
    assert image_list("a.jpg") == ["a.jpg"]
    assert image_list(b"x") == [b"x"]
    assert image_list(("a.jpg", "b.jpg")) == ["a.jpg", "b.jpg"]
    assert len(image_list(PIXELS)) == 1
    assert len(image_list(np.stack([PIXELS, PIXELS]))) == 2
    assert len(image_list(path for path in ("a", "b", "c"))) == 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\)"),
        (np.zeros((5, 7, 2)), r"shape \(5, 7, 2\)"),
        (np.zeros((0, 7, 3)), r"shape \(0, 7, 3\)"),
        (np.full((5, 7, 3), 128.0), "go from 128 to 128"),
        (np.full((5, 7, 3), np.nan), "go from nan to nan"),
        (np.full((5, 7), 256, np.uint16), "go from 256 to 256"),
        (np.full((5, 7), -1), "go from -1 to -1"),
        (np.array(["a"]), "is not an image"),
        ({"a": 1}, "is not an image"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoded_image(image)


def test_a_number_is_no_image() -> None:
    with pytest.raises(UsageError, match="int is not an image"):
        image_list(3)
