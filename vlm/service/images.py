"""Images of index rows: their bytes from the shard, and thumbnails for a page."""

from pathlib import Path

import fsspec
from PIL import Image

from vlm.data.decode import jpeg_thumbnail, open_image, to_rgb
from vlm.data.photo_formats import decodable_image
from vlm.data.shard_cache import default_cache
from vlm.errors import BadSample, VlmError
from vlm.index.embeddings_folder import Origin
from vlm.storage import is_compressed


def read_image_bytes(entry: Origin) -> bytes:
    """The encoded image of an entry, in a format that is embedded, read from its shard by byte range or from its file.

    Raises:
        VlmError: as of `read_stored_bytes`, or the file cannot be decoded.
    """
    data = read_stored_bytes(entry)
    # a file of its own may be of any format that is embedded; shards hold those that every reader knows
    return _decodable(data, entry.shard) if entry.is_file else data


def read_stored_bytes(entry: Origin) -> bytes:
    """The bytes of an entry's image as they are stored.

    Raises:
        VlmError: it was imported without an image, or the shard or file is missing, unreachable, or shorter now.
    """
    if not entry.image_size:
        raise VlmError("The row was imported and has no image in a shard")
    name = f"{'file' if entry.is_file else 'shard'} {Path(entry.shard).name}"
    try:
        # the byte range is that of the plain tar, so a compressed one has to be unpacked once
        address = str(default_cache().local_path(entry.shard)) if is_compressed(entry.shard) else entry.shard
        system, path = fsspec.core.url_to_fs(address)
        data: bytes = system.cat_file(path, start=entry.image_offset, end=entry.image_offset + entry.image_size)
    except (OSError, ValueError, ImportError) as error:
        reason = "no longer exists" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise VlmError(f"The {name} {reason}") from error
    if len(data) != entry.image_size:
        raise VlmError(f"The {name} is shorter than it was when it was embedded")
    return data


def _decodable(data: bytes, name: str) -> bytes:
    try:
        return decodable_image(data, name)
    except BadSample as error:
        raise VlmError(f"The image {Path(name).name} cannot be decoded: {error}") from error


def read_rgb_image(entry: Origin) -> Image.Image:
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
