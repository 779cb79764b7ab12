"""Photos as cameras and phones store them, in a form that every reader of this package decodes.

JPEG, PNG, WebP, AVIF and their like stay as they are. HEIC (pillow-heif, extra `heic`) and rare formats become an
uncompressed BMP; a raw file gives the preview that its camera put into it (rawpy, extra `raw`), for developing it takes
seconds and looks no better at the size of a model's input.
"""

import importlib.util
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from vlm.data.decode import FORMATS, open_image, packable_formats, to_rgb, upright_size
from vlm.data.sources.source import HAS_HEIF, HEIC_ENDINGS, IMAGE_SUFFIXES
from vlm.errors import BadSample

HAS_RAW = importlib.util.find_spec("rawpy") is not None

RAW_ENDINGS = frozenset(
    {
        *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".sr2", ".orf", ".rw2", ".pef", ".raf", ".srw"),
        *(".3fr", ".fff", ".iiq", ".rwl", ".x3f", ".erf", ".mef", ".mos", ".kdc", ".dcr"),
    }
)
PHOTO_ENDINGS = IMAGE_SUFFIXES | (RAW_ENDINGS if HAS_RAW else frozenset())
"""Endings of the photos that the installed packages read."""

EXTRAS = {**dict.fromkeys(HEIC_ENDINGS, "heic"), **dict.fromkeys(RAW_ENDINGS, "raw")}
"""The extra of this package that reads the photos of an ending, for those that need one."""

# EXIF's orientation for each turn that LibRaw reports
_TURNS = {3: Image.Transpose.ROTATE_180, 5: Image.Transpose.ROTATE_90, 6: Image.Transpose.ROTATE_270}
_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Photo:
    """An image that `vlm.data.decode.open_image` reads, and what is known of it.

    data: the encoded image. fields: `width` and `height` in pixels, upright, and those of `exif_fields`.
    """

    data: bytes
    fields: dict[str, Any]


def read_photo(data: bytes, name: str) -> Photo:
    """A photo from the bytes of its file; only its header is decoded, unless its format needs converting.

    name: of the file, whose ending tells a raw file from the TIFF that it looks like.

    Raises:
        BadSample: it is not an image, or of a format that no installed package reads.
    """
    if ending(name) in RAW_ENDINGS:
        return _read_raw(data)
    image = open_image(data, formats=packable_formats())
    fields = _fields(image)
    if image.format not in FORMATS and image.format != "MPO":
        data = _uncompressed(to_rgb(image))
    return Photo(data=data, fields=fields)


def decodable_image(data: bytes, name: str) -> bytes:
    """The bytes of a photo's file in a form that `vlm.data.decode.open_image` reads; raises as `read_photo`."""
    return read_photo(data, name).data


def ending(name: str) -> str:
    """The ending of a file's name, in lower case with its dot."""
    return PurePosixPath(name).suffix.lower()


def missing_extra(name: str) -> str:
    """The extra of this package that would read a photo of this name; empty if none is missing."""
    suffix = ending(name)
    has_reader = HAS_RAW if suffix in RAW_ENDINGS else HAS_HEIF
    return "" if has_reader else EXTRAS.get(suffix, "")


def _fields(image: Image.Image) -> dict[str, Any]:
    width, height = upright_size(image)
    return {"width": width, "height": height} | _exif_of(image.getexif())


def _exif_of(exif: Image.Exif) -> dict[str, Any]:
    # damaged EXIF makes Pillow raise about any kind of error, and says nothing about the pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return exif_fields(exif)
    except Exception:
        return {}


def _uncompressed(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="BMP")
    return file.getvalue()


def _read_raw(data: bytes) -> Photo:
    if not HAS_RAW:
        raise BadSample("unknown format", "a raw photo; install the extra raw of vlm-pipeline to read its preview")
    preview, turn, taken = _raw_preview(data)
    image = open_image(preview)
    fields = _fields(image)
    # the preview of most cameras has no EXIF of its own; that of the file is a TIFF's
    others = _exif_of(_tiff_exif(data)) | ({} if taken is None else taken)
    fields = others | fields
    if turn and image.getexif().get(_ORIENTATION, 1) == 1:
        image = to_rgb(image).transpose(_TURNS[turn])
        preview = _uncompressed(image)
        fields |= {"width": image.width, "height": image.height}
    return Photo(data=preview, fields=fields)


def _raw_preview(data: bytes) -> tuple[bytes, int, dict[str, Any] | None]:
    """The encoded preview, the turn that makes it upright (a key of `_TURNS`, or 0) and the date fields."""
    rawpy = _rawpy()
    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            thumbnail = raw.extract_thumb()
            turn = raw.sizes.flip if raw.sizes.flip in _TURNS else 0
            taken = raw.other.timestamp
    except rawpy.LibRawError as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise BadSample("unreadable image", f"the raw file gives no preview: {reason}") from error
    is_jpeg = thumbnail.format == rawpy.ThumbFormat.JPEG
    preview = thumbnail.data if is_jpeg else _uncompressed(Image.fromarray(thumbnail.data))
    return preview, turn, date_fields(taken) if taken is not None and taken.year > 1970 else None


def _tiff_exif(data: bytes) -> Image.Exif:
    exif = Image.Exif()
    # other containers (CR3, RAF, ORF) are none that Pillow knows
    if data[:4] in (b"II*\0", b"MM\0*"):
        exif.load(data)
    return exif


@cache
def _rawpy() -> Any:
    # it has no stubs for what its C part raises
    return importlib.import_module("rawpy")


# EXIF 2.32 numbers what a camera writes: when, where and with what a photo was taken
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
