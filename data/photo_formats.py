"""Photos as cameras and phones store them, in a form that every reader of this package decodes.

JPEG, PNG, WebP, AVIF and their like stay as they are. HEIC (pillow-heif, extra `heic`) and rare formats become an
uncompressed BMP; a raw file gives the preview that its camera put into it (rawpy, extra `raw`), for developing it takes
seconds and looks no better at the size of a model's input.
"""

import importlib.util
import io
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from vlm.data.decode import FORMATS, open_image, packable_formats, to_rgb, upright_size
from vlm.data.exif import date_fields, exif_fields
from vlm.data.sources.image_names import HAS_HEIF, HEIC_ENDINGS, IMAGE_SUFFIXES
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
