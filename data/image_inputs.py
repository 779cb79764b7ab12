"""Images as people hand them over: paths, encoded bytes, PIL images, arrays, tensors, one or several."""

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.errors import UsageError

# imported where it is used: a query of words and files needs none of it
if TYPE_CHECKING:
    from PIL import Image

ImageInput = Any
"""A path, the bytes of a file, a PIL image, or an array or tensor of pixels: [H, W, 3], [H, W, 4], [H, W] or [3, H, W].

Pixels are whole numbers to 255, or floats in [0, 1].
"""

_CHANNELS = (1, 3, 4)


def image_list(images: Any) -> list[ImageInput]:
    """One or several images as a list: an array with four axes is a batch of images."""
    if isinstance(images, str | os.PathLike | bytes | bytearray) or _is_pil_image(images):
        return [images]
    axes = getattr(images, "ndim", None)
    if axes is not None:
        return [images] if axes <= 3 else list(images)
    if not isinstance(images, Iterable):
        raise UsageError(f"{type(images).__name__} is not an image: give a path, bytes, a PIL image or an array.")
    return list(images)


def file_or_image(image: ImageInput) -> "Path | bytes | Image.Image":
    """A path or the bytes of a file as they are, and pixels of any kind as a PIL image.

    Raises:
        UsageError: it is not an image.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image).expanduser()
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    return image if _is_pil_image(image) else _image_from_pixels(image)


def encoded_image(image: ImageInput) -> Path | bytes:
    """A path as it is, and anything else as the bytes of an image file, without loss.

    Raises:
        UsageError: it is not an image. BadSample: a PIL image whose file is damaged.
    """
    from vlm.data.decode import to_rgb

    content = file_or_image(image)
    if isinstance(content, bytes | os.PathLike):
        return content
    file = io.BytesIO()
    # upright and in RGB as a file of it would be read: what is saved anew has lost the orientation in its EXIF.
    # Little compression: the bytes are read once more, in this process.
    to_rgb(content).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _is_pil_image(value: Any) -> bool:
    # whoever has such an image has imported its module
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(value, module.Image)


def _image_from_pixels(pixels: Any) -> "Image.Image":
    from PIL import Image

    # tensors of a GPU, or that need a gradient, refuse to become arrays
    if hasattr(pixels, "detach"):
        pixels = pixels.detach().cpu()
    try:
        array = np.asarray(pixels)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{type(pixels).__name__} is not an image: {error}.") from error
    is_channels_first = array.ndim == 3 and array.shape[0] in _CHANNELS and array.shape[2] not in _CHANNELS
    if is_channels_first:
        array = array.transpose(1, 2, 0)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)
    if not is_image or not array.size or array.dtype.kind not in "uifb":
        raise UsageError(
            f"An array of shape {array.shape} and type {array.dtype} is not an image: give [H, W, 3], [H, W] or "
            "[3, H, W], of whole numbers to 255 or floats in [0, 1]."
        )
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        # negated, because every comparison with NaN is false
        if not (low >= 0 and high <= 1):
            raise UsageError(f"Pixels as floats go from 0 to 1; these go from {low:g} to {high:g}.")
        array = np.rint(array * 255)
    elif array.dtype.kind in "ui" and not 0 <= array.min() <= array.max() <= 255:
        raise UsageError(f"Pixels as whole numbers go from 0 to 255; these go from {array.min()} to {array.max()}.")
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(np.ascontiguousarray(squeezed * 255 if array.dtype.kind == "b" else squeezed, np.uint8))
