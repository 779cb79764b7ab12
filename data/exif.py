"""What a camera wrote into a photo: when, where and with what it was taken (EXIF 2.32, tags by their numbers)."""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from PIL import Image

_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_MAKE, _MODEL, _CHANGED = 0x010F, 0x0110, 0x0132
_TAKEN, _DIGITISED = 0x9003, 0x9004
_LATITUDE_REF, _LATITUDE, _LONGITUDE_REF, _LONGITUDE = 1, 2, 3, 4
_DATE_FORMAT = "%Y:%m:%d %H:%M:%S"
# a ten-thousandth of a second of arc is 3 mm on the ground
_DEGREE_DIGITS = 7


def exif_fields(exif: Image.Exif) -> dict[str, Any]:
    """The fields that are there and make sense, by the names under which filters know them.

    taken: as "2024-05-17T10:22:31", the camera's local time. year, month: of it. camera: maker and model.
    latitude, longitude: degrees, south and west below 0.
    """
    details = exif.get_ifd(_EXIF_IFD)
    moments = (details.get(_TAKEN), details.get(_DIGITISED), exif.get(_CHANGED))
    fields: dict[str, Any] = {}
    taken = next(filter(None, map(_moment, moments)), None)
    if taken is not None:
        fields |= date_fields(taken)
    if camera := _camera(exif):
        fields["camera"] = camera
    return fields | _position(exif.get_ifd(_GPS_IFD))


def date_fields(taken: datetime) -> dict[str, Any]:
    """The fields of a moment.

    >>> date_fields(datetime(2024, 5, 17, 10, 22, 31))
    {'taken': '2024-05-17T10:22:31', 'year': 2024, 'month': 5}
    """
    return {"taken": taken.isoformat(timespec="seconds"), "year": taken.year, "month": taken.month}


def _moment(value: Any) -> datetime | None:
    # cameras whose clock was never set write zeros or spaces
    try:
        return datetime.strptime(_text(value), _DATE_FORMAT)
    except ValueError:
        return None


def _camera(exif: Image.Exif) -> str:
    make = _text(exif.get(_MAKE))
    model = _text(exif.get(_MODEL))
    # "Canon" and "Canon EOS 5D"; "NIKON CORPORATION" and "NIKON D90"
    is_repeated = bool(make) and model.lower().startswith(make.split()[0].lower())
    return model if is_repeated else f"{make} {model}".strip()


def _position(gps: Mapping[int, Any]) -> dict[str, float]:
    latitude = _degrees(gps.get(_LATITUDE), _text(gps.get(_LATITUDE_REF)).upper() == "S", limit=90)
    longitude = _degrees(gps.get(_LONGITUDE), _text(gps.get(_LONGITUDE_REF)).upper() == "W", limit=180)
    # one without the other is no position, and phones without a fix write zeros for both
    if latitude is None or longitude is None or (latitude == 0 and longitude == 0):
        return {}
    return {"latitude": latitude, "longitude": longitude}


def _degrees(value: Any, is_negative: bool, *, limit: int) -> float | None:
    """Degrees, minutes and seconds as one number; None for what is none or out of range."""
    try:
        degrees, minutes, seconds = map(float, value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    total = degrees + minutes / 60 + seconds / 3600
    if not (math.isfinite(total) and 0 <= total <= limit):
        return None
    return round(-total if is_negative else total, _DEGREE_DIGITS)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    # fields of a fixed length are filled up with NUL
    return value.replace("\0", " ").strip() if isinstance(value, str) else ""
