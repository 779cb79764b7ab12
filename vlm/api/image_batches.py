"""Images in any form to batches of pixels: read and decoded in threads, a batch ahead of the model."""

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from vlm.data.image_inputs import file_or_image, image_list
from vlm.data.sources.source import image_paths
from vlm.data.transforms import EvalTransform
from vlm.errors import BadSample, UsageError
from vlm.tensor_types import Array, Tensor, UInt8

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | Array | Tensor
"""A path (a folder stands for all images below it), the bytes of a file, a PIL image, or pixels.

Pixels are a NumPy array [H, W, 3] or a tensor [3, H, W], bytes to 255 or floats from 0 to 1; a fourth axis in front
makes them several images.
"""

Images: TypeAlias = ImageLike | Iterable[ImageLike]
"""One image or several."""

OnError: TypeAlias = Literal["raise", "skip"]
"""What an image that cannot be used does: end the call with its name, or be left out and reported."""

_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class NamedImage:
    """An image with the name that results and messages give it: its path, or its place in the call."""

    name: str
    content: ImageLike


@dataclass(frozen=True)
class ImageBatch:
    """Some of the images, from number `first` on.

    usable: numbers of those that `pixels` holds. errors: why each of the others cannot be used, by its number.
    """

    first: int
    size: int
    usable: list[int]
    pixels: UInt8[Array, "K 3 S S"]
    errors: dict[int, str]


def name_images(images: Images) -> list[NamedImage]:
    """One or several images in a list, those of folders among them.

    Raises:
        UsageError: one of them is not an image in any form, or a folder holds none.
    """
    named: list[NamedImage] = []
    for place, image in enumerate(image_list(images)):
        if not isinstance(image, str | os.PathLike):
            named.append(NamedImage(f"images[{place}]", image))
            continue
        path = Path(image).expanduser()
        # a folder is named by the images in it, so that a result says which one it is of
        paths = image_paths([path])
        if not paths:
            raise UsageError(f"There is no image in the folder {str(path)!r}.")
        named += [NamedImage(str(path), path) for path in paths]
    return named


def read_batches(
    images: Sequence[NamedImage], view: EvalTransform, *, batch_size: int, on_error: OnError
) -> Iterator[ImageBatch]:
    """Batches in the order of the images; at most two are held.

    Raises:
        UsageError: an option is out of range; or, unless they are skipped, an image cannot be used.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size = {batch_size} is out of range: give 1 or more.")
    if on_error not in ("raise", "skip"):
        raise UsageError(f"on_error = {on_error!r}; give raise or skip.")
    _load_repeated(images)
    with ThreadPoolExecutor(min(_THREADS, max(len(images), 1)), "images") as pool:
        pending: deque[tuple[int, list[Future[np.ndarray]]]] = deque()
        try:
            for first in range(0, len(images), batch_size):
                some = images[first : first + batch_size]
                pending.append((first, [pool.submit(_view, image, view) for image in some]))
                # one batch is decoded while the model has the one before; more would only fill memory
                if len(pending) == 2:
                    yield _collect(*pending.popleft(), images, view, on_error)
            while pending:
                yield _collect(*pending.popleft(), images, view, on_error)
        finally:
            for _, futures in pending:
                for future in futures:
                    # whoever stops early, or an image that ends the call, does not wait for the others
                    future.cancel()


def _load_repeated(images: Sequence[NamedImage]) -> None:
    """Decode PIL images that are given more than once: two threads must not read one opened file at a time."""
    visited: set[int] = set()
    for image in images:
        if isinstance(image.content, Image.Image):
            if id(image.content) in visited:
                # what is wrong with it is found, and named, where it is used
                with contextlib.suppress(Exception):
                    image.content.load()
            visited.add(id(image.content))


def _view(image: NamedImage, view: EvalTransform) -> UInt8[Array, "3 S S"]:
    content = file_or_image(image.content)
    if isinstance(content, bytes):
        return view(content)
    if isinstance(content, Image.Image):
        return view.of_image(content)
    if not content.is_file():
        raise UsageError(f"There is no image {image.name!r}.")
    try:
        return view(content.read_bytes())
    except OSError as error:
        raise BadSample("unreadable file", error.strerror or str(error)) from error


def _collect(
    first: int,
    futures: Sequence["Future[np.ndarray]"],
    images: Sequence[NamedImage],
    view: EvalTransform,
    on_error: OnError,
) -> ImageBatch:
    usable: list[int] = []
    views: list[np.ndarray] = []
    errors: dict[int, str] = {}
    for number, future in enumerate(futures, start=first):
        try:
            views.append(future.result())
            usable.append(number)
        except (BadSample, UsageError) as error:
            message = str(error) if isinstance(error, UsageError) else f"{images[number].name} cannot be used: {error}"
            if on_error == "raise":
                raise UsageError(message) from error
            errors[number] = message
    pixels = np.stack(views) if views else np.zeros((0, 3, view.size, view.size), np.uint8)
    return ImageBatch(first, len(futures), usable, pixels, errors)
