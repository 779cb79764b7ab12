import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.data.decode import open_picture, to_rgb
from vlm.data.samples import sample_rng
from vlm.data.views import CLIP_MEAN, CLIP_STD, FixedView, RandomView
from vlm.errors import UsageError

SIZES = [(40, 30), (31, 57), (224, 224), (225, 224), (97, 301), (640, 427), (333, 500), (12, 9), (1, 3)]


def png_of(size, number=0) -> bytes:
    rng = np.random.default_rng(number)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_fixed_view_is_open_clips_pixel_for_pixel(resize_mode, interpolation):
    from open_clip.transform import image_transform

    for size, fill in [(224, 0), (65, 128)]:
        reference: Any = image_transform(
            size, is_train=False, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill
        )
        view = FixedView(size=size, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill)
        for number, shape in enumerate(SIZES):
            image = png_of(shape, number)
            expected = reference(Image.open(io.BytesIO(image)))
            pixels = expected.numpy() * np.array(CLIP_STD)[:, None, None] + np.array(CLIP_MEAN)[:, None, None]
            assert (view(image) == np.round(pixels * 255).astype(np.uint8)).all(), shape


def test_the_longest_side_is_rounded_as_open_clip_rounds_it():
    from open_clip.transform import ResizeKeepRatio

    for width in range(1, 400, 7):
        for height in range(1, 400, 11):
            if max(width, height) > 250 * min(width, height):
                continue
            lines, columns = ResizeKeepRatio.get_params(Image.new("1", (width, height)), (224, 224), 1.0)
            picture = FixedView(resize_mode="longest", fill_color=0)(white_of(width, height))
            assert (picture.max(axis=(0, 2)) > 0).sum() == max(lines, 1)
            assert (picture.max(axis=(0, 1)) > 0).sum() == max(columns, 1)


def white_of(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, format="BMP")
    return file.getvalue()


def test_preprocessing_is_written_and_read_back():
    view = FixedView(size=64, resize_mode="longest", mean=(0.5, 0.5, 0.5), fill_color=7)
    assert FixedView.from_preprocess(view.to_preprocess()) == view
    assert FixedView.from_preprocess({"size": [32, 32], "mode": "RGB"}) == FixedView(size=32)
    with pytest.raises(UsageError, match="only square"):
        FixedView.from_preprocess({"size": [32, 64]})


def test_a_random_view_is_a_function_of_its_generator(make_picture):
    image = make_picture(0, size=(120, 90))
    view = RandomView(size=48, scale=(0.3, 1.0), flip=0.5)
    first = view(image, sample_rng(0, 0, "key"))
    assert (first.shape, first.dtype) == ((3, 48, 48), np.uint8)
    assert (view(image, sample_rng(0, 0, "key")) == first).all()
    assert (view(image, sample_rng(0, 1, "key")) != first).any()


@pytest.mark.parametrize("size", [(800, 600), (801, 599), (1201, 333), (333, 1201)])
def test_a_view_of_a_reduced_jpeg_shows_what_the_whole_picture_shows(make_picture, size):
    jpeg = make_picture(0, size=size)
    png = io.BytesIO()
    to_rgb(open_picture(jpeg)).save(png, format="PNG")  # cannot be reduced while decoding
    view = RandomView(size=64, scale=(0.2, 1.0), flip=0.5)
    for number in range(20):
        reduced = view(jpeg, sample_rng(0, number, "key")).astype(int)
        whole = view(png.getvalue(), sample_rng(0, number, "key")).astype(int)
        assert np.abs(reduced - whole).mean() < 1
        assert np.abs(reduced - whole).max() < 12


def test_a_turned_jpeg_gives_the_view_of_the_upright_one():
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((640, 480))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = io.BytesIO(), io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, format="JPEG", quality=95, exif=exif)
    upright.save(plain, format="JPEG", quality=95)
    for number in range(10):
        views = [
            RandomView(size=64, scale=(0.2, 1.0))(data.getvalue(), sample_rng(0, number, "k")).astype(int)
            for data in (turned, plain)
        ]
        assert np.abs(views[0] - views[1]).mean() < 2


def test_crops_keep_their_share_and_ratio():
    view = RandomView(size=10, scale=(0.25, 0.5), ratio=(0.8, 1.25))
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, top, width, height = view._crop(300, 200, rng)
        assert left >= 0
        assert top >= 0
        assert left + width <= 300
        assert top + height <= 200
        assert 0.24 < width * height / 60_000 < 0.51
        assert 0.78 < width / height < 1.28


def test_a_crop_that_never_fits_becomes_the_middle():
    view = RandomView(size=10, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert view._crop(400, 20, np.random.default_rng(0)) == (190, 0, 20, 20)


@pytest.mark.parametrize("width", [1, 2, 25, 29, 50, 51, 58, 100, 201])
def test_no_size_breaks_the_reduced_crop(make_picture, width):
    image = make_picture(0, size=(width, 200))
    for number in range(5):
        assert RandomView(size=6, scale=(1.0, 1.0))(image, sample_rng(0, number, "k")).shape == (3, 6, 6)
