"""Encoded images to RGB, at the JPEG's own reduced scale where the image will be shrunk anyway.

Pillow reads every kind and has the last word on what is damaged; plain JPEGs, which are nearly all images there are,
take a faster way through libjpeg-turbo (`EncodedImage`). `storable_image` checks the images of shards, and keeps them
as they are or turns them into what every reader of shards knows.
"""

import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import ceil, isfinite
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from vlm.errors import BadSample
from vlm.tensor_types import Array, Num, UInt8

MAX_PIXELS = 100_000_000
# one pixel by 65,535 would be resized to 224 by 14.7 million
MAX_ASPECT = 250
# others are never tried: Pillow would start Ghostscript for a PostScript file that calls itself .jpg
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF")
_HEIC_BRANDS = frozenset({b"ftypheic", b"ftypheix", b"ftypheim", b"ftyphevc"})
_RARE_FORMATS = ("JPEG2000", "PPM", "ICO", "QOI", "DIB")
# the shares of its size, 1/8, 1/4 and 1/2, at which a JPEG is decoded faster than whole
REDUCTIONS = (8, 4, 2)

# MPO is a JPEG with more images behind the first, as phones write it
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_VERIFIED_RESOLUTION = 1 / 8

_ORIENTATION = 0x0112
_JPEG_BEGINS = b"\xff\xd8\xff"
# what every marker begins with, and the markers by their second byte
_MARKER = 0xFF
_SCAN = 0xDA
_APP1 = 0xE1
_APP2 = 0xE2
# Huffman-coded frames: baseline, extended and progressive; the bytes of such a segment up to its number of colours
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_FRAME_BYTES = 10
_NUM_COLOURS = frozenset({1, 3})
# tables, restart interval, APP segments and comments; of any other marker libjpeg might read on elsewhere than we
_SKIPPED_MARKERS = frozenset({0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE})
# a JPEG spends a bit at least on each block of 8 by 8; one that promises more pixels is cut, and not worth its memory
_MAX_PIXELS_PER_BYTE = 1024
# JPEG's segments before the first scan of which Pillow reads the content, and the least bytes that it needs of them;
# of a shorter one it makes no image, which libjpeg does. EXIF and Photoshop's settings are for Pillow to judge.
_LEAST_BYTES = {0xE0: 16, 0xEE: 14, _APP1: 1 << 16, 0xED: 1 << 16}
# an APP2 segment is usual where it holds a colour profile, whose number and count need two more bytes
_PROFILE_BEGINS = b"ICC_PROFILE\0"
_LEAST_PROFILE_BYTES = 16
# of images decoded whole but shrunk to this share, chroma is simply repeated (20% faster): the resizing smooths it
_FAST_UPSAMPLING_BELOW = 0.75

_THUMBNAIL_QUALITY = 82

# EXIF orientation → the stored pixels upright, as a view of them
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored.transpose(1, 0, 2)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: stored.transpose(1, 0, 2)[::-1],
}
# those of them that have the stored end on the left, and at the top
_OVERHANG_LEFT = frozenset({2, 3, 6, 7})
_OVERHANG_TOP = frozenset({3, 4, 7, 8})


class EncodedImage:
    """An image of which the header has been read; its pixels are decoded when asked for.

    data: the encoded file. width, height: in pixels, after the EXIF orientation is applied. is_jpeg: it is a JPEG in
    RGB, YCbCr or grey, and orientation is that of its stored pixels (EXIF's 1 to 8).

    Raises:
        BadSample: as `open_image`.
    """

    __slots__ = ("_stored", "data", "height", "is_jpeg", "orientation", "width")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.orientation = 1
        header = _read_jpeg_header(data)
        self.is_jpeg = header is not None
        if header is None or header[2]:
            image = open_image(data)
            self.orientation = _orientation(image)
            self._stored = image.size
            self.width, self.height = upright_size(image)
        else:
            self.width, self.height, _ = header
            self._stored = self.width, self.height
            check_size(self.width, self.height, num_bytes=len(data))

    def pixels(self, *, resolution: float = 1.0) -> UInt8[Array, "H W 3"]:
        """Upright RGB, transparency laid on white; writable, not always contiguous in memory.

        resolution: as of `to_rgb`.

        Raises:
            BadSample: the image's data is damaged.
        """
        if self.is_jpeg:
            try:
                stored = _decode_jpeg(self.data, self._stored, resolution)
            except (ValueError, MemoryError):
                pass  # also for what libjpeg only warns of, which Pillow lets pass unless the file is cut
            else:
                return _TURNS[self.orientation](stored) if self.orientation in _TURNS else stored
        return np.array(to_rgb(open_image(self.data), resolution=resolution))

    def reduction_of(self, pixels: UInt8[Array, "H W 3"]) -> int:
        """Pixels of the image to one of these that were decoded from it: 1, 2, 4 or 8."""
        if self.width == pixels.shape[1]:
            return 1
        # the last row and column of a reduced JPEG reach over the edge, so the sizes do not divide
        return round(max(self.width, self.height) / max(pixels.shape[:2]))

    def overhang(self, step: int) -> tuple[int, int]:
        """Pixels by which the first column and the first row, decoded at this step, reach over the left and upper edge.

        As stored it is the last ones that do; an EXIF turn may bring them to the front.
        """
        return (
            -self.width % step if self.orientation in _OVERHANG_LEFT else 0,
            -self.height % step if self.orientation in _OVERHANG_TOP else 0,
        )


