"""Images of index rows: their bytes from the shard, and thumbnails for a page."""

from pathlib import Path

import fsspec
from PIL import Image

from vlm.data.decode import jpeg_thumbnail, open_image, to_rgb
from vlm.data.photo_formats import decodable_image
from vlm.data.shard_cache import default_cache
from vlm.errors import BadSample, VlmError
from vlm.index.catalog import Entry
from vlm.storage import is_compressed


def read_image_bytes(entry: Entry) -> bytes:
    """The encoded image of an entry, read from its shard by byte range.

    Raises:
        VlmError: it was imported without an image, or the shard is missing, unreachable, or shorter than it was.
    """
    if not entry.image_size:
        raise VlmError("The row was imported and has no image in a shard")
    try:
        # the byte range is that of the plain tar, so a compressed one has to be unpacked once
        address = str(default_cache().local_path(entry.shard)) if is_compressed(entry.shard) else entry.shard
        system, path = fsspec.core.url_to_fs(address)
        data: bytes = system.cat_file(path, start=entry.image_offset, end=entry.image_offset + entry.image_size)
    except (OSError, ValueError, ImportError) as error:
        name = Path(entry.shard).name
        reason = "no longer exists" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise VlmError(f"The shard {name} {reason}") from error
    if len(data) != entry.image_size:
        raise VlmError(f"The shard {Path(entry.shard).name} is shorter than it was when it was embedded")
    # in a tar, a header precedes every member: this row's image is a file of its own, of any format that is embedded
    return data if entry.image_offset else _decodable(data, entry.shard)


def _decodable(data: bytes, name: str) -> bytes:
    try:
        return decodable_image(data, name)
    except BadSample as error:
        raise VlmError(f"The image {Path(name).name} cannot be decoded: {error}") from error


def read_rgb_image(entry: Entry) -> Image.Image:
    """The image of an entry, upright and in RGB; raises as `read_image_bytes`, or VlmError if it cannot be decoded."""
    data = read_image_bytes(entry)
    try:
        return to_rgb(open_image(data))
    except BadSample as error:
        raise VlmError(f"The image of {entry.uid} cannot be decoded: {error}") from error


def thumbnail(image: bytes, *, pixels: int) -> bytes:
    """The image as a JPEG whose longer side has at most `pixels` pixels.

    Raises:
        VlmError: it cannot be decoded.
    """
    try:
        return jpeg_thumbnail(open_image(image), pixels=pixels)
    except BadSample as error:
        raise VlmError(f"The image cannot be shown: {error}") from error
