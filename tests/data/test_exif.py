import io
from typing import Any

import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from vlm.data.photo_formats import exif_fields


def read_back(exif: Image.Exif) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG", exif=exif)
    return exif_fields(Image.open(file).getexif())


def test_date_camera_and_position_of_a_photo() -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0132] = "Canon", "Canon EOS 5D", "2025:01:01 00:00:00"
    exif.get_ifd(0x8769)[0x9003] = "2023:11:02 03:04:05"
    gps = exif.get_ifd(0x8825)
    gps[1], gps[2], gps[3], gps[4] = "S", (33.0, 51.0, 30.6), "E", (151.0, 12.0, 0.0)
    assert read_back(exif) == {
        "taken": "2023-11-02T03:04:05",
        "year": 2023,
        "month": 11,
        "camera": "Canon EOS 5D",
        "latitude": -33.8585,
        "longitude": 151.2,
    }


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("NIKON CORPORATION", "NIKON D90", "NIKON D90"),
        ("Apple", "iPhone 15", "Apple iPhone 15"),
        ("samsung", "", "samsung"),
        ("", "X100\0\0 ", "X100"),
    ],
)
def test_the_maker_is_said_once(make: str, model: str, camera: str) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = make, model
    assert read_back(exif) == {"camera": camera}


@pytest.mark.parametrize("date", ["0000:00:00 00:00:00", "    :  :     :  :  ", "2023:13:02 03:04:05", "yesterday"])
def test_a_date_that_is_none_gives_way_to_the_next(date: str) -> None:
    exif = Image.Exif()
    exif[0x0132] = "2020:05:06 07:08:09"
    exif.get_ifd(0x8769)[0x9003] = date
    assert read_back(exif)["taken"] == "2020-05-06T07:08:09"


@pytest.mark.parametrize(
    ("latitude", "longitude"),
    [
        ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
        ((91.0, 0.0, 0.0), (10.0, 0.0, 0.0)),
        ((10.0, 0.0), (10.0, 0.0, 0.0)),
        ((10.0, 0.0, IFDRational(1, 0)), (10.0, 0.0, 0.0)),
        (None, (10.0, 0.0, 0.0)),
    ],
)
def test_a_position_that_is_none_is_left_out(latitude: Any, longitude: Any) -> None:
    exif = Image.Exif()
    gps = exif.get_ifd(0x8825)
    if latitude is not None:
        gps[2] = latitude
    gps[4] = longitude
    assert exif_fields(exif) == {}