def reduction(resolution: float) -> int:
    """The step at which a JPEG is decoded where this share of its width and height is needed: 1, 2, 4 or 8."""
    for step in REDUCTIONS:
        if resolution * step <= 1.0:
            return step
    return 1


@cache
def packable_formats() -> tuple[str, ...]:
    """All that may be packed, which turns into PNG what no reader of shards knows; HEIF with its extra."""
    formats = (*FORMATS, *_RARE_FORMATS)
    if importlib.util.find_spec("pillow_heif") is None:
        return formats
    pillow_heif: Any = importlib.import_module("pillow_heif")
    pillow_heif.register_heif_opener()
    return (*formats, "HEIF")


def open_image(data: bytes, *, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read the header only.

    Raises:
        BadSample: not an image, more than MAX_PIXELS pixels, or more than MAX_ASPECT times as long as wide.
    """
    if data[4:12] in _HEIC_BRANDS and "HEIF" not in formats:
        raise BadSample("unknown format", "a HEIC image; vlm pack reads it where pillow-heif is installed")
    with _damaged_image_as_bad_sample():
        image = Image.open(io.BytesIO(data), formats=formats)
    check_size(*image.size, num_bytes=len(data) if image.format in ("JPEG", "MPO") else None)
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels after the EXIF orientation is applied."""
    is_turned = _orientation(image) in (5, 6, 7, 8)
    return (image.height, image.width) if is_turned else (image.width, image.height)


def to_rgb(image: Image.Image, *, resolution: float = 1.0) -> Image.Image:
    """Decode to upright RGB; transparency is laid on white.

    resolution: share of the width and height that is still needed; a JPEG is decoded at 1/2, 1/4 or 1/8
        of its size as long as that share is kept. At 1.0 the whole image is decoded.

    Raises:
        BadSample: the image's data is damaged.
    """
    with _damaged_image_as_bad_sample():
        if resolution < 1.0:
            # a size rounded up would make Pillow take the next larger scale, with four times the pixels
            step = reduction(resolution)
            image.draft("RGB", (max(1, image.width // step), max(1, image.height // step)))
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(_scaled_to_bytes(np.asarray(image)))
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")


def jpeg_thumbnail(image: Image.Image, *, pixels: int) -> bytes:
    """An opened or decoded image as a small JPEG in RGB whose longer side has at most `pixels` pixels.

    Raises:
        BadSample: the image's data is damaged.
    """
    rgb = to_rgb(image, resolution=min(1.0, pixels / max(image.size))).copy()
    rgb.thumbnail((pixels, pixels))
    file = io.BytesIO()
    rgb.save(file, format="JPEG", quality=_THUMBNAIL_QUALITY)
    return file.getvalue()


def _scaled_to_bytes(values: Num[Array, "H W"]) -> UInt8[Array, "H W"]:
    """Grey values of 16 or 32 bits or floats, scaled by the range that they use.

    Taken are 0 to 1 (floats), 0 to 255, 0 to 65,535, and otherwise what lies between the smallest and the largest.

    Raises:
        ValueError: some are not finite.
    """
    low, high = float(values.min()), float(values.max())
    if not (isfinite(low) and isfinite(high)):
        raise ValueError("its values are not finite")
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if low >= 0 and high <= 255:
        return np.rint(values).astype(np.uint8)
    if low >= 0 and high <= 65_535:
        return (values // 256).astype(np.uint8)
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)


def _read_jpeg_header(data: bytes) -> tuple[int, int, bool] | None:
    """(width, height) as stored, and whether there is an APP1 segment (EXIF or XMP) before the first scan.

    None for what is not plainly a JPEG in RGB, YCbCr or grey, which is for Pillow to read.
    """
    if not data.startswith(_JPEG_BEGINS):
        return None
    width = height = 0
    place = 2
    end = len(data) - _FRAME_BYTES
    may_be_turned = False
    while place < end and data[place] == _MARKER:
        marker = data[place + 1]
        # the most frequent first: there are six to ten of them before a frame, and this runs for every sample
        if marker in _SKIPPED_MARKERS:
            if marker == _APP1:
                may_be_turned = True
        elif marker in _FRAMES and not width and data[place + 9] in _NUM_COLOURS:
            height, width = data[place + 5] << 8 | data[place + 6], data[place + 7] << 8 | data[place + 8]
        elif marker == _SCAN and width and height:
            return width, height, may_be_turned
        else:
            return None
        place += 2 + (data[place + 2] << 8 | data[place + 3])
    return None


def _decode_jpeg(data: bytes, size: tuple[int, int], resolution: float) -> UInt8[Array, "H W 3"]:
    """Pixels as stored; ValueError for anything that libjpeg warns of. size: (width, height) as stored."""
    step = reduction(resolution)
    if step == 1:
        return simplejpeg.decode_jpeg(data, "RGB", fastupsample=resolution <= _FAST_UPSAMPLING_BELOW)
    return simplejpeg.decode_jpeg(data, "RGB", min_height=ceil(size[1] / step), min_width=ceil(size[0] / step))


def check_size(width: int, height: int, *, num_bytes: int | None = None) -> None:
    """Refuse an image that would cost too much memory.

    num_bytes: of the file, if it is a JPEG.

    Raises:
        BadSample: it has more than MAX_PIXELS pixels, or is more than MAX_ASPECT times as long as wide.
    """
    if width * height > MAX_PIXELS:
        raise BadSample("too large", f"{width}×{height} pixels, the limit is {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample("too narrow", f"{width}×{height} pixels, the limit is 1:{MAX_ASPECT}")
    if num_bytes is not None and width * height > num_bytes * _MAX_PIXELS_PER_BYTE:
        raise BadSample("unreadable image", f"{width}×{height} pixels cannot lie in a JPEG of {num_bytes:,} bytes")


def _orientation(image: Image.Image) -> int:
    with _damaged_image_as_bad_sample():
        return image.getexif().get(_ORIENTATION, 1)


@contextmanager
def _damaged_image_as_bad_sample() -> Iterator[None]:
    """Whatever Pillow raises means damage; damaged files make its readers raise about any kind of error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise BadSample("unreadable image", _reason(error)) from error


def _reason(error: Exception) -> str:
    """What Pillow said, less the memory address it names a nameless file by."""
    return str(error).split(" <_io.")[0] or type(error).__name__


def storable_image(image: bytes, *, verify: bool) -> tuple[str, bytes]:
    """Extension and bytes: JPEG, PNG and WebP, which all readers know, as they are, the rest upright, in RGB, as PNG.

    Raises:
        BadSample: it cannot be decoded.
    """
    if verify and _is_sound_jpeg(image):
        return "jpg", image
    pil_image = open_image(image, formats=packable_formats())
    extension = _KEPT_FORMATS.get(pil_image.format or "")
    if extension is not None:
        if verify:
            # JPEGs decode at an eighth for a fraction of the time, and still read all of their bytes
            to_rgb(pil_image, resolution=_VERIFIED_RESOLUTION)
        return extension, image
    file = io.BytesIO()
    to_rgb(pil_image).save(file, format="PNG")
    return "png", file.getvalue()


def _is_sound_jpeg(image: bytes) -> bool:
    """Whether it is a JPEG of nothing unusual that decodes without a warning; if not, Pillow says whether it is usable.

    libjpeg warns of all that makes Pillow refuse a file, and of more; it takes a third of the time that Pillow does.
    """
    if not _has_usual_segments(image):
        return False
    try:
        EncodedImage(image).pixels(resolution=_VERIFIED_RESOLUTION)
    except BadSample:
        return False
    return True


def _has_usual_segments(image: bytes) -> bool:
    place = 2 if image.startswith(_JPEG_BEGINS) else len(image)
    while image[place : place + 1] == b"\xff" and place + 3 < len(image):
        marker = image[place + 1]
        if marker == _SCAN:
            return True
        size = image[place + 2] << 8 | image[place + 3]
        if size < _LEAST_BYTES.get(marker, 2):
            return False
        if marker == _APP2:
            is_profile = image.startswith(_PROFILE_BEGINS, place + 4)
            if not is_profile or size < _LEAST_PROFILE_BYTES:
                return False
        place += 2 + size
    return False
