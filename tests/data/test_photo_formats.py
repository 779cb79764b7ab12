"""Photos in formats that need converting: raw, HEIC and rare ones, as the decoder of all models then reads them."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.data.raw_fixture import make_dng
from vlm.data import photo_formats
from vlm.data.decode import open_image, to_rgb
from vlm.data.photo_formats import read_photo
from vlm.errors import BadSample


def halves() -> Image.Image:
    """48 by 32: red on the left, blue on the right."""
    image = Image.new("RGB", (48, 32), "red")
    image.paste("blue", (24, 0, 48, 32))
    return image


def encoded(format_name: str, **options: object) -> bytes:
    file = io.BytesIO()
    halves().save(file, format_name, **options)
    return file.getvalue()


def is_red_at(data: bytes, x: int, y: int) -> bool:
    red, _, blue = np.asarray(to_rgb(open_image(data)))[y, x].tolist()
    return red > 200 and blue < 50


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP"])
def test_what_every_reader_decodes_stays_as_it_is(format_name: str) -> None:
    data = encoded(format_name)
    photo = read_photo(data, "a.any")
    assert photo.data is data
    assert photo.fields == {"width": 48, "height": 32}


@pytest.mark.parametrize("format_name", ["JPEG2000", "PPM", "QOI"])
def test_a_rare_format_is_converted_without_loss(format_name: str) -> None:
    photo = read_photo(encoded(format_name), "a.any")
    assert np.array_equal(np.asarray(to_rgb(open_image(photo.data))), np.asarray(halves()))


def test_the_orientation_decides_over_width_and_height() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = read_photo(encoded("JPEG", exif=exif), "a.jpg")
    assert (photo.fields["width"], photo.fields["height"]) == (32, 48)


def test_a_raw_photo_gives_its_preview_upright_with_the_date_and_the_camera() -> None:
    pytest.importorskip("rawpy")
    for orientation, size, is_red in (
        (1, (48, 32), True),
        (6, (32, 48), True),
        (8, (32, 48), False),
    ):
        photo = read_photo(make_dng(encoded("JPEG", quality=95), orientation=orientation), "a.DNG")
        assert to_rgb(open_image(photo.data)).size == size
        assert is_red_at(photo.data, 4, 4) is is_red
        assert photo.fields == {
            "taken": "2024-05-17T10:22:31", "year": 2024, "month": 5, "camera": "Acme One",
            "width": size[0], "height": size[1],
        }  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"nothing" * 99, make_dng(encoded("JPEG"))[:900]])
def test_a_damaged_raw_photo_is_a_bad_sample(data: bytes) -> None:
    pytest.importorskip("rawpy")
    with pytest.raises(BadSample, match="raw file gives no preview"):
        read_photo(data, "a.nef")


def test_what_an_extra_would_read_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_formats, "HAS_RAW", False)
    monkeypatch.setattr(photo_formats, "HAS_HEIF", False)
    names = ("a.CR3", "b.heic", "c.jpg", "d.txt")
    assert list(map(photo_formats.missing_extra, names)) == ["raw", "heic", "", ""]
    with pytest.raises(BadSample, match="extra raw"):
        read_photo(b"II*\0", "a.cr3")


def test_a_heic_photo_is_read_with_its_exif() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0110] = "Phone"
    photo = read_photo(encoded("HEIF", exif=exif, quality=-1), "a.heic")
    assert photo.fields == {"width": 48, "height": 32, "camera": "Phone"}
    assert is_red_at(photo.data, 4, 4)
