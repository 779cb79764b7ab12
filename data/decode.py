"""Encoded pictures to RGB, at the JPEG's own reduced scale where the picture will be shrunk anyway."""

import io
import warnings
from math import ceil

import numpy as np
from PIL import Image, ImageOps

from vlm.errors import BadSample

MAX_PIXELS = 100_000_000
# one pixel by 65,535 would be resized to 224 by 14.7 million
MAX_ASPECT = 250
_ORIENTATION = 0x0112


def open_picture(data: bytes) -> Image.Image:
    """Read the header only.

    Raises:
        BadSample: not a picture, more than MAX_PIXELS pixels, or more than MAX_ASPECT times as long as wide.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample("unreadable picture", _reason(error)) from error
    if picture.width * picture.height > MAX_PIXELS:
        raise BadSample("too large", f"{picture.width}×{picture.height} pixels, the limit is {MAX_PIXELS:,}")
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise BadSample("too narrow", f"{picture.width}×{picture.height} pixels, the limit is 1:{MAX_ASPECT}")
    return picture


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels after the EXIF orientation is applied."""
    is_turned = picture.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (picture.height, picture.width) if is_turned else (picture.width, picture.height)


def to_rgb(picture: Image.Image, *, resolution: float = 1.0) -> Image.Image:
    """Decode to upright RGB; transparency is laid on white.

    resolution: share of the width and height that is still needed; a JPEG is decoded at 1/2, 1/4 or 1/8
        of its size as long as that share is kept. At 1.0 the whole picture is decoded.

    Raises:
        BadSample: the picture's data is damaged.
    """
    try:
        if resolution < 1.0:
            picture.draft("RGB", (ceil(picture.width * resolution), ceil(picture.height * resolution)))
        picture.load()
        if picture.getexif().get(_ORIENTATION, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode == "RGB":
            return picture
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if "A" in picture.getbands() or "transparency" in picture.info:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise BadSample("unreadable picture", _reason(error)) from error


def _reason(error: Exception) -> str:
    """What Pillow said, less the memory address it names a nameless file by."""
    return str(error).split(" <_io.")[0] or type(error).__name__
